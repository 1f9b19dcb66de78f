"""The judge of the checks on GPUs: which ranks and log-probabilities it lets pass."""

import pytest
import torch
from torch import Tensor
from worker.gpu_oracle import Said, Tally

VOCABULARY = 64
TOKENS = 9
ROUGH = 0.1
"""The largest error of bf16, here of every position."""


def logits(errors: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """(exact, rough) [TOKENS - 1, VOCABULARY]: token 0 is `gap` before token 1 and far before the
    others, and rough is off by `errors` [TOKENS - 1] in one place of each row."""
    exact = torch.linspace(-5, -8, VOCABULARY).repeat(TOKENS - 1, 1)
    exact[:, 0], exact[:, 1] = 0.0, -gap
    rough = exact.clone()
    rough[:, 9] += errors
    return exact, rough


def faults(errors: Tensor, gap: float, second: list[int], routed: bool = False) -> list[str]:
    """Of an output of token 0 all along, but of token 1 at the positions `second`."""
    tokens = [0, *(1 if place in second else 0 for place in range(1, TOKENS))]
    tally = Tally(routed=routed)
    tally.add(Said("one", "outputs", tokens, 1, []), 0, *logits(errors, gap))
    return tally.verdict()[1]


def test_a_token_may_be_behind_by_two_errors_of_bf16() -> None:
    errors = torch.full((TOKENS - 1,), ROUGH)
    assert not faults(errors, 1.99 * ROUGH, [3])
    assert faults(errors, 2.01 * ROUGH, [3]) == [
        "1 tokens are ranked higher than an error of bf16 explains"
    ]


def test_where_bf16_was_lucky_the_average_error_counts() -> None:
    errors = torch.full((TOKENS - 1,), ROUGH)
    errors[2] = 0.001
    assert not faults(errors, 1.7 * ROUGH, [3])
    assert faults(errors, 2.01 * ROUGH, [3])


def test_an_error_larger_than_the_average_counts_at_its_own_position_alone() -> None:
    errors = torch.full((TOKENS - 1,), ROUGH)
    errors[2] = 4 * ROUGH
    assert not faults(errors, 7.9 * ROUGH, [3])
    assert faults(errors, 7.9 * ROUGH, [4])
    assert not faults(errors, 7.9 * ROUGH, [4], routed=True)


@pytest.mark.parametrize("routed", [False, True])
def test_what_is_no_number_is_wrong(routed: bool) -> None:
    assert faults(torch.full((TOKENS - 1,), torch.nan), 0.1 * ROUGH, [3], routed)


def test_the_first_token_is_right_where_nothing_is_rounded() -> None:
    assert not faults(torch.zeros(TOKENS - 1), ROUGH, [])


def test_log_probabilities_are_held_against_those_of_bf16() -> None:
    exact, rough = logits(torch.full((TOKENS - 1,), ROUGH), 1.0)
    rough[:, 0] += ROUGH
    true = exact.log_softmax(-1)[0, 0].item()
    error = rough.log_softmax(-1)[0, 0].item() - true
    for off, wrong in ((1.2, False), (1.3, True)):
        scores = [(at + 1, 0, 1, true - off * error) for at in range(TOKENS - 1)]
        tally = Tally()
        tally.add(Said("one", "outputs", [0] * TOKENS, 1, scores), 0, exact, rough)
        assert bool(tally.verdict()[1]) == wrong
