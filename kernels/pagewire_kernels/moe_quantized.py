"""A mixture of experts whose matrices are codes of 4 or 8 bits: the grouped products of
moe_grouped.py with the decoding of gemm_quantized.py. Weight rows fill the 64 rows of the tensor
cores' product, so that one kernel serves any number of tokens.

A few tokens are not sorted: each pair of token and expert is a tile of one row.
"""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
from dataclasses import dataclass, replace
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import moe_shapes
from .gemm_quantized import add_product, asm_of
from .moe_grouped import combine
from .moe_router import Aligned, align
from .packed_matrix import PackedExperts
from .quantized_decode import EIGHT_BITS, TILE, offsets, words_a_step
from .shapes import Candidate, Choice
from .table_lookup import table_of, tables_of, unit_of
from .workspace import overlap


@dataclass(frozen=True)
class ExpertsConfig:
    """Launch shape of a product, as quantized_shapes.QuantizedConfig. late: see there."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    late: bool


FEW_ROWS: Final = ((8, 16, 4), (20, 32, 3), (48, 64, 3))
"""(most rows an expert on average, block_m, stages)."""
MOST_LATE: Final = 32
"""Rows of a tile up to which sums are scaled instead of weights."""


@triton.jit
def _grouped_quantized(x, words, table, scales, row_scale, factors, unit, out, order, tiles, slots, x_stride, N, NP, K: tl.constexpr,
                       HALVES: tl.constexpr, TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                       GROUP: tl.constexpr, FORM: tl.constexpr, REST: tl.constexpr, LATE: tl.constexpr, ASM: tl.constexpr,
                       PAIRS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """TOP_K 0: the second product, whose rows of x are in order. PAIRS: not sorted, and `tiles` has
    the expert of each pair. unit: times all sums, beside the factors."""
    DT: tl.constexpr = tl.float32 if ASM == "" else x.dtype.element_ty
    PART: tl.constexpr = GROUP if LATE and GROUP < BK else BK
    WORDS: tl.constexpr = K // 4 if FORM == "byte" or FORM == "fp8" else K // 8
    tile = tl.program_id(0)
    slot = tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    if PDL:
        gdc_wait()
    expert = tl.load(tiles + slot).to(tl.int64)
    if expert < 0:
        return
    if PAIRS:
        row = slot + tl.arange(0, BM)
        valid = row < slot + 1
        source = row
    else:
        row = tl.load(tiles + slots + slot) + tl.arange(0, BM)
        valid = row < tl.load(tiles + 2 * slots + slot)
        source = row
        if TOP_K > 0:
            source = tl.load(order + row, mask=valid, other=0)
    if TOP_K > 0:
        source = source // TOP_K
    row_start = source.to(tl.int64) * x_stride
    first = expert * HALVES
    each = NP.to(tl.int64)
    pointers = words + first * each * WORDS + offsets(tile, K, BN, PART, FORM)
    tables = table
    up_tables = table
    if FORM == "row tables":
        own = table + first * each * 16
        tables = tables_of(own, tile, BN, FORM, DT, ASM)
        up_tables = tables_of(own + (HALVES - 1) * each * 16, tile, BN, FORM, DT, ASM)
    elif FORM != "int4" and FORM != "byte" and FORM != "fp8":
        tables = tables_of(table, tile, BN, FORM, DT, ASM)
        up_tables = tables
    scale_at = scales
    if GROUP > 0:
        scale_at = scales + first * each * (K // GROUP)
    acc = tl.zeros([BN, BM], tl.float32)
    acc_up = tl.zeros([BN, BM], tl.float32)
    for step in tl.range(0, K // BK, num_stages=STAGES):
        for piece in tl.static_range(BK // PART):
            at = step * (BK // PART) + piece
            w = tl.load(pointers + at * words_a_step(PART, FORM))
            k = at * PART + tl.arange(0, PART)
            rows = tl.load(x + row_start[None, :] + k[:, None], mask=valid[None, :], other=0.0)
            rows = rows.to(DT)
            acc = add_product(
                acc,
                w,
                rows,
                tables,
                scale_at,
                n,
                at,
                NP,
                BN,
                PART,
                GROUP,
                FORM,
                REST,
                LATE,
                DT,
                ASM,
            )
            if HALVES == 2:
                w = tl.load(pointers + each * WORDS + at * words_a_step(PART, FORM))
                up_scales = scale_at
                if GROUP > 0:
                    up_scales = scale_at + each * (K // GROUP)
                acc_up = add_product(
                    acc_up, w, rows, up_tables, up_scales, n, at, NP, BN, PART, GROUP, FORM, REST, LATE, DT, ASM
                )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    acc *= tl.load(factors + first) * unit
    if GROUP == 0:
        acc *= tl.load(row_scale + first * each + n)[:, None]
    if HALVES == 2:
        acc_up *= tl.load(factors + first + 1) * unit
        if GROUP == 0:
            acc_up *= tl.load(row_scale + (first + 1) * each + n)[:, None]
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    tl.store(
        out + row.to(tl.int64)[None, :] * N + n[:, None],
        acc.to(out.dtype.element_ty),
        mask=valid[None, :] & (n < N)[:, None],
    )


def experts(
    x: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    top_k_ids: Tensor,
    top_k_weights: Tensor,
    config: ExpertsConfig | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As moe.experts: x [T, H] -> [T, H]; gate_up: halves [I, H], down: [H, I]. config: the launch
    shape of both products, with block_k as the matrices allow it. residual [T, H]: is added."""
    tokens, k = top_k_ids.shape
    if tokens == 0:
        return torch.empty_like(x)
    top_k_ids = top_k_ids.int().contiguous()
    top_k_weights = top_k_weights.contiguous()
    rows_per_expert = tokens * k / len(gate_up)
    unsorted = tokens <= moe_shapes.MAX_ROWS and (
        tokens == 1 or rows_per_expert <= moe_shapes.MAX_SHARED
    )
    block_m = config.block_m if config else _block_m(rows_per_expert, gate_up)
    aligned = _as_they_are(top_k_ids) if unsorted else align(top_k_ids, len(gate_up), block_m)
    inner = torch.empty(tokens * k, gate_up.shape[0], dtype=x.dtype, device=x.device)
    _launch(x, gate_up, inner, aligned, k, config or pick_config(rows_per_expert, gate_up))
    rows = torch.empty(tokens * k, down.shape[0], dtype=x.dtype, device=x.device)
    _launch(inner, down, rows, aligned, 0, config or pick_config(rows_per_expert, down))
    return combine(rows, aligned, top_k_ids, top_k_weights, residual)


