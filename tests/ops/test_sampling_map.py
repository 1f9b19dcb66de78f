"""One random map for all back ends: the same logits, seed and position give the same token on the
CPU (with and without machine code), on the GPU (its kernel in Triton's interpreter) and by the
reference that defines it."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pagewire_kernels import cpu_native, cpu_sampling, cpu_target, sampling, sampling_map
from pagewire_kernels.filters import TOLERANCE
from pagewire_kernels.philox import WORDS, sampling_words
from pagewire_kernels.sampling_map import SamplingRows
from torch import Tensor

ROWS = 6
WIDTHS = (61, 1301)
TIE = 1e-5
"""Relative to the largest score: what logarithms of two libraries and a sum in float32 may
differ by."""
COMBINATIONS = list(
    itertools.product((0.0, 0.3, 1.0, 2.5), (0, 1, 40, 5000), (1.0, 0.9, 0.3), (0.0, 0.05))
)
"""temperature, top_k, top_p, min_p."""


@pytest.fixture(params=["torch", "native"])
def cpu(request, monkeypatch, tmp_path_factory):
    """The CPU's sampler, with and without machine code."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_sampling, "_search", [])
    else:
        cpu_native.keep_in(tmp_path_factory.getbasetemp() / "native")
        try:
            cpu_sampling.compile_search()
        except cpu_target.NoNativeCode as error:
            pytest.skip(str(error))
    return cpu_sampling.sample


def parameters(combination: tuple[float, int, float, float], first: int) -> SamplingRows:
    temperature, top_k, top_p, min_p = combination
    ids = torch.arange(first, first + ROWS)
    return SamplingRows.named(
        seeds=ids * 0x1234_5678_9ABC + 3,
        positions=ids * 0x1_0000_0001,
        temperature=[temperature] * ROWS,
        top_k=[top_k] * ROWS,
        top_p=[top_p] * ROWS,
        min_p=[min_p] * ROWS,
    )


def scores(logits: Tensor, rows: SamplingRows, row: int) -> Tensor:
    """float32 [V], nothing excluded."""
    width = logits.shape[1]
    groups = np.arange(-(-width // WORDS))
    words = sampling_words(
        np.full_like(groups, int(rows.seeds[row])),
        np.full_like(groups, int(rows.positions[row])),
        groups,
    )
    noise = sampling_map.gumbel(torch.from_numpy(words)).flatten()[:width]
    return logits[row] * (1.0 / rows.temperature[row]) + noise


def excused(logits: Tensor, rows: SamplingRows, row: int, one: int, other: int) -> bool:
    """Two tokens that float32 cannot tell apart: by their scores, or because one of them is at the
    edge of what top-p keeps, which the GPU's search finds within TOLERANCE."""
    both = scores(logits, rows, row)[[one, other]]
    if abs(float(both[0] - both[1])) <= TIE * max(1.0, float(both.abs().max())):
        return True
    edge = float(sampling_map.thresholds(logits, rows)[row])
    near = 2 * TOLERANCE.value * float(rows.temperature[row])
    lower = float(logits[row, [one, other]].min())
    return float(rows.top_p[row]) < 1 and abs(lower - edge) <= near


@dataclass
class Case:
    name: tuple[float, int, float, float]
    logits: Tensor
    rows: SamplingRows
    exact: list[int]
    """The reference's tokens."""

    def ties(self, tokens: list[int]) -> int:
        """How many of `tokens` differ from the reference's; all of them must be excused."""
        different = np.flatnonzero(np.array(tokens) != self.exact).tolist()
        for row in different:
            assert excused(self.logits, self.rows, row, tokens[row], self.exact[row]), (
                self.name,
                row,
            )
        return len(different)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(1)
    made: list[Case] = []
    for i, combination in enumerate(COMBINATIONS):
        logits = torch.randn(ROWS, WIDTHS[i // 2 % len(WIDTHS)], generator=generator) * 3
        rows = parameters(combination, ROWS * i)
        made.append(Case(combination, logits, rows, sampling_map.sample(logits, rows).tolist()))
    return made


def test_all_combinations_of_parameters_on_the_cpu(cases, cpu) -> None:
    ties = sum(case.ties(cpu(case.logits, case.rows).tolist()) for case in cases)
    assert ties <= 1, f"{ties} of {ROWS * len(cases)} tokens differ: too many to be ties"


def test_all_combinations_of_parameters_on_the_gpu(cases) -> None:
    """One row of each, since the interpreter is slow."""
    ties = 0
    for i, case in enumerate(cases):
        row = torch.tensor([i % ROWS])
        one = Case(case.name, case.logits[row], case.rows.at(row), [case.exact[i % ROWS]])
        ties += one.ties(sampling.sample(one.logits, one.rows).tokens.tolist())
    assert ties <= 1, f"{ties} of {len(cases)} tokens differ: too many to be ties"


def few_values() -> Tensor:
    """In bfloat16 many logits are equal; some are excluded."""
    logits = torch.randn(ROWS, 777, generator=torch.Generator().manual_seed(2)) * 2
    logits[:, 100:200] = float("-inf")
    return logits.bfloat16().float()


def test_thresholds_that_fall_on_equal_logits_on_the_cpu(cpu) -> None:
    logits = few_values()
    for i, combination in enumerate(COMBINATIONS):
        rows = parameters(combination, 1000 + ROWS * i)
        assert torch.equal(cpu(logits, rows), sampling_map.sample(logits, rows))


def test_thresholds_that_fall_on_equal_logits_on_the_gpu() -> None:
    logits = few_values()
    for i, combination in enumerate(COMBINATIONS[27::23]):
        rows = parameters(combination, 1000 + ROWS * i)
        assert torch.equal(sampling.sample(logits, rows).tokens, sampling_map.sample(logits, rows))


def test_rows_of_all_kinds_in_one_batch_are_sampled_as_alone(cpu) -> None:
    logits = torch.randn(len(COMBINATIONS), 1500, generator=torch.Generator().manual_seed(3)) * 3
    count = len(COMBINATIONS)
    temperature, top_k, top_p, min_p = (list(c) for c in zip(*COMBINATIONS, strict=True))
    rows = SamplingRows.named(
        torch.arange(count) + 7,
        torch.arange(count) * 3,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    together = cpu(logits, rows)
    assert torch.equal(together, sampling_map.sample(logits, rows))
    for row in range(0, count, 7):
        index = torch.tensor([row])
        assert cpu(logits[index], rows.at(index)) == together[row]


def test_a_token_hangs_on_seed_and_position(cpu) -> None:
    logits = torch.zeros(400, 1000)
    ids = torch.arange(400)

    def draw(seeds: Tensor, positions: Tensor) -> list[int]:
        return cpu(logits, SamplingRows.named(seeds, positions)).tolist()

    by_seed, by_position = draw(ids, ids * 0), draw(ids * 0, ids)
    assert len(set(by_seed)) > 250 and len(set(by_position)) > 250
    assert draw(ids, ids * 0) == by_seed and by_seed[0] == by_position[0]
    assert draw(ids + 2**40, ids * 0) != by_seed and draw(ids * 0, ids + 2**40) != by_position


def test_more_candidates_than_there_is_room_for() -> None:
    """At so low a temperature many scores are equal in float32: torch decides then."""
    cpu_sampling.compile_search()
    logits = torch.full((2, 3000), 5.0)
    logits[:, 17] = 4.0
    ids = torch.arange(2)
    rows = SamplingRows.named(ids, ids, temperature=[2e-5, 2e-5])
    assert torch.equal(cpu_sampling.sample(logits, rows), sampling_map.sample(logits, rows))
