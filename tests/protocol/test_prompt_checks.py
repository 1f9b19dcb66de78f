"""The rule of truncation, and the words for a request that does not fit."""

import pytest
from pagewire_protocol.columns import pack, unpack
from pagewire_protocol.prompt_checks import kept_prompt_tokens, too_long, truncated_ids


@pytest.mark.parametrize(
    ("truncate", "context", "completion", "kept"),
    [
        (0, 100, 10, 0),
        (7, 100, 10, 7),
        (500, 100, 10, 500),
        (-1, 100, 10, 90),
        (-1, 100, 99, 1),
        (-1, 100, 100, 0),
        (-1, 100, 2**31 - 1, 0),
    ],
)
def test_how_much_stays(truncate: int, context: int, completion: int, kept: int) -> None:
    assert kept_prompt_tokens(truncate, context, completion) == kept


def test_the_end_stays_and_nothing_is_cut_to_nothing() -> None:
    ids = pack("i", range(10))
    for kept, wanted in ((3, [7, 8, 9]), (10, list(range(10))), (99, list(range(10)))):
        assert unpack("i", truncated_ids(ids, kept)).tolist() == wanted
    assert truncated_ids(ids, 0) == ids


def test_the_refusal_has_the_numbers() -> None:
    words = too_long(4096, 5000, 16)
    assert "4096 tokens" in words and "5016 tokens (5000 in the prompt, 16 for" in words
