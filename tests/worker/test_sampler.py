"""Sampling against independent references in numpy."""

import contextlib

import numpy as np
import pytest
import torch
from pagewire.worker.cpu import sampler
from pagewire.worker.cpu.sampler import Rows, sample
from pagewire_kernels import cpu_native, cpu_sampling, cpu_target
from pagewire_kernels.sampling_map import PARAMETERS, SamplingRows
from pagewire_protocol.columns import unpack
from scipy import stats


@pytest.fixture(scope="module", autouse=True)
def native(tmp_path_factory):
    """As in a worker that has drawn for a while; without Numba torch does the same, slowly."""
    cpu_native.keep_in(tmp_path_factory.getbasetemp() / "native")
    with contextlib.suppress(cpu_target.NoNativeCode):
        cpu_sampling.compile_search()


DEFAULTS = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "presence": 0.0,
    "frequency": 0.0,
    "repetition": 1.0,
}


def rows(settings: list[dict], seeds=None, positions=None, constrain=None, history=None) -> Rows:
    count = len(settings)
    columns = {
        name: torch.tensor([s.get(name, default) for s in settings], dtype=torch.float32)
        for name, default in DEFAULTS.items()
    }
    sampling = SamplingRows.named(
        seeds=torch.tensor(seeds if seeds is not None else [0] * count),
        positions=torch.tensor(positions if positions is not None else [0] * count),
        **{name: columns.pop(name) for name in PARAMETERS},
    )
    return Rows(
        sampling,
        **columns,
        logprobs=np.array([s.get("logprobs", -1) for s in settings]),
        history=history or {},
        constrain=constrain,
    )


def filter_reference(
    logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0
) -> np.ndarray:
    """Probabilities after temperature, min-p, top-k and top-p in this order, one token at a
    time."""
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        for i in order[top_k:]:
            p[i] = 0
    p /= p.sum()
    kept, total = np.zeros_like(p), 0.0
    for i in order:
        if total >= top_p:
            break
        kept[i] = p[i]
        total += p[i]
    return kept / kept.sum()


FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [60, 3000])
def test_frequencies_follow_the_filtered_distribution(settings, vocabulary):
    draws = 20_000
    logits = torch.from_numpy(
        np.random.default_rng(1).normal(0, 3 if vocabulary == 60 else 1.5, vocabulary)
    ).float()
    tokens = np.concatenate(
        [
            sample(
                logits.expand(500, -1),
                rows([settings] * 500, seeds=[9] * 500, positions=list(range(first, first + 500))),
            ).tokens
            for first in range(0, draws, 500)
        ]
    )
    wanted = filter_reference(logits.numpy(), **settings)
    counts = np.bincount(tokens, minlength=vocabulary)
    assert counts[wanted == 0].sum() == 0, "a token outside the filter was drawn"
    order = np.argsort(-wanted)
    common = order[wanted[order] * draws >= 10]
    seen, due = counts[common].astype(float), wanted[common] * draws
    rest = draws - due.sum()
    if rest > 5:
        seen, due = np.append(seen, draws - seen.sum()), np.append(due, rest)
    if len(due) > 1:
        assert stats.chisquare(seen, due * seen.sum() / due.sum()).pvalue > 1e-3


def test_a_row_does_not_depend_on_its_company():
    """Every kind of row, alone and among 31 others, with logits in bfloat16 where ties abound."""
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(32, 5003, generator=random) * 3).bfloat16()
    settings = [
        {
            **FILTERS[i % len(FILTERS)],
            "temperature": 0.0 if i % 8 == 7 else FILTERS[i % len(FILTERS)].get("temperature", 1.0),
        }
        for i in range(32)
    ]
    for position in range(20):
        seeds, positions = list(range(100, 132)), [position] * 32
        together = sample(logits, rows(settings, seeds, positions)).tokens
        alone = [
            sample(logits[i : i + 1], rows([settings[i]], [seeds[i]], [position])).tokens[0]
            for i in range(32)
        ]
        assert together.tolist() == alone


