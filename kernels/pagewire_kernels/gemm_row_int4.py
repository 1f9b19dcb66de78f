"""The products of gemm_row.py with codes of 4 bits.

A program has one strip of 64 weight rows, or two, and a part of the inner dimension. A thread reads
16 bytes of a strip at once, straight into registers and a step ahead of their use; each word of 8
codes is its operand of one `mma.m16n8k16` (quantized_decode.py). The 32 lanes of a warp hold one pair
each of the 64 inputs of a chunk, as memory has them, which is one read; lane 4 * c + t has its pair in
column c of the other operand. So of the eight columns two count for each word, one for each half of
its inputs, and the others are zeros there: a mask a half. The sum of a row is that of its columns.
A word costs seven instructions of decoding, two masks and one product.

Codes are multiplied as they are decoded, with an offset. It is taken from the sums together with
the zero point, (sum of code * x) - (offset + zero) * (sum of x), and sums are then scaled: both are
float32, and zero points need not be whole numbers. The sum of x is a product too, with ones.
"""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .packed_matrix import PackedMatrix
from .quantized_decode import TILE, offsets
from .row_epilogue import finish
from .row_int4_loop import read_step, sum_of_parts, sums_of
from .row_int4_products import TYPES, assembly, in_columns, norm_factor, rows_of, unit_of
from .workspace import counters, overlap

GROUPS: Final = (32, 64, 128)
"""Inputs that may share a scale."""
MULTIPROCESSORS: Final = 132
RESIDENT: Final = {
    ("gated", 8): 2,
    ("gated", 2): 6,
    ("norm", 8): 3,
    ("plain", 8): 4,
    ("plain", 16): 2,
    ("pair", 8): 2,
}
"""Programs a multiprocessor holds, as far as registers go, by what they do (pair: two strips without
a gate) and the chunks of a step."""
RESIDENT_OF_SMALL_GROUPS: Final = {
    ("gated", 4): 3,
    ("gated", 2): 5,
    ("norm", 8): 3,
    ("plain", 8): 3,
    ("plain", 4): 7,
    ("pair", 4): 3,
}
"""The same of groups under 128, with more scales a step."""
MOST_SPLITS: Final = 14
SMALL: Final = 2
"""Chunks of the steps whose programs take so few registers that several rounds of them do no harm."""
LEAST_SMALL_STEPS: Final = 4
"""Of those, a split."""
ODD: Final = 0.92
"""What an odd number of such steps does to the speed, and"""
LARGE_STEPS: Final = 0.97
"""what steps of more chunks do, with gate and up."""


@dataclass(frozen=True)
class Int4RowConfig:
    """Launch shape. strips: of 64 weight rows a program, 1 or 2 (with gate and up always one of
    each); chunks: of 64 inputs a step, a power of two; splits: programs that share a result. early:
    the next kernel's programs are let in at once."""

    strips: int
    chunks: int
    splits: int
    warps: int = 4
    early: bool = False


