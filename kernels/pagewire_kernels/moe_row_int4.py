"""One row through experts with codes of 4 bits: gate and up of each chosen expert, and the sum of
their results with the residual, by the products of gemm_row_int4.py.

The second product is one sum over the inner dimensions of all chosen experts, cut at each of them;
its programs read the choice and their first words before they wait, as those of moe_rows.py do.
"""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import gemm_row_int4
from .gemm_row_int4 import GROUPS, MULTIPROCESSORS, Int4RowConfig
from .packed_matrix import PackedExperts
from .quantized_decode import INT4, TILE, offsets
from .row_epilogue import finish
from .row_int4_loop import read_step, sum_of_parts, sums_of
from .row_int4_products import TYPES, assembly, in_columns, rows_of
from .workspace import counters, overlap

SMALL_INNER: Final = 2048
SMALL_CHUNKS: Final = 4
"""Of gate and up whose inner dimension is SMALL_INNER at most: their splits have two steps."""
PROGRAMS: Final = 7
"""Of the second product for each multiprocessor, at most; with one split there may be more."""


@triton.jit
def _experts_row(x, words, scales, factors, top_k_ids, top_k_weights, residual, out, part, arrived, N, NP, span, K: tl.constexpr,
        CHUNKS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr,
        TOP_K: tl.constexpr, ASM: tl.constexpr, SUM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """64 results of a chosen expert, or its share of 64 sums, over chunks split * span to (split + 1)
    * span of 64 inputs. GATED: of gate and of up, for one x; else x has a row for each place."""
    HALVES: tl.constexpr = 2 if GATED else 1
    PARTS: tl.constexpr = SPLITS if GATED else SPLITS * TOP_K
    strip = tl.program_id(0)
    split = tl.program_id(1)
    place = tl.program_id(2)
    if PDL and GATED:
        # the kernel before made the choice
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(top_k_ids + place)
    if GATED:  # noqa: SIM102  # known when compiled
        if expert < 0:
            return
    start = split * span
    # a place without an expert adds nothing
    end = tl.where(expert < 0, start, tl.minimum(start + span, K // 64))
    first = tl.maximum(expert, 0).to(tl.int64) * HALVES
    each = NP.to(tl.int64)
    lane = tl.arange(0, 128)[:, None] % 32 + tl.zeros([1, CHUNKS], tl.int32)
    columns = in_columns(lane)
    order = tl.permute(offsets(strip, K, 64, CHUNKS * 64, "int4"), [1, 0, 2])
    pointers = words + first * each * (K // 8) + order
    own_scales = scales + first * each * (K // GROUP)
    strip1 = (pointers, own_scales, strip)
    strip2 = strip1
    read1 = read_step(strip1, start, end, NP, K, CHUNKS, GROUP, EVEN)
    read2 = read1
    if GATED:
        strip2 = (pointers + each * (K // 8), own_scales + each * (K // GROUP), strip)
        read2 = read_step(strip2, start, end, NP, K, CHUNKS, GROUP, EVEN)
    if PDL and not GATED:
        gdc_wait()
        gdc_launch_dependents()
    row = x
    if not GATED:
        row = x + place * K
    upper, lower, upper2, lower2, _ = sums_of(
        row, row, 0, strip1, strip2, read1, read2, lane, columns, start, end, NP, K, CHUNKS, GROUP, EVEN,
        GATED, False, False, ASM, SUM, ""
    )  # fmt: skip
    result = rows_of(upper, lower) * tl.load(factors + first)
    result2 = result
    if GATED:
        result2 = rows_of(upper2, lower2) * tl.load(factors + first + 1)
    else:
        result *= tl.load(top_k_weights + place, mask=expert >= 0, other=0.0)
    n = strip * 64 + tl.arange(0, 64)
    to = out
    count = strip
    if GATED:
        to = out + place * N
        count += place * tl.num_programs(0)
    last = True
    if PARTS > 1:
        parts = part
        number = split
        if GATED:
            parts = part + place.to(tl.int64) * (PARTS * HALVES) * each
        else:
            number += place * SPLITS
        tl.store(parts + number * each + n, result)
        if GATED:
            tl.store(parts + (PARTS + number) * each + n, result2)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + count, 1) == PARTS - 1
        if last:
            tl.store(arrived + count, 0)
            result = sum_of_parts(parts, n, each, PARTS)
            if GATED:
                result2 = sum_of_parts(parts + PARTS * each, n, each, PARTS)
    if last:
        finish(result, result2, 1.0, None, residual, to, n, N, False, GATED, False, not GATED)


def takes(x: Tensor, gate_up: PackedExperts, down: PackedExperts) -> bool:
    """Whether these are the matrices, and x the row, of these products."""
    return len(x) == 1 and all(
        experts.form == INT4 and experts.group in GROUPS for experts in (gate_up, down)
    )


@functools.cache
def pick_up(n: int, k: int, top_k: int, group: int) -> Int4RowConfig:
    """The launch shape of gate and up of `top_k` experts: short splits where the inner dimension is
    small, else that of one product with all their rows.

    H200, 2026-11-30, groups of 128, us of both products by (chunks, splits) of this one:
    Qwen3-30B-A3B (2, 8) 12.3, (4, 4) 12.4, which is chosen, (8, 2) 13.4, (4, 2) 14.7; Mixtral 8x7B
    (8, 1) 60.1, (2, 4) 60.2, (2, 8) 60.7, which is chosen, (4, 4) 63.0."""
    steps = k // 64 // SMALL_CHUNKS
    if k <= SMALL_INNER and k % (128 * SMALL_CHUNKS) == 0:
        return Int4RowConfig(2, SMALL_CHUNKS, steps // 2, early=True)
    return gemm_row_int4.pick_config(n * top_k, k, True, False, group)


@functools.cache
def pick_down(n: int, k: int, top_k: int) -> Int4RowConfig:
    """The launch shape of the sums of `top_k` experts, whose splits are those of each: parts of the
    inner dimension as short as PROGRAMS allows, equal ones first, then larger steps.

    More programs are better than a multiprocessor holds at a time. H200, 2026-11-30, groups of 128,
    us of both products by (chunks, splits) of this one: Qwen3-30B-A3B (n 2,048, k 768, 8 experts)
    (4, 3) 13.4, which is chosen, (2, 3) 14.2, (4, 2) 15.1, (8, 1) 15.8, (4, 1) 17.4; Mixtral 8x7B
    (n 4,096, k 14,336, 2 experts) (4, 14) 60.6, (8, 7) 60.9, which is chosen, (4, 8) 62.3, (8, 4)
    64.5, (8, 2) 68.6."""
    most = max(1, MULTIPROCESSORS * PROGRAMS // (triton.cdiv(n, TILE) * top_k))
    ranks: dict[tuple[bool, int, int], Int4RowConfig] = {}
    for chunks in [c for c in (8, 4, 2) if k // 64 % c == 0] or [4]:
        steps = triton.cdiv(k // 64, chunks)
        span = triton.cdiv(steps, most)
        splits = triton.cdiv(steps, span)
        rank = (steps % span == 0, -span * chunks, chunks)
        ranks[rank] = Int4RowConfig(1, chunks, splits, early=True)
    return ranks[max(ranks)]


def experts_of_row(
    x: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    top_k_ids: Tensor,
    top_k_weights: Tensor,
    residual: Tensor,
    up_config: Int4RowConfig | None = None,
    down_config: Int4RowConfig | None = None,
) -> Tensor:
    """moe_quantized.experts of one row, plus residual [1, H]. Ids are int32 [1, k]; both they and
    the weights are contiguous, and were written before the kernel before these."""
    top_k = top_k_ids.shape[1]
    inner = torch.empty(top_k, gate_up.shape[0], dtype=x.dtype, device=x.device)
    out = torch.empty_like(residual)
    up = up_config or pick_up(*gate_up.shape, top_k, gate_up.group)
    _launch(x, gate_up, top_k_ids, top_k_weights, None, inner, up)
    sums = down_config or pick_down(*down.shape, top_k)
    _launch(inner, down, top_k_ids, top_k_weights, residual, out, sums)
    return out


def _launch(
    x: Tensor,
    weight: PackedExperts,
    top_k_ids: Tensor,
    top_k_weights: Tensor,
    residual: Tensor | None,
    out: Tensor,
    c: Int4RowConfig,
) -> None:
    n, k = weight.shape
    top_k = top_k_ids.shape[1]
    gated = residual is None
    tiles = triton.cdiv(n, TILE)
    chunks = max(c.chunks, weight.group // 64)
    steps = triton.cdiv(k // 64, chunks)
    span = triton.cdiv(steps, c.splits) * chunks
    splits = triton.cdiv(k // 64, span)
    asm = ("", "", "")
    if gemm_row_int4.has_instructions(x.device) and x.dtype in TYPES:
        asm = assembly(x.dtype)
    part = out
    if splits > 1 or not gated:
        parts = splits * top_k * weight.halves
        part = torch.empty(parts * weight.padded, dtype=torch.float32, device=x.device)
    purpose = "experts of a row, up" if gated else "experts of a row, down"
    _experts_row[(tiles, splits, top_k)](
        x, weight.words, weight.scales, weight.factors, top_k_ids, top_k_weights, residual, out, part,
        counters(x.device, purpose, tiles * top_k), n, weight.padded, span, K=k, CHUNKS=chunks, GROUP=weight.group, GATED=gated,
        EVEN=k // 64 % chunks == 0, SPLITS=splits, TOP_K=top_k, ASM=asm[0], SUM=asm[1], num_warps=c.warps,
        **overlap(x.device))  # fmt: skip