def test_greedy_paths_agree_and_take_the_first_of_equals():
    logits = torch.randint(0, 4, (16, 2000), generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = [row.tolist().index(row.max().item()) for row in logits]
    assert sampler.greedy(logits).tokens.tolist() == wanted
    assert sample(logits, rows([{"temperature": 0.0}] * 16)).tokens.tolist() == wanted


def penalty_reference(logits, prompt, output, presence, frequency, repetition):
    x = logits.astype(np.float64).copy()
    for token in set(prompt) | set(output):
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(output):
        x[token] -= frequency * output.count(token) + presence
    return x


@pytest.mark.parametrize(
    "penalties", [(0.5, 0.0, 1.0), (0.0, 0.7, 1.0), (0.0, 0.0, 1.4), (0.3, -0.4, 0.8)]
)
def test_penalties(penalties):
    random = np.random.default_rng(2)
    logits = random.normal(0, 2, (3, 50)).astype(np.float32)
    prompts, outputs = (
        random.integers(0, 50, (3, 12)).tolist(),
        random.integers(0, 50, (3, 30)).tolist(),
    )
    settings = [
        dict(zip(("presence", "frequency", "repetition"), penalties, strict=True), temperature=0.0)
    ] * 3
    history = {i: (torch.tensor(prompts[i]), torch.tensor(outputs[i])) for i in (0, 2)}
    x = torch.from_numpy(logits.copy())
    given = rows(settings, history=history)
    sampler.penalize(x, given)
    for i in (0, 2):
        np.testing.assert_allclose(
            x[i], penalty_reference(logits[i], prompts[i], outputs[i], *penalties), atol=1e-5
        )
    np.testing.assert_array_equal(x[1], logits[1])
    assert sample(torch.from_numpy(logits), given).tokens.tolist() == x.argmax(-1).tolist()


def test_logprobs_are_of_the_raw_logits():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(5))
    settings = [
        {"temperature": 0.2, "logprobs": 3, "frequency": 1.0},
        {},
        {"temperature": 0.0, "logprobs": 0},
    ]
    found = sample(logits, rows(settings, history={0: (torch.tensor([1]), torch.tensor([2, 2]))}))
    got = found.logprobs
    assert got is not None
    columns = got.columns(found.tokens)
    rows_, counts, ranks, ids = (
        unpack("i", c).tolist() for c in (columns.rows, columns.counts, columns.ranks, columns.ids)
    )
    exact = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    assert rows_ == [0, 2] and counts == [4, 1]
    np.testing.assert_allclose(
        unpack("f", columns.values), [*exact[0, ids[:4]], exact[2, ids[4]]], atol=1e-5
    )
    assert [ids[0], ids[4]] == found.tokens[[0, 2]].tolist()
    assert ranks == [
        int(1 + (exact[row] > exact[row, own]).sum()) for row, own in ((0, ids[0]), (2, ids[4]))
    ]
    assert ids[1:4] == exact[0].topk(3).indices.tolist()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_flagged_alone(wrong):
    logits = torch.randn(4, 100)
    logits[2, 7] = wrong
    for found in (sample(logits, rows([{}] * 4)), sampler.greedy(logits)):
        assert found.bad.tolist() == [0, 0, 1, 0]
    clean = sample(logits[:2], rows([{}] * 2, seeds=[3, 4])).tokens.tolist()
    assert sample(logits, rows([{}] * 4, seeds=[3, 4, 5, 6])).tokens[:2].tolist() == clean


def test_forbidden_tokens_are_never_given():
    logits = torch.zeros(200, 4)
    logits[:, 1] = 8
    settings, banned = [{}] * 100 + [{"temperature": 0.0}] * 100, torch.tensor([1, 3])
    constrain = lambda x: x.index_fill_(1, banned, float("-inf"))  # noqa: E731
    tokens = sample(logits, rows(settings, seeds=list(range(200)), constrain=constrain)).tokens
    assert set(tokens.tolist()) == {0, 2}
    assert set(tokens[100:].tolist()) == {0}
