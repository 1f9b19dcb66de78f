"""Codes of 4 bits times one row of x (gemm_row_int4.py): what a thread reads, the instructions that
multiply, and how sums are scaled and put together."""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from typing import Final

import torch
import triton
import triton.language as tl


def _products(dtype: str, magic: str, one: str, words: int) -> str:
    """PTX: the sums of 16 * `words` inputs for a thread's two rows (column 0 of their tile), and
    with `one` the sum of x. Operands: outputs; words; pairs of x, two a word; with `one` also the
    thread's place in its warp as the tensor has it: if it is another, sums are no numbers."""
    results = 1 if one else 2
    first = results + (0 if one else words)
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    lines = [
        ".reg .b32 t<4>;",
        ".reg .f32 d<4>;",
        *(f"mov.f32 d{i}, 0f00000000;" for i in range(4)),
    ]
    if one:
        lines += [f"mov.b32 t{i}, {one};" for i in range(4)]
    for word in range(words):
        if not one:
            w = f"${results + word}"
            lines += [f"mov.b32 t0, {w};", *(f"shr.u32 t{i}, {w}, {4 * i};" for i in (1, 2, 3))]
            lines += [f"lop3.b32 t{i}, t{i}, 0x000f000f, {magic}, 0xea;" for i in range(4)]
        pair = f"{{${first + 2 * word}, ${first + 2 * word + 1}}}"
        lines.append(
            f"{product} {{d0, d1, d2, d3}}, {{t0, t1, t2, t3}}, {pair}, {{d0, d1, d2, d3}};"
        )
    if one:
        lines += [
            ".reg .pred p;",
            "mov.u32 t0, %laneid;",
            f"setp.ne.u32 p, t0, ${first + 2 * words};",
        ]
        lines.append("selp.f32 $0, 0f7fffffff, d0, p;")
    else:
        lines += ["mov.f32 $0, d0;", "mov.f32 $1, d2;"]
    return "\n".join(["{", *lines, "}"])


def _times(dtype: str) -> str:
    """PTX: a pair of x times a pair of the norm's weights. In float16, whose range would end, times
    a power of two near the norm's factor before."""
    if dtype == "bf16x2":
        return "{\n.reg .b32 t0;\nmov.b32 t0, 0x80008000;\nfma.rn.bf16x2 $0, $1, $2, t0;\n}"
    lines = [".reg .b32 t<2>;", "mov.b32 t1, 0x80008000;", f"fma.rn.{dtype} t0, $1, $3, t1;"]
    return "\n".join(["{", *lines, f"fma.rn.{dtype} $0, t0, $2, t1;", "}"])


TYPES: Final = {
    torch.bfloat16: ("bf16", "0x43004300", "0x3f803f80"),
    torch.float16: ("f16", "0x64006400", "0x3c003c00"),
}
"""Names in PTX; bits of the power of two into whose mantissa a code fits, and of one, twice."""


def assembly(dtype: torch.dtype, group: int) -> tuple[str, str, str]:
    """PTX for a type of x and a group: sums of products, sums of x, x times the norm's weights."""
    name, magic, one = TYPES[dtype]
    words = 2 if group == 32 else 4
    return (
        _products(name, magic, "", words),
        _products(name, magic, one, words),
        _times(name + "x2"),
    )


@triton.jit
def _quarters(tensor):
    """[..., 4] -> four of [...]."""
    halves = tl.reshape(tensor, [tensor.shape[0], tensor.shape[1], 2, 2])
    even, odd = tl.split(halves)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _pair_at(x, norm, unit, at, inside, NORM: tl.constexpr, TIMES: tl.constexpr):
    """Two neighbouring inputs, int32: x or the normed x, zero where not inside."""
    pair = tl.load(x + at, mask=inside, other=0)
    if NORM:
        gain = tl.load(norm + at, mask=inside, other=0)
        pair = tl.inline_asm_elementwise(
            TIMES, "=r,r,r,r", [pair, gain, unit], dtype=tl.int32, is_pure=True, pack=1
        )
    return pair


@triton.jit
def _scale_and_zero(scales, at, inside):
    pair = tl.load(scales + at, mask=inside, other=0)
    scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scaled(a, b, inputs, scales, n, first, groups, NP, OFFSET: tl.constexpr, PER: tl.constexpr, STRIDE: tl.constexpr,
            EVEN: tl.constexpr):  # fmt: skip
    """Sums of parts [128, parts] of two rows each, n [128] and n + 8, and of their inputs: scaled, and
    added up. first: the group of the first part, of `groups` in all; PER parts share a group, and
    STRIDE groups lie between one part and the next. EVEN: none lies behind the last."""
    PARTS: tl.constexpr = a.shape[1] // PER
    if PER > 1:
        a = tl.sum(tl.reshape(a, [128, PARTS, PER]), 2)
        b = tl.sum(tl.reshape(b, [128, PARTS, PER]), 2)
        inputs = tl.sum(tl.reshape(inputs, [128, PARTS, PER]), 2)
    group = first + tl.arange(0, PARTS)[None, :] * STRIDE
    inside = group < (first + PARTS * STRIDE if EVEN else groups)
    at = n[:, None] + group * NP
    inside = tl.broadcast_to(inside, at.shape)
    scale, zero = _scale_and_zero(scales, at, inside)
    upper = tl.sum((a - (zero + OFFSET) * inputs) * scale, 1)
    scale, zero = _scale_and_zero(scales, at + 8, inside)
    return upper, tl.sum((b - (zero + OFFSET) * inputs) * scale, 1)