@triton.jit
def _row_int4(x, norm, words, scales, bias, residual, out, part, squares, arrived, N, NP, eps, factor, span,
        K: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
        PAIR: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr,
        ASM: tl.constexpr, SUM: tl.constexpr, TIMES: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Chunks split * span to (split + 1) * span of 64 inputs. GATED: the second strip is that of up;
    else PAIR: the next one. The first words are asked for before the wait for x, and what a step
    reads while the one before it is computed. In bfloat16 the squares of x are summed on the way, and
    squares has those of each program."""
    DT: tl.constexpr = x.dtype.element_ty
    TWO: tl.constexpr = GATED or PAIR
    # float16 has no range for x without its factor, which must be known before
    ON_THE_WAY: tl.constexpr = NORM and ASM != "" and tl.bfloat16 == DT
    strip = tl.program_id(0) * (2 if PAIR else 1)
    second = strip + (N // 64 if GATED else 1)
    split = tl.program_id(1)
    start = split * span
    end = tl.minimum(start + span, K // 64)
    lane = tl.arange(0, 128)[:, None] % 32 + tl.zeros([1, CHUNKS], tl.int32)
    columns = in_columns(lane)
    # threads before chunks: so that Triton spreads threads over a warp, and leaves chunks to each
    order = tl.permute(offsets(strip, K, 64, CHUNKS * 64, "int4"), [1, 0, 2])
    order2 = tl.permute(offsets(second, K, 64, CHUNKS * 64, "int4"), [1, 0, 2])
    strip1 = (words + order, scales, strip)
    strip2 = (words + order2, scales, second)
    read1 = read_step(strip1, start, end, NP, K, CHUNKS, GROUP, EVEN)
    read2 = read1
    if TWO:
        read2 = read_step(strip2, start, end, NP, K, CHUNKS, GROUP, EVEN)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    scale = 1.0
    unit_pair = 0
    if NORM and not ON_THE_WAY:
        scale = norm_factor(x, eps, K, 2048 if K > 1024 else 1024)
        if ASM != "":
            unit, unit_pair = unit_of(scale, DT)
            scale = scale / unit
    upper, lower, upper2, lower2, total = sums_of(
        x, norm, unit_pair, strip1, strip2, read1, read2, lane, columns, start, end, NP, K, CHUNKS, GROUP,
        EVEN, TWO, NORM, ON_THE_WAY, ASM, SUM, TIMES
    )  # fmt: skip
    if PDL and not EARLY:
        gdc_launch_dependents()
    result = rows_of(upper, lower) * factor
    result2 = result
    if TWO:
        result2 = rows_of(upper2, lower2) * factor
    square = 0.0
    if ON_THE_WAY:
        # each of the four warps has them all
        square = tl.sum(total, 0) * 0.25
    n = strip * 64 + tl.arange(0, 64)
    n2 = second * 64 + tl.arange(0, 64)
    last = True
    if SPLITS > 1:
        tl.store(part + split * NP + n, result)
        if TWO:
            tl.store(part + split * NP + n2, result2)
        if ON_THE_WAY:
            tl.store(squares + tl.program_id(0) * SPLITS + split, square)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tl.program_id(0), 1) == SPLITS - 1
        if last:
            tl.store(arrived + tl.program_id(0), 0)
            result = sum_of_parts(part, n, NP, SPLITS)
            if TWO:
                result2 = sum_of_parts(part, n2, NP, SPLITS)
            if ON_THE_WAY:
                square = 0.0
                for other in tl.static_range(SPLITS):
                    at = squares + tl.program_id(0) * SPLITS + other
                    square += tl.load(at, cache_modifier=".cg")
    if last:
        if ON_THE_WAY:
            scale = tl.rsqrt(square / K + eps)
        finish(result, result2, scale, bias, residual, out, n, N, NORM, GATED, BIAS, ADD)
        if PAIR:
            finish(result2, result2, scale, bias, residual, out, n2, N, NORM, False, BIAS, ADD)


def _forms(gated: bool, norm: bool, group: int) -> list[tuple[int, int, int]]:
    """(strips, chunks a step, programs that run at a time) of the shapes for a product."""
    one = "norm" if norm else "plain"
    kinds = {"gated": 2} if gated else {"pair": 2, one: 1}
    resident = RESIDENT if group >= 128 else RESIDENT_OF_SMALL_GROUPS
    return [
        (strips, chunks, MULTIPROCESSORS * resident[kind, chunks])
        for kind, strips in kinds.items()
        for chunks in (16, 8, 4, 2)
        if (kind, chunks) in resident
    ]


def _splits(chunks: int, steps: int, tiles: int, at_a_time: int) -> Iterator[tuple[int, int]]:
    """(splits, their steps) that are considered. Steps of 16 chunks are for programs of one step;
    where steps are not small, programs must run at a time, if they can."""
    least = LEAST_SMALL_STEPS if chunks == SMALL else 1
    for span in range(1, steps + 1):
        splits = -(-steps // span)
        if splits > 1 and (splits > MOST_SPLITS or span < least):
            continue
        if splits > 1 and chunks > SMALL and splits * tiles > at_a_time:
            continue
        if chunks < 16 or span == 1:
            yield splits, span


@functools.cache
def pick_config(n: int, k: int, gated: bool, norm: bool, group: int) -> Int4RowConfig:
    """The launch shape for n results of inner size k, with a norm before or without, whose weights
    have scales for `group` inputs: the one whose programs fill the multiprocessors best, with equal
    parts of the inner dimension. Measured on an H200 in groups of 128 (docs/performance.md)."""
    best = (0.0, 0, 0.0, 0)
    chosen = Int4RowConfig(1, 1, 1, early=True)
    for strips, most, at_a_time in _forms(gated, norm, group):
        tiles = triton.cdiv(n, TILE if gated else strips * TILE)
        chunks = min(most, triton.next_power_of_2(k // 64))
        steps = triton.cdiv(k // 64, chunks)
        for splits, span in _splits(most, steps, tiles, at_a_time):
            rounds = splits * tiles / at_a_time
            filled = rounds / math.ceil(rounds) * steps / (splits * span)
            if gated:
                odd = ODD if span % 2 else 1.0
                filled *= odd if most == SMALL else LARGE_STEPS
            # equally good to two digits: larger steps, fewer rounds, two strips
            rank = (round(filled, 2), chunks, -math.ceil(rounds), strips)
            if rank > best:
                best, chosen = rank, Int4RowConfig(strips, chunks, splits, early=True)
    return chosen


def takes(matrix: PackedMatrix) -> bool:
    """Whether a matrix of 4 bits can be the weight of these products."""
    return matrix.group in GROUPS


def has_instructions(device: torch.device) -> bool:
    """Whether PTX runs there; Triton's own words do what it says."""
    return device.type == "cuda"


def launch(
    x: Tensor, matrix: PackedMatrix, gated: bool, norm: Tensor | None, eps: float, bias: Tensor | None, residual: Tensor | None,
    out: Tensor, config: Int4RowConfig | None
) -> None:  # fmt: skip
    """See gemm_row._launch. gated: halves of the matrix are multiples of 64 rows."""
    k = matrix.shape[1]
    n = out.shape[1]
    c = config or pick_config(n, k, gated, norm is not None, matrix.group)
    strips = triton.cdiv(n, TILE)
    pair = not gated and c.strips == 2 and strips % 2 == 0
    chunks = max(c.chunks, matrix.group // 64)
    steps = triton.cdiv(k // 64, chunks)
    span = triton.cdiv(steps, c.splits) * chunks
    splits = triton.cdiv(k // 64, span)
    tiles = strips // 2 if pair else strips
    asm = ("", "", "")
    if has_instructions(x.device) and x.dtype in TYPES:
        asm = assembly(x.dtype)
    part, squares = out, out
    if splits > 1:
        size = splits * matrix.padded
        part = torch.empty(size + splits * tiles, dtype=torch.float32, device=x.device)
        squares = part[size:]
    _row_int4[(tiles, splits)](
        x, norm, matrix.words, matrix.scales, bias, residual, out, part, squares, counters(x.device, "row of int4", tiles), n,
        matrix.padded, eps, matrix.factor, span, K=k, CHUNKS=chunks, GROUP=matrix.group, NORM=norm is not None, GATED=gated,
        PAIR=pair, BIAS=bias is not None, ADD=residual is not None, EVEN=k // 64 % chunks == 0, SPLITS=splits, ASM=asm[0],
        SUM=asm[1], TIMES=asm[2], EARLY=c.early, num_warps=c.warps, **overlap(x.device))  # fmt: skip
