"""x @ weight^T for a handful of rows, memory-bound: the weights are read once, by enough programs
to keep the memory busy.

The weight rows fill the M side of the tile and the few rows of x the other (for one row: plain
multiply and add in float32). The inner dimension may be cut into splits; the split that finishes
last adds the partial sums in a fixed order, so results do not depend on timing. Where cuBLAS is as
fast, `linear` leaves the work to it.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
from dataclasses import dataclass, replace
from typing import Final

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .gemm_cublaslt import GemmAlgorithms
from .shapes import Candidate, Choice
from .workspace import counters, overlap

MAX_ROWS = 8
PADDED_ROWS: Final = 16
"""The least that a product by tensor cores has."""


@dataclass(frozen=True)
class SkinnyConfig:
    """Launch shape. block_n: weight rows a program; block_k: inner elements a step; splits:
    programs sharing a row."""

    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int


@triton.jit
def _dot_rows(x, weight, n, lo, hi, x_stride, N, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
        EVEN: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """float32 [BN, MP]: weight rows n times the rows of x, over inner elements lo..hi."""
    m = tl.arange(0, MP)
    acc = tl.zeros([BN, MP], tl.float32)
    for start in tl.range(lo, hi, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        if EVEN:
            w = tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :])
            rows = tl.load(x + m[None, :] * x_stride + k[:, None], mask=(m < M)[None, :], other=0.0)
        else:
            w = tl.load(
                weight + n.to(tl.int64)[:, None] * K + k[None, :],
                mask=(n < N)[:, None] & (k < hi)[None, :],
                other=0.0,
            )
            rows = tl.load(
                x + m[None, :] * x_stride + k[:, None],
                mask=(m < M)[None, :] & (k < hi)[:, None],
                other=0.0,
            )
        acc = tl.dot(w, rows, acc, input_precision="ieee")
    return acc


@triton.jit
def _dot_one(x, weight, n, lo, hi, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
        PDL: tl.constexpr):  # fmt: skip
    """float32 [BN, 1]: weight rows n times the one row of x, over inner elements lo..hi.

    The first weights, which no other kernel writes, are asked for before the wait for x. Short
    products let the next kernel in at once.
    """
    k = lo + tl.arange(0, BK)
    w = tl.load(
        weight + n.to(tl.int64)[:, None] * K + k[None, :],
        mask=(n < N)[:, None] & (k < hi)[None, :],
        other=0.0,
    )
    if PDL:
        gdc_wait()
        if K <= 3072:
            gdc_launch_dependents()
    row = tl.load(x + k, mask=k < hi, other=0.0)
    acc = w.to(tl.float32) * row.to(tl.float32)[None, :]
    for start in tl.range(lo + BK, hi, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        if EVEN:
            w = tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :])
            row = tl.load(x + k)
        else:
            w = tl.load(
                weight + n.to(tl.int64)[:, None] * K + k[None, :],
                mask=(n < N)[:, None] & (k < hi)[None, :],
                other=0.0,
            )
            row = tl.load(x + k, mask=k < hi, other=0.0)
        acc += w.to(tl.float32) * row.to(tl.float32)[None, :]
    return tl.sum(acc, 1)[:, None]


@triton.jit
def _skinny(x, weight, bias, out, part, arrived, x_stride, N, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr,
        BK: tl.constexpr,
            SPLITS: tl.constexpr, SPAN: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    m = tl.arange(0, MP)
    lo = split * SPAN
    hi = tl.minimum(lo + SPAN, K)
    if MP == 1:
        acc = _dot_one(x, weight, n, lo, hi, N, K, BN, BK, EVEN, STAGES, PDL)
    else:
        if PDL:
            gdc_wait()
        acc = _dot_rows(x, weight, n, lo, hi, x_stride, N, K, M, MP, BN, BK, EVEN, STAGES)
    if PDL:
        gdc_launch_dependents()
    last = True
    if SPLITS > 1:
        at = n[:, None] * MP + m[None, :]
        tl.store(part + split.to(tl.int64) * N * MP + at, acc, mask=(n < N)[:, None])
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1) == SPLITS - 1
        if last:
            tl.store(arrived + tile, 0)
            acc = tl.zeros([BN, MP], tl.float32)
            for s in tl.static_range(SPLITS):
                acc += tl.load(
                    part + s * N * MP + at, mask=(n < N)[:, None], other=0.0, cache_modifier=".cg"
                )
    if last:
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(
            out + m[None, :] * N + n[:, None],
            acc.to(out.dtype.element_ty),
            mask=(n < N)[:, None] & (m < M)[None, :],
        )


def pick_config(rows: int, n: int, k: int) -> SkinnyConfig | None:
    """The launch shape where it beats cuBLAS on an H200 (docs/performance.md), else None."""
    if rows > MAX_ROWS or k % 1024 or n % 64:
        return None
    if rows > 1:
        splits = 4 if n <= 4096 and k >= 2048 else 1
        return SkinnyConfig(64, 128, splits, 4, 5) if n * k < 3e7 else None
    if k > 8192:
        return SkinnyConfig(8, 512, 1, 4, 3)
    if n >= 16384 or k in (2048, 3072):
        return SkinnyConfig(4, 1024, 1, 4, 3)
    return SkinnyConfig(4, 512, 1, 1, 4)


def _padded(rows: int) -> int:
    return 1 if rows == 1 else PADDED_ROWS


def shared_bytes(config: SkinnyConfig, rows: int, itemsize: int) -> int:
    """Of shared memory: weights and rows of the steps under way. Hopper's `wgmma` keeps one step
    more, for which there is room."""
    return itemsize * (config.stages - 1) * config.block_k * (config.block_n + _padded(rows))


@functools.cache
def choose(best: SkinnyConfig, rows: int, itemsize: int) -> Choice[SkinnyConfig]:
    """`best`, then with fewer steps under way; the splits stay the same."""
    shapes = [
        replace(best, stages=stages) for stages in (best.stages, 3, 2) if stages <= best.stages
    ]
    candidates = tuple(
        Candidate(shape, shared_bytes(shape, rows, itemsize)) for shape in dict.fromkeys(shapes)
    )
    return Choice(
        f"skinny product ({best.block_n} x {best.block_k}, {itemsize} bytes an element)", candidates
    )


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    config: SkinnyConfig | None = None,
) -> torch.Tensor:
    """x [M, K] with M <= 8, weight [N, K] contiguous, bias [N] or None -> [M, N] in x's dtype."""
    (rows, k), n = x.shape, weight.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows of x, and this kernel takes at most {MAX_ROWS}; use linear")
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    launch = functools.partial(_launch, x, weight, bias, out)
    if config is not None:
        launch(config)
    else:
        best = pick_config(rows, n, k) or SkinnyConfig(
            block_n=32, block_k=128, splits=2, warps=4, stages=4
        )
        choose(best, rows, x.element_size()).launch(x.device, launch)
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    c: SkinnyConfig,
) -> None:
    (rows, k), n = x.shape, weight.shape[0]
    span = triton.cdiv(triton.cdiv(k, c.splits), c.block_k) * c.block_k
    splits = triton.cdiv(k, span)
    padded = _padded(rows)
    part = (
        torch.empty(splits * n * padded, dtype=torch.float32, device=x.device)
        if splits > 1
        else out
    )
    tiles = triton.cdiv(n, c.block_n)
    _skinny[(tiles, splits)](
        x, weight, bias, out, part, counters(x.device, "skinny gemm", tiles), x.stride(0), n, K=k, M=rows, MP=padded, BN=c.block_n,
        BK=c.block_k, SPLITS=splits,
        SPAN=span, EVEN=k % c.block_k == 0 and n % c.block_n == 0, BIAS=bias is not None, STAGES=c.stages, num_warps=c.warps,
        **overlap(x.device))  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    algorithms: GemmAlgorithms | None = None,
) -> torch.Tensor:
    """x [M, K] @ weight [N, K]^T + bias: by the kernel here where it is the faster one, else by
    cuBLAS, with the algorithm for the shape where `algorithms` has one."""
    if pick_config(x.shape[0], weight.shape[0], x.shape[1]) is not None:
        return skinny_linear(x, weight, bias)
    out = None
    if bias is None and algorithms is not None:
        out = algorithms.matmul(x, weight)
    return torch.nn.functional.linear(x, weight, bias) if out is None else out
