"""What the kernels of one row of codes of 4 bits share (gemm_row_int4.py, moe_row_int4.py): the loop
over a part of the inner dimension, and the sums of several parts.

A strip is 64 weight rows, given as (pointers to the words of its first step, scales, its number).
What is read of it for a step is (words, words of scales for a thread's upper and its lower row).
"""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# Values inside a kernel have types that only Triton's compiler knows.

import triton
import triton.language as tl

from .row_int4_products import (
    multiplied,
    multiplied_in_float32,
    pairs_of,
    scales_of,
    sum_of_inputs,
    sum_of_squares,
    times_norm,
)


@triton.jit
def _words(pointers, chunk, end, CHUNKS: tl.constexpr, EVEN: tl.constexpr):
    """Of a step: [128, CHUNKS, 4]; none lie behind the end."""
    at = pointers + chunk * 512
    if EVEN:
        return tl.load(at, mask=chunk < end, other=0)
    inside = (chunk + tl.arange(0, CHUNKS) < end)[None, :, None]
    return tl.load(at, mask=inside, other=0)


@triton.jit
def read_step(strip, chunk, end, NP, K: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """What a step needs of a strip."""
    pointers, scales, number = strip
    w = _words(pointers, chunk, end, CHUNKS, EVEN)
    s, t = scales_of(scales, number, chunk, end, NP, K, CHUNKS, GROUP, EVEN)
    return w, s, t


@triton.jit
def sums_of(x, norm, unit_pair, strip1, strip2, read1, read2, lane, columns, start, end, NP, K: tl.constexpr, CHUNKS: tl.constexpr,
            GROUP: tl.constexpr, EVEN: tl.constexpr, TWO: tl.constexpr, NORM: tl.constexpr, SQUARES: tl.constexpr,
            ASM: tl.constexpr, SUM: tl.constexpr, TIMES: tl.constexpr):  # fmt: skip
    """Chunks start to end of 64 inputs: for a thread's upper and lower row of the first strip, and
    TWO: of the second, sums [128] each; SQUARES: those of the squares of x [128]. read1, read2: of the
    first step. What a step reads is asked for while the one before it is computed. NORM: times the
    weights of the norm; unit_pair: see times_norm. Without ASM in float32, without SQUARES."""
    OFFSET: tl.constexpr = 128.0 if tl.bfloat16 == x.dtype.element_ty else 1024.0
    pointers1, scales1, number1 = strip1
    pointers2, scales2, number2 = strip2
    w, s, t = read1
    w2, s2, t2 = read2
    upper = tl.zeros([128], tl.float32)
    lower = tl.zeros([128], tl.float32)
    upper2 = tl.zeros([128], tl.float32)
    lower2 = tl.zeros([128], tl.float32)
    total = tl.zeros([128], tl.float32)
    x_pairs = x.to(tl.pointer_type(tl.int32), bitcast=True)
    norm_pairs = x_pairs
    if NORM:
        norm_pairs = norm.to(tl.pointer_type(tl.int32), bitcast=True)
    h = lane
    g = lane
    if ASM != "":
        h = pairs_of(x_pairs, start, end, CHUNKS)
        if NORM:
            g = pairs_of(norm_pairs, start, end, CHUNKS)
    for chunk in tl.range(start, end, CHUNKS, num_stages=1):
        following = chunk + CHUNKS
        next_w = _words(pointers1, following, end, CHUNKS, EVEN)
        next_w2 = next_w
        if TWO:
            next_w2 = _words(pointers2, following, end, CHUNKS, EVEN)
        if ASM == "":
            a, b = multiplied_in_float32(
                w, number1, x, norm, scales1, chunk, end, NP, CHUNKS, GROUP, NORM
            )
            c, d = a, b
            if TWO:
                c, d = multiplied_in_float32(
                    w2, number2, x, norm, scales2, chunk, end, NP, CHUNKS, GROUP, NORM
                )
        else:
            next_s, next_t = scales_of(scales1, number1, following, end, NP, K, CHUNKS, GROUP, EVEN)
            next_s2, next_t2 = next_s, next_t
            if TWO:
                next_s2, next_t2 = scales_of(
                    scales2, number2, following, end, NP, K, CHUNKS, GROUP, EVEN
                )
            next_h = pairs_of(x_pairs, following, end, CHUNKS)
            next_g = g
            pair = h
            if NORM:
                next_g = pairs_of(norm_pairs, following, end, CHUNKS)
                if SQUARES:
                    total += sum_of_squares(h)
                pair = times_norm(h, g, unit_pair, TIMES)
            inputs = sum_of_inputs(pair, lane, SUM)
            a, b = multiplied(w, pair, columns, inputs, s, t, GROUP, OFFSET, ASM)
            c, d = a, b
            if TWO:
                c, d = multiplied(w2, pair, columns, inputs, s2, t2, GROUP, OFFSET, ASM)
            s, t, s2, t2, h, g = next_s, next_t, next_s2, next_t2, next_h, next_g
        upper += a
        lower += b
        upper2 += c
        lower2 += d
        w, w2 = next_w, next_w2
    return upper, lower, upper2, lower2, total


@triton.jit
def sum_of_parts(parts, rows, NP, PARTS: tl.constexpr):
    """float32 [PARTS, NP], of which other programs have stored some -> [64], added in order."""
    result = tl.zeros([64], tl.float32)
    for part in tl.static_range(PARTS):
        result += tl.load(parts + part * NP + rows, cache_modifier=".cg")
    return result
