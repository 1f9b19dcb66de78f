"""Sampling: the Philox stream, the distribution, the thresholds against sorting, flags and
penalties."""

import numpy as np
import pytest
import torch
from pagewire_kernels import reference
from pagewire_kernels.penalties import apply_penalties, count_tokens
from pagewire_kernels.sampling import SamplingRows, sample, thresholds, top_logprobs
from pagewire_kernels.token_masks import apply_token_masks

INF = float("inf")


def philox(seed: int, position: int, width: int) -> np.ndarray:
    """Philox4x32-10 words of ids 0..width, written from its definition (Salmon et al., 2011)."""
    mask = np.uint64(0xFFFFFFFF)
    counter = np.arange(-(-width // 4), dtype=np.uint64)
    c = [
        counter,
        np.full_like(counter, position & 0xFFFFFFFF),
        np.full_like(counter, position >> 32),
        np.zeros_like(counter),
    ]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        left, right = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (right >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            right & mask,
            (left >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            left & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, 1).reshape(-1)[:width]


def gumbel(seed: int, position: int, width: int) -> torch.Tensor:
    u = (philox(seed, position, width).astype(np.float64) + 0.5) * 2.0**-32
    return torch.from_numpy(-np.log(-np.log1p(-u)))


def rows(count: int, **given: list[float] | list[int]) -> SamplingRows:
    seeds, positions = (
        torch.tensor(given.pop(name, [0] * count)) for name in ("seeds", "positions")
    )
    return SamplingRows.named(seeds, positions, **given)


def kept(logits: torch.Tensor, heat: float, k: int, p: float, least: float) -> torch.Tensor:
    """Oracle: sort, cut, renormalise."""
    x = logits.double()
    keep = torch.ones_like(x, dtype=torch.bool)
    if 0 < k < len(x):
        keep &= x >= x.sort(descending=True).values[k - 1]
    if least > 0:
        keep &= x >= x.max() + heat * np.log(least)
    if p < 1:
        probs = (x / heat).masked_fill(~keep, -INF).softmax(0)
        order = probs.argsort(descending=True)
        needed = int((probs[order].cumsum(0) < p).sum()) + 1
        keep &= x >= x[order[needed - 1]]
    return keep


def test_noise_is_philox_of_seed_position_and_id() -> None:
    logits = torch.randn(4, 2500)
    seeds, positions = [5, 2**62 + 12345, 5, 5], [0, 7, 1, 2**33 + 1]
    got = sample(
        logits, rows(4, seeds=seeds, positions=positions, temperature=[1.0, 0.5, 2.0, 1.0])
    )
    for i, heat in enumerate([1.0, 0.5, 2.0, 1.0]):
        score = logits[i].double() / heat + gumbel(seeds[i], positions[i], 2500)
        assert got.tokens[i] == score.argmax()
    chosen = torch.log_softmax(logits.double(), -1).gather(1, got.tokens[:, None])[:, 0]
    assert torch.allclose(got.logprobs.double(), chosen, atol=1e-5)


def test_draws_follow_the_softmax() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    got = sample(
        probs.log().expand(600, 4).contiguous(),
        rows(600, positions=list(range(600)), seeds=[9] * 600),
    )
    seen = torch.bincount(got.tokens, minlength=4) / 600
    assert (seen - probs).abs().max() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_thresholds_equal_sorting(dtype: torch.dtype) -> None:
    logits = (torch.randn(8, 1111) * 3).to(dtype)
    settings = [
        (1.0, 5, 1.0, 0.0),
        (0.7, 0, 0.9, 0.0),
        (1.0, 0, 1.0, 0.1),
        (1.3, 40, 0.8, 0.02),
        (1.0, 1, 0.5, 0.0),
        (2.0, 2000, 0.99, 0.0),
        (1.0, 0, 1e-6, 0.0),
    ]
    settings.append((1.0, 0, 1.0, 0.0))
    heat, k, p, least = (list(c) for c in zip(*settings, strict=True))
    got = thresholds(logits, rows(8, temperature=heat, top_k=k, top_p=p, min_p=least))
    for i, setting in enumerate(settings):
        ours, exact = logits[i].float() >= got[i], kept(logits[i], *setting)
        assert (ours | ~exact).all(), (i, setting)
        assert (
            logits[i].float()[ours]
            >= logits[i].float()[exact].min() - 1e-3 * setting[0] * (setting[2] < 1)
        ).all(), (i, setting)


def test_banned_tokens_and_greedy_and_nan() -> None:
    logits = torch.randn(4, 1500)
    logits[0, 100:] = -INF
    logits[1, [17, 900]] = 50.0
    logits[2, 1499] = float("nan")
    got = sample(logits, rows(4, temperature=[1.0, 0.0, 1.0, 0.0], top_p=[0.9, 1, 1, 1]))
    assert got.tokens[0] < 100
    assert got.tokens[1] == 17
    assert got.bad.tolist() == [False, False, True, False]
    assert got.tokens[3] == logits[3].argmax()
    again = sample(logits, rows(4, temperature=[1.0, 0.0, 1.0, 0.0], top_p=[0.9, 1, 1, 1]))
    assert torch.equal(got.tokens, again.tokens)


def test_a_whole_row_of_nan_gives_a_valid_id() -> None:
    got = sample(torch.full((1, 300), float("nan")), rows(1))
    assert got.bad.all()
    assert 0 <= got.tokens[0] < 300


def test_top_logprobs() -> None:
    logits = torch.randn(2, 100)
    ids, values = top_logprobs(logits, 3)
    assert torch.allclose(values, torch.log_softmax(logits, -1).gather(1, ids))


def test_penalties() -> None:
    width = 2100
    logits, counts = torch.randn(3, width), torch.zeros(4, width, dtype=torch.int32)
    prompted = (torch.rand(4, width) < 0.3).to(torch.uint8)
    slots = torch.tensor([2, 0, 3])
    for tokens in ([5, 6, 7], [5, 8, 7]):
        count_tokens(counts, torch.tensor([2, -1, 3]), torch.tensor(tokens))
    assert counts[2, 5] == 2
    assert counts[0].sum() == 0
    a, b, r = (
        torch.tensor([0.5, 0.0, 0.0]),
        torch.tensor([0.25, 0.0, 1.0]),
        torch.tensor([1.2, 1.0, 1.0]),
    )
    n = counts[slots].float()
    seen = (n > 0) | (prompted[slots] > 0)
    expected = torch.where(
        seen, torch.where(logits > 0, logits / r[:, None], logits * r[:, None]), logits
    )
    expected = expected - a[:, None] * (n > 0) - b[:, None] * n
    apply_penalties(logits, counts, prompted, slots, a, b, r)
    assert torch.allclose(logits, expected)


@pytest.mark.parametrize("width", [31, 32, 100, 5000])
def test_token_masks(width: int) -> None:
    make = torch.Generator().manual_seed(width)
    logits = torch.randn(5, width, generator=make)
    rows = torch.tensor([4, 0, 4])
    words = torch.randint(-(2**31), 2**31, (3, -(-width // 32)), dtype=torch.int32, generator=make)
    words[2] = words[0]
    wanted = logits.clone()
    reference.apply_token_masks(wanted, rows, words)
    apply_token_masks(logits, rows, words)
    assert torch.equal(logits, wanted) and torch.isinf(wanted[[0, 4]]).any()
    assert torch.isfinite(wanted[1:4]).all()
    for token in range(width):
        stays = bool((int(words[1, token // 32]) >> (token % 32)) & 1)
        assert bool(torch.isfinite(logits[0, token])) is stays
