"""The products of gemm_row.py with codes of 8 bits that have scales, and zero points where need be,
of groups of 16 to 128 inputs.

A thread reads 16 codes of a row at once, which are four of each 16 inputs among 64
(quantized_decode.PERMUTED), and what it reads of x serves all rows of the program. Products of one
group are summed before they are scaled, and the zero point, with the offset of the codes, is taken
from the sums: sum of (code * x) - zero * (sum of x). Arithmetic is float32. Codes and scales of a
step are asked for while the one before it is computed, the first ones before the wait for x.
"""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
from dataclasses import dataclass
from typing import Final

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .packed_matrix import PackedMatrix
from .row_epilogue import finish
from .workspace import overlap

GROUPS: Final = (16, 32, 64, 128)
"""Inputs that may share a scale."""
LARGEST_LAYER: Final = 1 << 15
"""Results of a product that is no head."""


@dataclass(frozen=True)
class CodesRowConfig:
    """Launch shape. block_n: results a program, a power of two up to 128. A step has 512 inputs a
    warp. early: the next kernel's programs are let in at once."""

    block_n: int
    warps: int
    early: bool = True


@triton.jit
def _words(words, n, place, K: tl.constexpr, EVEN: tl.constexpr):
    """int32 [threads, rows, 4], of 16 codes a thread from `place` [threads] on."""
    at = (
        n.to(tl.int64)[None, :, None] * (K // 4)
        + (place // 4)[:, None, None]
        + tl.arange(0, 4)[None, None, :]
    )
    if EVEN:
        return tl.load(words + at)
    return tl.load(words + at, mask=(place < K)[:, None, None], other=0)


@triton.jit
def _scales(scales, n, place, NP, K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr):
    """int32 [threads, rows, groups of a span], of the 64 inputs around `place` [threads]."""
    EACH: tl.constexpr = 64 // GROUP if GROUP < 64 else 1
    span = place // 64
    first = span * EACH
    if GROUP > 64:
        first = span // (GROUP // 64)
    group = first[:, None, None] + tl.arange(0, EACH)[None, None, :]
    at = group * NP + n[None, :, None]
    if EVEN:
        return tl.load(scales + at)
    return tl.load(scales + at, mask=(place < K)[:, None, None], other=0)


@triton.jit
def _halves(pair, DT: tl.constexpr):
    """Words of two 16-bit values: both as float32."""
    if tl.bfloat16 == DT:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(
            tl.float32, bitcast=True
        )
    else:
        low = (pair & 0xFFFF).to(tl.int16).to(DT, bitcast=True)
        return low.to(tl.float32), (pair >> 16).to(tl.int16).to(DT, bitcast=True).to(tl.float32)


@triton.jit
def _neighbours(x, at, inside):
    """x[at] and x[at + 1], at even: float32."""
    DT: tl.constexpr = x.dtype.element_ty
    if tl.float32 == DT:
        return tl.load(x + at, mask=inside, other=0.0), tl.load(x + at + 1, mask=inside, other=0.0)
    else:
        pairs = x.to(tl.pointer_type(tl.int32), bitcast=True)
        return _halves(tl.load(pairs + at // 2, mask=inside, other=0), DT)


@triton.jit
def _inputs(x, place, K: tl.constexpr):
    """Those whose codes lie from `place` [threads] on, by the byte of their word: float32
    [threads, 4 of 16 inputs] each."""
    first = place // 64 * 64 + place % 64 // 16 * 2
    at = first[:, None] + tl.arange(0, 4)[None, :] * 16
    inside = tl.broadcast_to((place < K)[:, None], at.shape)
    a, c = _neighbours(x, at, inside)
    b, d = _neighbours(x, at + 8, inside)
    return a, b, c, d


@triton.jit
def _times(w, h, BYTE: tl.constexpr, FORM: tl.constexpr):
    """A byte of words [threads, rows, 4] times inputs [threads, 4]. INT8: times 1 + byte / 256,
    whose bits are those of 1 and the byte's in the mantissa. The conversion of an integer takes a
    unit that has a quarter of the others' speed."""
    if FORM == "fp8":
        value = ((w >> (8 * BYTE)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return value.to(tl.float32) * h[:, None, :]
    else:
        shifted = w << (15 - 8 * BYTE) if BYTE < 2 else w >> (8 * BYTE - 15)
        value = ((shifted & 0x7F8000) | 0x3F800000).to(tl.float32, bitcast=True)
        return value * h[:, None, :]


@triton.jit
def _by_two(sums):
    """[threads, rows, 4] -> [threads, rows, 2]: sums of neighbours. By a split: a reduction would
    send them through shared memory."""
    even, odd = tl.split(tl.reshape(sums, [sums.shape[0], sums.shape[1], 2, 2]))
    return even + odd


@triton.jit
def _scaled(w, s, a, b, c, d, FORM: tl.constexpr, GROUP: tl.constexpr):
    """A step's share of each row, [threads, rows]: words w times inputs a to d, by scales s."""
    UNIT: tl.constexpr = 256.0 if FORM == "byte" else 1.0
    OFFSET: tl.constexpr = 1.5 if FORM == "byte" else 0.0
    sums = _times(w, a, 0, FORM) + _times(w, b, 1, FORM)
    sums += _times(w, c, 2, FORM) + _times(w, d, 3, FORM)
    inputs = (a + b + c + d)[:, None, :]
    if GROUP == 32:
        sums = _by_two(sums)
        inputs = _by_two(inputs)
    if GROUP >= 64:
        sums = tl.sum(sums, 2)[:, :, None]
        inputs = tl.sum(inputs, 2)[:, :, None]
    scale = (s & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (s >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.sum((sums - (zero * (1 / UNIT) + OFFSET) * inputs) * (scale * UNIT), 2)


@triton.jit
def _read(words, scales, n, place, NP, K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr):
    """What a step reads of rows n: codes and scales."""
    w = _words(words, n, place, K, EVEN)
    return w, _scales(scales, n, place, NP, K, GROUP, EVEN)


@triton.jit
def _row_codes(x, norm, words, scales, bias, residual, out, N, NP, eps, factor, K: tl.constexpr, BN: tl.constexpr,
        WARPS: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
        BIAS: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Results program * BN on. With GATED the second half of the rows are those of up."""
    STEP: tl.constexpr = WARPS * 512
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    place = tl.arange(0, WARPS * 32) * 16
    w, s = _read(words, scales, n, place, NP, K, GROUP, EVEN)
    w2, s2 = w, s
    if GATED:
        w2, s2 = _read(words, scales, n + N, place, NP, K, GROUP, EVEN)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    squares = tl.zeros([WARPS * 32], tl.float32)
    acc = tl.zeros([WARPS * 32, BN], tl.float32)
    acc2 = acc
    for start in tl.range(0, K, STEP, num_stages=1):
        a, b, c, d = _inputs(x, start + place, K)
        if NORM:
            squares += tl.sum(a * a + b * b + c * c + d * d, 1)
            e, f, g, h = _inputs(norm, start + place, K)
            a, b, c, d = a * e, b * f, c * g, d * h
        following = start + STEP + place
        # behind the end nothing is read
        next_w, next_s = _read(words, scales, n, following, NP, K, GROUP, False)
        next_w2, next_s2 = next_w, next_s
        if GATED:
            next_w2, next_s2 = _read(words, scales, n + N, following, NP, K, GROUP, False)
        acc += _scaled(w, s, a, b, c, d, FORM, GROUP)
        if GATED:
            acc2 += _scaled(w2, s2, a, b, c, d, FORM, GROUP)
        w, w2, s, s2 = next_w, next_w2, next_s, next_s2
    if PDL and not EARLY:
        gdc_launch_dependents()
    result = tl.sum(acc, 0) * factor
    result2 = result
    if GATED:
        result2 = tl.sum(acc2, 0) * factor
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    finish(result, result2, scale, bias, residual, out, n, N, NORM, GATED, BIAS, ADD)


@functools.cache
def pick_config(n: int, k: int, gated: bool) -> CodesRowConfig:
    """The launch shape for n results of inner size k: measured on an H200 at the sizes of an 8B
    layer and its head, in groups of 16 and 32 (docs/performance.md)."""
    block_n, warps = _shape(n, k, gated)
    # no warps without inputs
    return CodesRowConfig(block_n, min(warps, triton.next_power_of_2(triton.cdiv(k, 512))))


def _shape(n: int, k: int, gated: bool) -> tuple[int, int]:
    """(block_n, warps)."""
    if gated:
        return 4, 2
    if n > LARGEST_LAYER:
        return 4, 1
    if k > 8192:
        return 4, 4
    if n <= 2048:
        return 4, 8
    return (8, 8) if n > 4096 else (4, 4)


def launch(
    x: Tensor, matrix: PackedMatrix, gated: bool, norm: Tensor | None, eps: float, bias: Tensor | None, residual: Tensor | None,
    out: Tensor, config: CodesRowConfig | None
) -> None:  # fmt: skip
    """See gemm_row._launch. gated: halves of the matrix are multiples of block_n rows."""
    k = matrix.shape[1]
    n = out.shape[1]
    c = config or pick_config(n, k, gated)
    _row_codes[(triton.cdiv(n, c.block_n),)](
        x, norm, matrix.words, matrix.scales, bias, residual, out, n, matrix.padded, eps, matrix.factor, K=k,
        BN=c.block_n, WARPS=c.warps, FORM=matrix.form, GROUP=matrix.group, NORM=norm is not None, GATED=gated,
        BIAS=bias is not None, ADD=residual is not None, EVEN=k % (512 * c.warps) == 0, EARLY=c.early, num_warps=c.warps,
        **overlap(x.device))  # fmt: skip