@triton.jit
def _sum_of_pairs(a, b, c, d, lane, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASM, "=f,r,r,r,r,r", [a, b, c, d, lane], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _sum_of_eight(a, b, c, d, e, f, g, h, lane, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASM, "=f,r,r,r,r,r,r,r,r,r", [a, b, c, d, e, f, g, h, lane], dtype=tl.float32,
        is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def multiplied(w, strip, x, lane, scales, chunk, NP, K: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
                EVEN: tl.constexpr, ASM: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """Sums of a step for a thread's two rows, [128] each: its words w [128, chunks, 4] times x, eight
    tensors of pairs [128, chunks]."""
    e, f, g, h = _quarters(w)
    thread = tl.arange(0, 128)
    n = strip * 64 + thread // 32 * 16 + thread % 32 // 4
    first = chunk * 64 // GROUP
    if GROUP == 32:
        a, b = tl.inline_asm_elementwise(
            ASM, "=f,=f,r,r,r,r,r,r", [e, f, x[0], x[1], x[2], x[3]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )  # fmt: skip
        inputs = _sum_of_pairs(x[0], x[1], x[2], x[3], lane, SUM)
        upper, lower = _scaled(a, b, inputs, scales, n, first, K // GROUP, NP, OFFSET, 1, 2, EVEN)
        a, b = tl.inline_asm_elementwise(
            ASM, "=f,=f,r,r,r,r,r,r", [g, h, x[4], x[5], x[6], x[7]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )  # fmt: skip
        inputs = _sum_of_pairs(x[4], x[5], x[6], x[7], lane, SUM)
        more, others = _scaled(
            a, b, inputs, scales, n, first + 1, K // GROUP, NP, OFFSET, 1, 2, EVEN
        )
        return upper + more, lower + others
    else:
        a, b = tl.inline_asm_elementwise(
            ASM, "=f,=f,r,r,r,r,r,r,r,r,r,r,r,r",
            [e, f, g, h, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )  # fmt: skip
        inputs = _sum_of_eight(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], lane, SUM)
        return _scaled(a, b, inputs, scales, n, first, K // GROUP, NP, OFFSET, GROUP // 64, 1, EVEN)


@triton.jit
def multiplied_in_float32(w, strip, x, norm, scales, chunk, end, NP, CHUNKS: tl.constexpr, GROUP: tl.constexpr,
                           NORM: tl.constexpr):  # fmt: skip
    """multiplied in Triton's own words, of x itself."""
    at = chunk + tl.arange(0, CHUNKS)[None, :, None, None]
    thread = tl.arange(0, 128)[:, None, None, None]
    word = tl.arange(0, 4)[None, None, :, None]
    # half of inputs, half of rows, pair
    i = tl.arange(0, 8)[None, None, None, :]
    k = at * 64 + word * 16 + i // 4 * 8 + thread % 4 * 2 + i % 2
    n = strip * 64 + thread // 32 * 16 + i // 2 % 2 * 8 + thread % 32 // 4
    code = (w[:, :, :, None] >> (4 * (i // 2 + i % 2 * 4))) & 15
    inside = at < end
    h = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        h *= tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
    scale, zero = _scale_and_zero(scales, k // GROUP * NP + n, tl.broadcast_to(inside, code.shape))
    products = tl.reshape((code.to(tl.float32) - zero) * scale * h, [128, CHUNKS, 4, 2, 2, 2])
    by_row = tl.sum(tl.sum(tl.sum(products, 5), 3), 2)
    return tl.split(tl.sum(by_row, 1))


@triton.jit
def rows_of(upper, lower):
    """[128] each, of the four threads of a row -> [64]."""
    upper = tl.sum(tl.reshape(upper, [4, 8, 4]), 2)
    lower = tl.sum(tl.reshape(lower, [4, 8, 4]), 2)
    return tl.reshape(tl.permute(tl.join(upper, lower), [0, 2, 1]), [64])


@triton.jit
def pairs(x, norm, unit, chunk, end, CHUNKS: tl.constexpr, NORM: tl.constexpr, TIMES: tl.constexpr):
    """The pairs of x that a thread hands to a step's products: those of the first column of four
    words, by halves; threads of other columns have zeros."""
    at = chunk + tl.arange(0, CHUNKS)[None, :]
    thread = tl.arange(0, 128)[:, None]
    inside = (at < end) & (thread % 32 < 4)
    # by a bit mask, in which the compiler sees no neighbours: it would give threads four pairs each
    k = at * 32 + (thread & 3)
    return (
        _pair_at(x, norm, unit, k, inside, NORM, TIMES),
        _pair_at(x, norm, unit, k + 4, inside, NORM, TIMES),
        _pair_at(x, norm, unit, k + 8, inside, NORM, TIMES),
        _pair_at(x, norm, unit, k + 12, inside, NORM, TIMES),
        _pair_at(x, norm, unit, k + 16, inside, NORM, TIMES),
        _pair_at(x, norm, unit, k + 20, inside, NORM, TIMES),
        _pair_at(x, norm, unit, k + 24, inside, NORM, TIMES),
        _pair_at(x, norm, unit, k + 28, inside, NORM, TIMES),
    )


@triton.jit
def norm_factor(x, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        h = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        squares += h * h
    return tl.rsqrt(tl.sum(squares, 0) / K + eps)


@triton.jit
def unit_of(factor, DT: tl.constexpr):
    """The power of two below a factor, as a float32 and as a pair of DT."""
    unit = (factor.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    half = unit.to(DT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return unit, half | half << 16
