"""Codes of 4 bits times one row of x (gemm_row_int4.py): what a thread reads, the instructions that
multiply, and how sums are scaled and put together."""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from typing import Final

import torch
import triton
import triton.language as tl


def _products(dtype: str, magic: str) -> str:
    """PTX: the sums of 64 inputs for a thread's two rows, as far as they lie in its two columns.
    Operands: outputs; four words; the pair of x that the thread holds; for each of the eight columns
    all bits or none, whether the thread's pair is in it."""
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    lines = [
        ".reg .b32 t<4>;",
        ".reg .b32 x<2>;",
        ".reg .f32 d<4>;",
        *(f"mov.f32 d{i}, 0f00000000;" for i in range(4)),
    ]
    for word in range(4):
        w = f"${2 + word}"
        lines += [f"mov.b32 t0, {w};", *(f"shr.u32 t{i}, {w}, {4 * i};" for i in (1, 2, 3))]
        lines += [f"lop3.b32 t{i}, t{i}, 0x000f000f, {magic}, 0xea;" for i in range(4)]
        lines += [f"and.b32 x{i}, $6, ${7 + 2 * word + i};" for i in range(2)]
        lines.append(
            f"{product} {{d0, d1, d2, d3}}, {{t0, t1, t2, t3}}, {{x0, x1}}, {{d0, d1, d2, d3}};"
        )
    lines += ["add.f32 $0, d0, d1;", "add.f32 $1, d2, d3;"]
    return "\n".join(["{", *lines, "}"])


def _sums(dtype: str, one: str) -> str:
    """PTX: the sum of x in a thread's two columns. Operands: the output; the pair that the thread
    holds; its place in its warp as the tensor has it: if it is another, sums are no numbers."""
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    lines = [
        ".reg .b32 t<2>;",
        ".reg .f32 d<4>;",
        ".reg .pred p;",
        *(f"mov.f32 d{i}, 0f00000000;" for i in range(4)),
        f"mov.b32 t0, {one};",
        "mov.b32 t1, 0;",
        f"{product} {{d0, d1, d2, d3}}, {{t0, t0, t0, t0}}, {{$1, t1}}, {{d0, d1, d2, d3}};",
        "add.f32 d0, d0, d1;",
        "mov.u32 t0, %laneid;",
        "setp.ne.u32 p, t0, $2;",
        "selp.f32 $0, 0f7fffffff, d0, p;",
    ]
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


def assembly(dtype: torch.dtype) -> tuple[str, str, str]:
    """PTX for a type of x: sums of products, sums of x, x times the norm's weights."""
    name, magic, one = TYPES[dtype]
    return _products(name, magic), _sums(name, one), _times(name + "x2")


