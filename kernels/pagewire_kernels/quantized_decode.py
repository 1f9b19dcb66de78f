"""Codes of 4 and 8 bits turned into values of bfloat16 or float16, in registers and in the order in
which tensor cores take them: a word of 32 bits is decoded by a few instructions on pairs of values,
and nothing moves between threads.

The layout of codes follows that of a matrix product's left operand: of 64 rows and 16 inputs a
thread has two neighbours in two rows, eight rows apart, and again eight inputs further (PTX,
fragments of `mma.m16n8k16` and `wgmma.m64k16`). Codes of 4 bits lie by thread, 64 rows together.
Those of 8 bits lie by row, so that products of 8 bits can read the same memory; only the order of
each 64 inputs is such that what a thread needs of a row is together (`PERMUTED`).

Codes of 4 bits are numbers, or places in a table (table_lookup.py).
"""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .table_lookup import LOOKUPS, looked_up

TILE: Final = 64
"""Weight rows whose codes lie together."""
INT4: Final = "int4"
INT8: Final = "byte"
"""Codes of 0 to 255 that stand for 128 less. Not a name of one of Triton's types, for which
JITFunction.preload would take it (compile_ahead.py)."""
FP8: Final = "fp8"
"""float8_e4m3fn."""
EIGHT_BITS: Final = (INT8, FP8)
"""Forms of codes of 8 bits; all others have 4."""
SPAN: Final = 64
"""Inputs whose codes of 8 bits are in an order of their own."""
PERMUTED: Final = tuple(
    16 * chunk + 8 * half + 2 * column + pair
    for column in range(4)
    for chunk in range(4)
    for pair in range(2)
    for half in range(2)
)
"""Of the inputs of a span, by the place of their codes of 8 bits."""


