"""The products of gemm_row.py with codes of 4 bits.

A program has one strip of 64 weight rows, or two, and a part of the inner dimension. A thread reads
16 bytes of a strip at once, straight into registers and a step ahead of their use; each word of 8
codes is its operand of one `mma.m16n8k16` (quantized_decode.py), whose other side is the row of x
and seven columns of zeros. So a word costs seven instructions of decoding and one product, and
nothing but x is read twice.

Codes are multiplied as they are decoded, with an offset. It is taken from the sums together with
the zero point, (sum of code * x) - (offset + zero) * (sum of x), and sums are then scaled: both are
float32, and zero points need not be whole numbers. The sum of x is a product too, with ones.
"""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

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
from .row_int4_products import (
    TYPES,
    assembly,
    multiplied,
    multiplied_in_float32,
    norm_factor,
    pairs,
    rows_of,
    unit_of,
)
from .workspace import counters, overlap

GROUPS: Final = (32, 64, 128)
"""Inputs that may share a scale."""
PROGRAMS: Final = 600
"""Of a launch that is cut into splits, at most."""
LEAST_INPUTS: Final = 512
"""Of a split."""


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
def _words(pointers, chunk, end, CHUNKS: tl.constexpr, EVEN: tl.constexpr):
    """Of a step: [128, CHUNKS, 4]; none lie behind the end."""
    at = pointers + chunk * 512
    if EVEN:
        return tl.load(at, mask=chunk < end, other=0)
    inside = (chunk + tl.arange(0, CHUNKS) < end)[None, :, None]
    return tl.load(at, mask=inside, other=0)


@triton.jit
def _merged(result, part, to, NP, split, SPLITS: tl.constexpr, last):
    """Before the last program has counted: stores a split's sums. For it: all of them, in order."""
    if last:
        result = tl.zeros([64], tl.float32)
        for other in tl.static_range(SPLITS):
            result += tl.load(part + other * NP + to, cache_modifier=".cg")
    else:
        tl.store(part + split * NP + to, result)
    return result