def _as_they_are(top_k_ids: Tensor) -> Aligned:
    """Pairs [T, k] int32 without an order: block_m 0."""
    pairs = top_k_ids.numel()
    numbers = _numbers(top_k_ids.device)[:pairs]
    return Aligned(numbers, numbers, numbers, top_k_ids.view(1, pairs), 0)


@functools.cache
def _numbers(device: torch.device) -> Tensor:
    """0, 1, 2 ..., made before any graph is captured."""
    return torch.arange(4096, dtype=torch.int32, device=device)


def _launch(
    x: Tensor, weight: PackedExperts, out: Tensor, aligned: Aligned, top_k: int, best: ExpertsConfig
) -> None:
    n, k = weight.shape
    whole_zeros = bool(weight.group) and not weight.rest

    def run(c: ExpertsConfig) -> None:
        late = c.late and (weight.rounds_table or (whole_zeros and weight.group % c.block_k == 0))
        asm = asm_of(weight.form, x.dtype, x.device)
        table = table_of(weight.table, weight.form, asm, x.dtype)
        _grouped_quantized[(weight.padded // c.block_n, aligned.slots)](
            x, weight.words, table, weight.scales, weight.row_scale, weight.factors, unit_of(weight.form, asm), out,
            aligned.order, aligned.tiles, aligned.slots, x.stride(0), n, weight.padded, K=k, HALVES=weight.halves, TOP_K=top_k,
            BM=c.block_m, BN=c.block_n, BK=c.block_k, GROUP=weight.group, FORM=weight.form, REST=weight.rest, LATE=late, ASM=asm,
            PAIRS=aligned.block_m == 0, STAGES=c.stages, num_warps=c.warps, **overlap(x.device))  # fmt: skip

    choose(best, weight.form, x.element_size(), weight.halves).launch(x.device, run)


def _block_m(rows_per_expert: float, weight: PackedExperts) -> int:
    largest = 128 if weight.table is None else 64
    return next((block for most, block, _ in FEW_ROWS if rows_per_expert <= most), largest)


def pick_config(rows_per_expert: float, weight: PackedExperts) -> ExpertsConfig:
    """The launch shape with so many rows an expert on average; measured on an H100
    (docs/performance.md)."""
    block_k = 128 if weight.shape[1] % 128 == 0 else 64
    block_m = _block_m(rows_per_expert, weight)
    stages = next((stages for most, _, stages in FEW_ROWS if rows_per_expert <= most), 3)
    if block_m <= MOST_LATE:
        return ExpertsConfig(block_m, TILE, block_k, 4, stages, late=True)
    if weight.rounds_table:
        return ExpertsConfig(block_m, TILE, TILE, 4, stages, late=True)
    if weight.halves == 2 or block_m < 128:
        return ExpertsConfig(block_m, TILE, 64, 4, stages, late=False)
    return ExpertsConfig(block_m, 128, 64, 8, stages, late=False)


def shared_bytes(config: ExpertsConfig, form: str, itemsize: int, halves: int) -> int:
    """Of shared memory: codes, rows of x and scales of the steps under way."""
    codes = config.block_n * config.block_k // (1 if form in EIGHT_BITS else 2)
    rows = config.block_m * config.block_k * itemsize
    return config.stages * (halves * (codes + 8 * config.block_n) + rows)


@functools.cache
def choose(best: ExpertsConfig, form: str, itemsize: int, halves: int) -> Choice[ExpertsConfig]:
    """`best`, then with fewer steps under way, and last with shorter ones; block_m stays, since the
    tiles are made for it."""
    shapes = [replace(best, stages=stages) for stages in range(best.stages, 1, -1)]
    shapes.append(replace(best, block_n=TILE, block_k=64, warps=4, stages=2))
    candidates = tuple(
        Candidate(shape, shared_bytes(shape, form, itemsize, halves))
        for shape in dict.fromkeys(shapes)
    )
    return Choice(
        f"quantized product of experts ({form}, {best.block_m} rows, {itemsize} bytes an element of x)",
        candidates,
    )