@triton.jit
def _quarters(tensor):
    """[..., 4] -> four of [...]."""
    halves = tl.reshape(tensor, [tensor.shape[0], tensor.shape[1], 2, 2])
    even, odd = tl.split(halves)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _scale_and_zero(pair):
    """Of words that hold both in float16."""
    scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scales_of(scales, strip, chunk, end, NP, K: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr,
              EVEN: tl.constexpr):  # fmt: skip
    """Words of scale and zero point of a step's groups [128, groups], for a thread's upper and lower
    row; none lie behind the end."""
    thread = tl.arange(0, 128)
    n = strip * 64 + thread // 32 * 16 + thread % 32 // 4
    if GROUP > 64:
        group = chunk // (GROUP // 64) + tl.arange(0, CHUNKS * 64 // GROUP)[None, :]
    else:
        group = (chunk + tl.arange(0, CHUNKS)[None, :]) * (64 // GROUP)
        if GROUP == 32:
            # a thread's two columns lie in one half of a chunk
            group += (thread % 4 // 2)[:, None]
    at = n[:, None] + group * NP
    inside = tl.broadcast_to(chunk < end if EVEN else group < K // GROUP, at.shape)
    return tl.load(scales + at, mask=inside, other=0), tl.load(
        scales + at + 8, mask=inside, other=0
    )


@triton.jit
def _scaled(sums, pair, inputs, OFFSET: tl.constexpr):
    """Sums [128, groups] of codes times x -> [128]."""
    scale, zero = _scale_and_zero(pair)
    return tl.sum((sums - (zero + OFFSET) * inputs) * scale, 1)


@triton.jit
def _by_group(sums, PER: tl.constexpr):
    """[128, chunks] -> [128, groups] of PER chunks each."""
    if PER == 1:
        return sums
    return tl.sum(tl.reshape(sums, [128, sums.shape[1] // PER, PER]), 2)


@triton.jit
def multiplied(w, pair, columns, inputs, upper, lower, GROUP: tl.constexpr, OFFSET: tl.constexpr,
               ASM: tl.constexpr):  # fmt: skip
    """A step's share of a thread's two rows, [128] each: its words w [128, chunks, 4] times x. pair,
    inputs [128, chunks]: the thread's pair of x, and the sum of x in its columns. columns: see
    in_columns. upper, lower: see scales_of."""
    e, f, g, h = _quarters(w)
    a, b = tl.inline_asm_elementwise(
        ASM, "=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r", [e, f, g, h, pair, columns[0], columns[1], columns[2],
        columns[3], columns[4], columns[5], columns[6], columns[7]], dtype=(tl.float32, tl.float32),
        is_pure=True, pack=1
    )  # fmt: skip
    PER: tl.constexpr = GROUP // 64 if GROUP > 64 else 1
    inputs = _by_group(inputs, PER)
    return (
        _scaled(_by_group(a, PER), upper, inputs, OFFSET),
        _scaled(_by_group(b, PER), lower, inputs, OFFSET),
    )


@triton.jit
def sum_of_inputs(pair, lane, ASM: tl.constexpr):
    """Of a step, in each thread's columns: [128, chunks]."""
    return tl.inline_asm_elementwise(
        ASM, "=f,r,r", [pair, lane], dtype=tl.float32, is_pure=True, pack=1
    )


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
    words = k // GROUP * NP + n
    words = tl.load(scales + words, mask=tl.broadcast_to(inside, words.shape), other=0)
    scale, zero = _scale_and_zero(words)
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
def _in_column(lane, COLUMN: tl.constexpr):
    """All bits where lane // 4 is COLUMN, none elsewhere; not by a comparison, from which the
    compiler would make selections, and again for each."""
    return ((lane // 4 ^ COLUMN) - 1) >> 31


@triton.jit
def in_columns(lane):
    """Which of the eight columns of `mma` has the pair of a lane, as bits."""
    return (
        _in_column(lane, 0), _in_column(lane, 1), _in_column(lane, 2), _in_column(lane, 3),
        _in_column(lane, 4), _in_column(lane, 5), _in_column(lane, 6), _in_column(lane, 7)
    )  # fmt: skip


@triton.jit
def pairs_of(x, chunk, end, CHUNKS: tl.constexpr):
    """Two neighbouring inputs in 16 bits, int32 [128, CHUNKS]: the lanes of a warp have the 64 of a
    chunk, in their order; zero behind the end."""
    at = chunk + tl.arange(0, CHUNKS)[None, :]
    # by a bit mask, in which the compiler sees no neighbours: it would give threads four pairs each
    k = at * 32 + (tl.arange(0, 128)[:, None] & 31)
    return tl.load(x + k, mask=tl.broadcast_to(at < end, k.shape), other=0)


@triton.jit
def times_norm(pair, gain, unit, TIMES: tl.constexpr):
    return tl.inline_asm_elementwise(
        TIMES, "=r,r,r,r", [pair, gain, unit], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def sum_of_squares(pair):
    """Of pairs of bfloat16 [128, chunks]: [128]."""
    low = (pair << 16).to(tl.float32, bitcast=True)
    high = (pair & -65536).to(tl.float32, bitcast=True)
    return tl.sum(low * low + high * high, 1)


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