@triton.jit
def _row_int4(x, norm, words, scales, bias, residual, out, part, arrived, N, NP, eps, factor, span, K: tl.constexpr,
        CHUNKS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, PAIR: tl.constexpr,
        BIAS: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr, ASM: tl.constexpr,
        SUM: tl.constexpr, TIMES: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Chunks split * span to (split + 1) * span of 64 inputs. GATED: the second strip is that of up;
    else PAIR: the next one. The first words are asked for before the wait for x."""
    DT: tl.constexpr = x.dtype.element_ty
    OFFSET: tl.constexpr = 128.0 if tl.bfloat16 == DT else 1024.0
    TWO: tl.constexpr = GATED or PAIR
    strip = tl.program_id(0) * (2 if PAIR else 1)
    second = strip + (N // 64 if GATED else 1)
    split = tl.program_id(1)
    start = split * span
    end = tl.minimum(start + span, K // 64)
    lane = tl.arange(0, 128)[:, None] % 32 + tl.zeros([1, CHUNKS], tl.int32)
    # threads before chunks: so that Triton spreads threads over a warp, and leaves chunks to each
    pointers = words + tl.permute(offsets(strip, K, 64, CHUNKS * 64, "int4"), [1, 0, 2])
    pointers2 = words + tl.permute(offsets(second, K, 64, CHUNKS * 64, "int4"), [1, 0, 2])
    w = _words(pointers, start, end, CHUNKS, EVEN)
    w2 = w
    if TWO:
        w2 = _words(pointers2, start, end, CHUNKS, EVEN)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    scale = 1.0
    unit_pair = 0
    if NORM:
        scale = norm_factor(x, eps, K, 2048 if K > 1024 else 1024)
        if ASM != "" and tl.float16 == DT:
            unit, unit_pair = unit_of(scale, DT)
            scale = scale / unit
    upper = tl.zeros([128], tl.float32)
    lower = tl.zeros([128], tl.float32)
    upper2 = tl.zeros([128], tl.float32)
    lower2 = tl.zeros([128], tl.float32)
    for chunk in tl.range(start, end, CHUNKS, num_stages=1):
        following = _words(pointers, chunk + CHUNKS, end, CHUNKS, EVEN)
        following2 = following
        if TWO:
            following2 = _words(pointers2, chunk + CHUNKS, end, CHUNKS, EVEN)
        if ASM == "":
            a, b = multiplied_in_float32(
                w, strip, x, norm, scales, chunk, end, NP, CHUNKS, GROUP, NORM
            )
            c, d = a, b
            if TWO:
                c, d = multiplied_in_float32(
                    w2, second, x, norm, scales, chunk, end, NP, CHUNKS, GROUP, NORM
                )
        else:
            x_pairs = x.to(tl.pointer_type(tl.int32), bitcast=True)
            norm_pairs = x_pairs
            if NORM:
                norm_pairs = norm.to(tl.pointer_type(tl.int32), bitcast=True)
            h = pairs(x_pairs, norm_pairs, unit_pair, chunk, end, CHUNKS, NORM, TIMES)
            a, b = multiplied(
                w, strip, h, lane, scales, chunk, NP, K, GROUP, OFFSET, EVEN, ASM, SUM
            )
            c, d = a, b
            if TWO:
                c, d = multiplied(
                    w2, second, h, lane, scales, chunk, NP, K, GROUP, OFFSET, EVEN, ASM, SUM
                )
        upper += a
        lower += b
        upper2 += c
        lower2 += d
        w = following
        w2 = following2
    if PDL and not EARLY:
        gdc_launch_dependents()
    result = rows_of(upper, lower) * factor
    result2 = result
    if TWO:
        result2 = rows_of(upper2, lower2) * factor
    n = strip * 64 + tl.arange(0, 64)
    n2 = second * 64 + tl.arange(0, 64)
    last = True
    if SPLITS > 1:
        _merged(result, part, n, NP, split, SPLITS, False)
        if TWO:
            _merged(result2, part, n2, NP, split, SPLITS, False)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tl.program_id(0), 1) == SPLITS - 1
        if last:
            tl.store(arrived + tl.program_id(0), 0)
            result = _merged(result, part, n, NP, split, SPLITS, True)
            if TWO:
                result2 = _merged(result2, part, n2, NP, split, SPLITS, True)
    if last:
        finish(result, result2, scale, bias, residual, out, n, N, NORM, GATED, BIAS, ADD)
        if PAIR:
            finish(result2, result2, scale, bias, residual, out, n2, N, NORM, False, BIAS, ADD)


def pick_config(n: int, k: int, gated: bool) -> Int4RowConfig:
    """The launch shape for n results of inner size k. Not measured yet: some four programs of four
    warps for each multiprocessor of a large GPU, each of which has four steps or fewer."""
    programs = triton.cdiv(n, TILE) if gated else triton.cdiv(n, 2 * TILE)
    splits = 1
    while splits * 2 * programs <= PROGRAMS and splits * 2 * LEAST_INPUTS <= k:
        splits *= 2
    return Int4RowConfig(2, 4, splits)


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
    c = config or pick_config(n, k, gated)
    strips = triton.cdiv(n, TILE)
    pair = not gated and c.strips == 2 and strips % 2 == 0
    chunks = max(c.chunks, matrix.group // 64)
    steps = triton.cdiv(k // 64, chunks)
    span = triton.cdiv(steps, c.splits) * chunks
    splits = triton.cdiv(k // 64, span)
    tiles = strips // 2 if pair else strips
    asm = ("", "", "")
    if has_instructions(x.device) and x.dtype in TYPES:
        asm = assembly(x.dtype, matrix.group)
    part = out
    if splits > 1:
        part = torch.empty(splits * matrix.padded, dtype=torch.float32, device=x.device)
    _row_int4[(tiles, splits)](
        x, norm, matrix.words, matrix.scales, bias, residual, out, part, counters(x.device, "row of int4", tiles), n,
        matrix.padded, eps, matrix.factor, span, K=k, CHUNKS=chunks, GROUP=matrix.group, NORM=norm is not None, GATED=gated,
        PAIR=pair, BIAS=bias is not None, ADD=residual is not None, EVEN=k // 64 % chunks == 0, SPLITS=splits, ASM=asm[0],
        SUM=asm[1], TIMES=asm[2], EARLY=c.early, num_warps=c.warps, **overlap(x.device))  # fmt: skip
