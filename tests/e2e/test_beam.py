"""Beam search against transformers' own, token for token and score for score, on tiny models with
random weights."""

from collections.abc import Iterator
from typing import Any

import pytest
from pagewire.requests.beam_search import MAX_CANDIDATES, MAX_WIDTH, BeamSearch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
VOCAB = 60
PROMPTS = ([5, 6, 7], [11], [3, 3, 3, 3, 9, 1, 4, 20])


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """Weights wide enough that the likeliest tokens differ from place to place, and that ends come
    often."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.6,
    )
    yield transformers.LlamaForCausalLM(config).eval()


def search_with(model: Any, prompt: list[int], search: BeamSearch) -> int:
    """Run to the end; the number of rounds."""
    rounds = 0
    while search.live:
        ids = torch.tensor([prompt + beam.tokens() for beam in search.live])
        with torch.no_grad():
            best = model(ids).logits[:, -1].float().log_softmax(-1).topk(search.candidates)
        search.advance(
            [
                list(zip(*row, strict=True))
                for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        )
        rounds += 1
    return rounds


def expected(
    model: Any, prompt: list[int], count: int, **options: Any
) -> list[tuple[list[int], float]]:
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, num_return_sequences=count, pad_token_id=VOCAB,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    sequences = []
    for row, score in zip(
        out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True
    ):
        while row and row[-1] == VOCAB:
            row.pop()
        sequences.append((row, score))
    return sequences


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize(("width", "ends"), [(2, [8]), (4, [8, 15, 30]), (7, [22, 4, 41, 40])])
def test_the_hypotheses_are_those_of_transformers(
    model: Any, early: Any, penalty: float, width: int, ends: list[int]
) -> None:
    for prompt in PROMPTS:
        search = BeamSearch(width, 12, ends, penalty, early)
        search_with(model, prompt, search)
        found = [(hypothesis.beam.tokens(), hypothesis.score) for hypothesis in search.best(width)]
        wanted = expected(
            model,
            prompt,
            width,
            num_beams=width,
            max_new_tokens=12,
            eos_token_id=ends,
            length_penalty=penalty,
            early_stopping=early,
        )
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
        assert [score for _, score in found] == pytest.approx(
            [score for _, score in wanted], abs=1e-4
        )


def test_the_first_tokens_are_none_that_end(model: Any) -> None:
    ends = [8, 15, 30, 22]
    search = BeamSearch(3, 10, ends, min_tokens=4)
    search_with(model, PROMPTS[0], search)
    wanted = expected(
        model, PROMPTS[0], 3, num_beams=3, max_new_tokens=10, min_new_tokens=4, eos_token_id=ends
    )
    assert [hypothesis.beam.tokens() for hypothesis in search.best(3)] == [
        tokens for tokens, _ in wanted
    ]
    assert all(not set(tokens[:4]) & set(ends) for tokens, _ in wanted)


def rows(*values: float) -> list[tuple[int, float]]:
    return list(enumerate(values))


def test_an_end_that_is_not_among_the_width_likeliest_finishes_nothing() -> None:
    search = BeamSearch(1, 5, ends=[2])
    search.advance([rows(-0.5, -2.0, -1.0)])
    assert not search.finished and [beam.token for beam in search.live] == [0]
    search.advance([[(2, -0.1), (0, -3.0)]])
    (hypothesis,) = search.best(5)
    assert (hypothesis.beam.tokens(), hypothesis.end) == (
        [0, 2],
        2,
    ) and hypothesis.score == pytest.approx(-0.3)
    assert not search.live


def test_without_ends_all_beams_run_to_the_limit_and_keep_what_they_were_given() -> None:
    search = BeamSearch(2, 2, length_penalty=1.0)
    search.advance([rows(-1.0, -2.0)], kept=["first"])
    search.advance([rows(-1.0, -4.0), rows(-0.5, -5.0)], kept=["after 0", "after 1"])
    assert [(h.beam.tokens(), h.score, h.end) for h in search.best(2)] == [
        ([0, 0], -1.0, None),
        ([1, 0], -1.25, None),
    ]
    assert [[beam.kept for beam in h.beam.path()] for h in search.best(2)] == [
        ["first", "after 0"],
        ["first", "after 1"],
    ]


def test_early_stopping_ends_the_search_sooner(model: Any) -> None:
    def rounds(early: Any) -> int:
        search = BeamSearch(4, 40, [8, 15, 30], 2.0, early)
        return search_with(model, PROMPTS[0], search)

    assert rounds(True) <= rounds(False) <= rounds("never") and rounds(True) < rounds("never")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"width": 0}, f"1 to {MAX_WIDTH} beams wide, got 0"),
        ({"width": 99}, "got 99"),
        ({"early_stopping": "soon"}, "'soon'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_bounds(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BeamSearch(**{"width": 2, "max_tokens": 4, **given})
    assert BeamSearch(MAX_WIDTH, 4, range(100)).candidates == MAX_CANDIDATES