def _asm_of(outputs: int, registers: int, lines: list[str], pairs: list[str]) -> str:
    """PTX of one word: `lines` leave pairs of values in registers, whose halves are the outputs."""
    halves = [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {pair};" for i, pair in enumerate(pairs)]
    body = [line.replace("$w", f"${outputs}") for line in lines]
    return "\n".join(["{", f".reg .b32 t<{registers}>;", *body, *halves, "}"])


def _int4(magic: str) -> str:
    """Eight codes: each is or-ed into the mantissa of a power of two."""
    lines = ["mov.b32 t0, $w;", *(f"shr.u32 t{i}, $w, {4 * i};" for i in (1, 2, 3))]
    lines += [f"lop3.b32 t{i}, t{i}, 0x000f000f, {magic}, 0xea;" for i in range(4)]
    return _asm_of(8, 4, lines, ["t0", "t1", "t2", "t3"])


def _fp8(shift: int, mantissa: str, factor: str, dtype: str) -> str:
    """Four float8_e4m3fn: sign and the other bits moved to their places, times what the exponents'
    biases differ by."""
    lines = ["and.b32 t0, $w, 0x7f007f00;", f"shr.u32 t0, t0, {8 - shift};"]
    lines += [f"shl.b32 t1, $w, {shift};", f"and.b32 t1, t1, {mantissa};", "shl.b32 t2, $w, 8;"]
    lines += ["lop3.b32 t0, $w, 0x80008000, t0, 0xea;", "lop3.b32 t1, t2, 0x80008000, t1, 0xea;"]
    lines += [f"mov.b32 t3, {factor};", "mov.b32 t4, 0x80008000;"]
    lines += [f"fma.rn.{dtype} t1, t1, t3, t4;", f"fma.rn.{dtype} t0, t0, t3, t4;"]
    return _asm_of(4, 5, lines, ["t1", "t0"])


def _int8(magic: str, sixteen: str, least: str, one: str, minus: str, dtype: str) -> str:
    """Four codes of 0 to 255: both halves of each by their power of two, then put together."""
    lines = [f"mov.b32 t4, {sixteen};", f"mov.b32 t5, {least};"]
    lines += [f"mov.b32 t6, {one};", f"mov.b32 t7, {minus};"]
    for i, shift in enumerate((0, 8)):
        lines += [f"shr.u32 t0, $w, {shift};", f"shr.u32 t1, $w, {shift + 4};"]
        lines += [f"lop3.b32 t2, t0, 0x000f000f, {magic}, 0xea;"]
        lines += [f"lop3.b32 t3, t1, 0x000f000f, {magic}, 0xea;"]
        lines += [f"fma.rn.{dtype} t3, t3, t4, t5;", f"fma.rn.{dtype} t2, t2, t6, t7;"]
        lines += [f"fma.rn.{dtype} t{8 + i}, t2, t6, t3;"]
    return _asm_of(4, 10, lines, ["t8", "t9"])


DECODERS: Final[dict[tuple[str, torch.dtype], str]] = {
    ("int4", torch.bfloat16): _int4("0x43004300"),
    ("int4", torch.float16): _int4("0x64006400"),
    ("fp8", torch.bfloat16): _fp8(4, "0x07f007f0", "0x7b807b80", "bf16x2"),
    ("fp8", torch.float16): _fp8(7, "0x3f803f80", "0x5c005c00", "f16x2"),
    ("byte", torch.bfloat16): _int8(
        "0x43004300", "0x41804180", "0xc508c508", "0x3f803f80", "0xc300c300", "bf16x2"
    ),
    ("byte", torch.float16): _int8(
        "0x64006400", "0x4c004c00", "0xf408f408", "0x3c003c00", "0xe400e400", "f16x2"
    ),
} | LOOKUPS
"""PTX that turns a word into values of a type. Bits of powers of two: 2^7 and 2^10, into whose
mantissas a code fits; 16; -(16 * 2^7 + 128) and -(16 * 2^10 + 128); 1; -2^7 and -2^10; 2^120 and
2^8, by which e4m3's bias differs."""


@triton.jit
def _eight(words, tables, FORM: tl.constexpr, ASM: tl.constexpr, DT: tl.constexpr):
    """words int32 [...] -> [..., pair 2, half of rows 2, half of inputs 2]: eight values each."""
    if FORM == "int4":
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            ASM,
            "=h,=h,=h,=h,=h,=h,=h,=h,r",
            [words],
            dtype=(tl.int16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        a, b, c, d, e, f, g, h = looked_up(words, tables, FORM, ASM)
    first = tl.join(tl.join(a, b), tl.join(c, d))
    bits = tl.join(first, tl.join(tl.join(e, f), tl.join(g, h)))
    return bits.to(DT, bitcast=True)


@triton.jit
def _four(words, ASM: tl.constexpr, DT: tl.constexpr):
    """words int32 [...] -> [..., pair 2, half of inputs 2]: four values each."""
    if tl.bfloat16 == DT:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM, "=h,=h,=h,=h,r", [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=1
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM, "=h,=h,=h,=h,r", [words], dtype=(tl.float16,) * 4, is_pure=True, pack=1
        )
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def decode(
    words,
    tables,
    n,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    FORM: tl.constexpr,
    DT: tl.constexpr,
    ASM: tl.constexpr,
):
    """words int32 [2 * ROWS, words a thread] of rows n [ROWS] -> [ROWS, BK]: int4: code + 128 in
    bfloat16, + 1024 in float16; others: the values. tables: of tables_of."""
    FOUR: tl.constexpr = FORM != "byte" and FORM != "fp8"
    if ASM == "":
        WORDS: tl.constexpr = words.shape[1]
        EACH: tl.constexpr = 8 if FOUR else 4
        w = tl.broadcast_to(tl.reshape(words, [2 * ROWS, WORDS, 1]), [2 * ROWS, WORDS, EACH])
        i = tl.arange(0, EACH)
        if FOUR:
            # (half of inputs, half of rows, pair)
            place = i // 2 + i % 2 * 4 if FORM == "int4" else i // 2 % 2 * 4 + i // 4 * 2 + i % 2
            c = (w >> (4 * place)[None, None, :]) & 15
            # (16 rows, row of 8, 4 columns), 16 inputs, (half of inputs, half of rows, pair)
            c = tl.reshape(c, [ROWS // 16, 8, 4, BK // 16, 2, 2, 2])
            c = tl.permute(c, [0, 5, 1, 3, 4, 2, 6])
            if FORM == "int4":
                c = c.to(tl.float32)
            elif FORM == "row tables":
                c = tl.load(tables + n[:, None] * 16 + tl.reshape(c, [ROWS, BK]))
            else:
                c = tl.load(tables + c)
        else:
            byte = (w >> (8 * i)[None, None, :]) & 255
            if FORM == "byte":  # noqa: SIM108
                c = byte.to(tl.float32) - 128.0
            else:
                c = byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif FOUR:
        # ..., 16 inputs, (pair, half of rows, half of inputs)
        c = tl.reshape(_eight(words, tables, FORM, ASM, DT), [ROWS // 16, 8, 4, BK // 16, 2, 2, 2])
        c = tl.permute(c, [0, 5, 1, 3, 6, 2, 4])
    else:
        c = _four(words, ASM, DT)
    if not FOUR:
        # (16 rows, row of 8, 4 columns), (64 inputs, half of rows, 16 inputs), (pair, half of inputs)
        c = tl.reshape(c, [ROWS // 16, 8, 4, BK // 64, 2, 4, 2, 2])
        c = tl.permute(c, [0, 4, 1, 3, 5, 7, 2, 6])
    return tl.reshape(c, [ROWS, BK])


@triton.jit
def by_thread(words, FORM: tl.constexpr):
    """Words as `offsets` lays them out -> [threads, words]."""
    if FORM != "byte" and FORM != "fp8":
        CHUNKS: tl.constexpr = words.shape[0]
        THREADS: tl.constexpr = words.shape[1]
        return tl.reshape(tl.permute(words, [1, 0, 2]), [THREADS, 4 * CHUNKS])
    else:
        ROWS: tl.constexpr = words.shape[0]
        EACH: tl.constexpr = words.shape[1]
        # (16 rows, half of them, 8), (64 inputs, 4 columns, 16 inputs)
        w = tl.reshape(words, [ROWS // 16, 2, 8, EACH // 16, 4, 4])
        return tl.reshape(tl.permute(w, [0, 2, 4, 3, 1, 5]), [2 * ROWS, EACH // 2])


@triton.jit
def offsets(tile, K, BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr):
    """Where the words of a step lie, from the tile's first step on: in 4 bits [chunks, 2 * BN
    threads, 4], in 8 bits [BN, BK / 4]."""
    if FORM != "byte" and FORM != "fp8":
        CHUNKS: tl.constexpr = BK // 64
        thread = tl.arange(0, 2 * BN)
        strip = tile * (BN // 64) + thread // 128
        first = strip.to(tl.int64) * (K // 64 * 512) + thread % 128 * 4
        chunk = tl.arange(0, CHUNKS) * 512
        return first[None, :, None] + chunk[:, None, None] + tl.arange(0, 4)[None, None, :]
    else:
        row = tile * BN + tl.arange(0, BN)
        return row.to(tl.int64)[:, None] * (K // 4) + tl.arange(0, BK // 4)[None, :]


@triton.jit
def words_a_step(BK: tl.constexpr, FORM: tl.constexpr):
    """By how much `offsets` grow from one step to the next."""
    return BK // 4 if FORM == "byte" or FORM == "fp8" else BK * 8


@triton.jit
def input_at(place):
    """Which of the inputs has its code of 8 bits at `place` of a row: PERMUTED."""
    span = place // 64 * 64
    column = place % 64 // 16
    chunk = place % 16 // 4
    pair = place % 4 // 2
    half = place % 2
    return span + 16 * chunk + 8 * half + 2 * column + pair


def pack_words(codes: Tensor, form: str) -> Tensor:
    """codes [N, K] uint8, N and K multiples of 64: 0 to 15, in 8 bits the byte that is decoded
    (INT8: + 128) -> words as in packed_matrix.PackedMatrix."""
    n, k = codes.shape
    if form in EIGHT_BITS:
        by_span = codes.view(n, k // SPAN, SPAN)
        return by_span[:, :, list(PERMUTED)].reshape(n, k).view(torch.int32)
    # rows: 64, a warp's 16, half of them, 8; inputs: 64, 16, half of them, a thread's column, pair
    parts = codes.view(n // 64, 4, 2, 8, k // 16, 2, 4, 2).permute(0, 4, 1, 3, 6, 5, 2, 7)
    # a thread's 8 codes of 16 inputs are a word, and 4 such words follow each other
    each = parts.reshape(n // 64, k // 64, 4, 128, 8).transpose(2, 3)
    words = torch.zeros(each.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(8):
        place = i // 2 + i % 2 * 4 if form == INT4 else i // 2 % 2 * 4 + i // 4 * 2 + i % 2
        words |= each[..., i].int() << 4 * place
    return words
