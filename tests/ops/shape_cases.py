"""Each kernel whose launch shape depends on the card, against plain torch in float64, over fresh
random inputs and poisoned outputs.

For Triton's interpreter with small inputs, and for a GPU that pretends to be a smaller one.
`shapes.pretend` around a call decides.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from ops.triton_cases import error, grouped, paged
from pagewire_kernels import attention_prefill, cascade, decode_shapes, gemm, reference, sampling
from pagewire_kernels.attention_decode import decode_attention
from pagewire_kernels.attention_prefill import prefill_attention
from pagewire_kernels.batch import Batch
from pagewire_kernels.cascade import cascade_attention
from pagewire_kernels.sampling import SamplingRows, thresholds
from torch import Tensor

BOUNDS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
"""Relative norm of the difference: a few times what rounding inputs of the second product, and
results, to the type makes."""
HKV, GROUP, PAGE = 2, 4, 16


@dataclass(frozen=True)
class Scale:
    """Tokens of requests, new and in all; a product's sizes."""

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    common: int
    rows: int
    n: int
    k: int
    vocab: int


SMALL = Scale((1, 19, 5), (1, 40, 70), 32, 5, 128, 1024, 3000)
LARGE = Scale((1, 37, 5, 64, 17, 300), (1, 37, 700, 64, 900, 1500), 512, 24, 1024, 4096, 50_000)


@dataclass(frozen=True)
class Place:
    device: torch.device
    dtype: torch.dtype
    dim: int
    scale: Scale

    def paged(self, counts: list[int], lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Batch]:
        seed = int(torch.randint(1 << 30, ()))
        q, k, v, batch = paged(counts, lengths, HKV, GROUP, self.dim, PAGE, seed, self.dtype)
        names = ("positions", "slot_mapping", "query_start", "seq_lens", "block_tables")
        moved = replace(batch, **{name: getattr(batch, name).to(self.device) for name in names})
        return q.to(self.device), k.to(self.device), v.to(self.device), moved

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.dtype).to(self.device)


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    return reference.paged_attention(q.double(), k.double(), v.double(), batch, scale, window, cap)


def poisoned(q: Tensor) -> Tensor:
    return torch.full_like(q.flatten(1), float("nan"))


def prefill(place: Place) -> tuple[Any, float]:
    """(launch shape, worst error)"""
    worst = 0.0
    for window, cap in ((None, None), (33, 20.0)):
        q, k, v, batch = place.paged(list(place.scale.counts), list(place.scale.lengths))
        args, scale = (
            (q, k, v, batch.block_tables, batch.seq_lens, batch.query_start),
            place.dim**-0.5,
        )
        out = prefill_attention(*args, scale, window, cap, out=poisoned(q))
        worst = max(worst, error(out, exact(q, k, v, batch, scale, window, cap)))
    return attention_prefill.choose(place.dim, place.dtype.itemsize, place.dtype.itemsize).first(
        place.device
    ), worst


def decode(place: Place) -> tuple[Any, float]:
    """In batches whose rows are split in several ways."""
    worst, lengths = 0.0, [length + 1 for length in place.scale.lengths]
    for window, cap in ((None, None), (33, 20.0)):
        q, k, v, batch = place.paged([1] * len(lengths), lengths)
        out, scale = poisoned(q), place.dim**-0.5
        decode_attention(q, k, v, batch.block_tables, batch.seq_lens, scale, window, cap, out=out)
        worst = max(worst, error(out, exact(q, k, v, batch, scale, window, cap)))
    return decode_shapes.choose(
        place.dim, GROUP, len(lengths) * HKV, place.dtype.itemsize, place.dtype.itemsize
    ).first(place.device), worst


def common(place: Place) -> tuple[Any, float]:
    rows, shared = place.scale.rows, place.scale.common
    q, k, v, batch = place.paged([1] * rows, [shared + 1 + 7 * i for i in range(rows)])
    batch.block_tables[1:-1, : shared // PAGE] = batch.block_tables[0, : shared // PAGE]
    groups = grouped([list(range(rows - 1))], [shared], rows, 1)
    for name in ("order", "starts", "lengths", "shared"):
        setattr(groups, name, getattr(groups, name).to(place.device))
    scale, out = place.dim**-0.5, poisoned(q)
    cascade_attention(q, k, v, batch.block_tables, batch.seq_lens, groups, scale, 20.0, out=out)
    return cascade.choose(place.dim, place.dtype.itemsize, place.dtype.itemsize).first(
        place.device
    ), error(out, exact(q, k, v, batch, scale, None, 20.0))


def skinny(place: Place) -> tuple[Any, float]:
    worst, n, k = 0.0, place.scale.n, place.scale.k
    for rows in (1, 5):
        x, weight, bias = place.random(rows, k), place.random(n, k), place.random(n)
        gemm.skinny_linear(x, weight, bias).fill_(float("nan"))
        out = gemm.skinny_linear(x, weight, bias)
        worst = max(worst, error(out, x.double() @ weight.double().T + bias.double()))
    best = gemm.pick_config(5, n, k)
    assert best is not None
    return gemm.choose(best, 5, place.dtype.itemsize).first(place.device), worst


def search(place: Place) -> tuple[Any, float]:
    """The error is the share of rows in which another number of tokens is kept than asked for."""
    counts = [1, 5, 40, place.scale.vocab // 2]
    logits = (
        torch.stack([torch.randperm(place.scale.vocab) for _ in counts]).float() % 256 / 8
    )  # exact in every type, with ties
    ids = torch.zeros(len(counts), dtype=torch.int64, device=place.device)
    least = thresholds(
        logits.to(place.dtype).to(place.device), SamplingRows.named(ids, ids, top_k=counts)
    ).cpu()
    wanted = torch.stack(
        [
            row.sort(descending=True).values[count - 1]
            for row, count in zip(logits, counts, strict=True)
        ]
    )
    wrong = (
        ((logits >= least[:, None]) != (logits >= wanted[:, None])).any(1).double().mean().item()
    )
    return sampling.choose_block(place.dtype.itemsize).first(place.device), wrong


KERNELS: dict[str, Callable[[Place], tuple[Any, float]]] = {
    "prefill": prefill,
    "decode": decode,
    "common blocks": common,
    "skinny": skinny,
    "search": search,
}
BY_HEAD_SIZE = ("prefill", "decode", "common blocks")
