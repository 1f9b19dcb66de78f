"""Random inputs on the device, large enough that repeated launches do not find them in a cache, and
a float32 oracle of attention."""

import torch
from torch import Tensor

DEVICE = "cuda"
DTYPE = torch.bfloat16
PAGE, HKV = 16, 8
PAGES = 36_864
"""Keys and values of 1.2 GB each at head size 128."""
WEIGHT_BYTES = 3e8
"""Of one product, over the copies that launches rotate through."""

_pools: dict[int, tuple[Tensor, Tensor]] = {}
_weights: dict[tuple[int, int], list[Tensor]] = {}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def nan(*shape: int) -> Tensor:
    """An output that shows what was not written."""
    return torch.full(shape, float("nan"), device=DEVICE, dtype=DTYPE)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def error(out: Tensor, ref: Tensor) -> float:
    """The relative norm of the difference; NaN unless all of `out` is finite."""
    return ((out.float() - ref.float()).norm() / ref.float().norm()).item()


def pool(dim: int) -> tuple[Tensor, Tensor]:
    """Key and value pages [PAGES, HKV, PAGE, dim], the same ones at each call."""
    if dim not in _pools:
        _pools[dim] = (rand(PAGES, HKV, PAGE, dim), rand(PAGES, HKV, PAGE, dim))
    return _pools[dim]


def weights(n: int, k: int) -> list[Tensor]:
    """Copies of a weight [n, k] to rotate through, the same ones at each call."""
    if (n, k) not in _weights:
        _weights[n, k] = [rand(n, k) * 0.02 for _ in range(max(2, int(WEIGHT_BYTES / (n * k * 2))))]
    return _weights[n, k]


def forget() -> None:
    _pools.clear()
    _weights.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tables(rows: int, length: int) -> list[Tensor]:
    """Block tables [rows, length / PAGE] int32 that share no page."""
    need = rows * -(-length // PAGE)
    order = torch.randperm(PAGES, device=DEVICE).to(torch.int32)
    sets = max(1, min(64, PAGES // need))
    return [order[i * need : (i + 1) * need].view(rows, -1) for i in range(sets)]


def oracle(
    q: Tensor, table: Tensor, positions: Tensor, dim: int, window: int | None = None
) -> Tensor:
    """float32 attention of tokens q [n, Hq, dim] at `positions` of one sequence -> [n, Hq *
    dim]."""
    k, v = (
        c[table.long()]
        .transpose(1, 2)
        .flatten(0, 1)
        .float()
        .repeat_interleave(q.shape[1] // HKV, 1)
        for c in pool(dim)
    )
    j = torch.arange(len(k), device=DEVICE)[None]
    seen = j <= positions[:, None]
    if window:
        seen &= j > positions[:, None] - window
    s = torch.einsum("nhd,shd->hns", q.float(), k) * dim**-0.5
    return torch.einsum("hns,shd->nhd", s.masked_fill(~seen, float("-inf")).softmax(-1), v).flatten(
        1
    )
