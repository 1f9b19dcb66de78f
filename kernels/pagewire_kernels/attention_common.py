"""What the attention kernels share: addresses of tokens in pages, numbers of 8-bit codes, scaled
scores, one step of the online softmax.

Scores live in base 2: `scale_log2` is the softmax scale times log2(e), so that exp2 replaces exp.
The running peak begins at a large negative number. Where a whole tile may be hidden from a row,
hidden scores are minus infinity: their exponents are then exactly zero. A large finite number would
not do, since the GPU multiplies and subtracts in one rounding, and the exact product may lie far
above the rounded peak.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from typing import Final

import triton
import triton.language as tl

LOG2E: Final = 1.4426950408889634
MASKED: tl.constexpr = tl.constexpr(-1e30)
HIDDEN: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def load_pages(
    table, start, stop, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, PER_PAGE: tl.constexpr
):
    """int32 pages of tokens start.., one a page of the tile or one a token; 0 from `stop` on. Loops
    load them a tile ahead of their use.

    PER_PAGE asks for whole pages in a tile: PAGE a power of two that divides BLOCK_N, and `start` a
    multiple of PAGE.
    """
    COUNT: tl.constexpr = BLOCK_N // PAGE if PER_PAGE else BLOCK_N
    n = start + tl.arange(0, COUNT) * (BLOCK_N // COUNT)
    return tl.load(table + n // PAGE, mask=n < stop, other=0)


def _shift(out: str, number: str, sign: str, dtype: str) -> str:
    """Machine instructions that make two 16-bit floats of two codes. number, sign: instructions
    that leave a code's lowest 7 bits, and its sign, where the type has them."""
    mask, power, product = {
        "bf16": ("0x07f007f0", "0x7b807b80", "fma.rn.bf16x2 {}, n, c, z;"),  # times 2**120
        "f16": ("0x3f803f80", "0x5c005c00", "mul.rn.f16x2 {}, n, c;"),  # times 2**8
    }[dtype]
    return (
        f"{number} and.b32 n, n, {mask}; {sign} and.b32 s, s, 0x80008000; or.b32 n, n, s; "
        f"mov.b32 c, {power}; {product.format(out)}"
    )


def _bytes_asm(dtype: str) -> tl.constexpr:
    """Of four bytes to four numbers in their order."""
    right = {"bf16": 4, "f16": 1}[dtype]
    halves = [
        f"prmt.b32 w, $2, 0, {chosen}; "
        + _shift(out, f"shr.b32 n, w, {right};", "mov.b32 s, w;", dtype)
        for out, chosen in (("$0", "0x1404"), ("$1", "0x3424"))
    ]
    return _block(halves)


def _pairs_asm(dtype: str) -> tl.constexpr:
    """Of two words of two bytes each: the numbers of the lower bytes, then of the higher ones."""
    left, right = {"bf16": (4, 4), "f16": (7, 1)}[dtype]
    lower = _shift("$0", f"shl.b32 n, $2, {left};", "shl.b32 s, $2, 8;", dtype)
    higher = _shift("$1", f"shr.b32 n, $2, {right};", "mov.b32 s, $2;", dtype)
    return _block([lower, higher])


def _block(parts: list[str]) -> tl.constexpr:
    return tl.constexpr(
        "{ .reg .b32 w, n, s, c, z; mov.b32 z, 0x80008000; " + " ".join(parts) + " }"
    )


BYTES_TO_BF16: tl.constexpr = _bytes_asm("bf16")
BYTES_TO_F16: tl.constexpr = _bytes_asm("f16")
PAIRS_TO_BF16: tl.constexpr = _pairs_asm("bf16")
PAIRS_TO_F16: tl.constexpr = _pairs_asm("f16")


@triton.jit
def _from_bits(code, TYPE: tl.constexpr):
    """Numbers of codes (int16, 0 to 255), in operations that all devices and types have."""
    shifted = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    # float16 has 8 more below its exponent's zero, for subnormal numbers too
    number = shifted.to(tl.float16, bitcast=True) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), number).to(TYPE)


@triton.jit
def numbers(tile, TYPE: tl.constexpr, FORM: tl.constexpr):
    """Elements of a cache as TYPE, exactly, where those of a thread follow each other. FORM:
    kv_cache.KernelCaches.form."""
    if FORM == "full":
        return tile
    elif FORM == "e4m3_bits" or tl.float32 == TYPE:
        return _from_bits(tile.to(tl.int16), TYPE)
    elif tl.bfloat16 == TYPE:
        return tl.inline_asm_elementwise(BYTES_TO_BF16, "=r,=r,r", [tile], tl.bfloat16, True, 4)
    else:
        return tl.inline_asm_elementwise(BYTES_TO_F16, "=r,=r,r", [tile], tl.float16, True, 4)


@triton.jit
def pair_numbers(tile, TYPE: tl.constexpr, FORM: tl.constexpr):
    """Words (int16) of two codes as TYPE, exactly: a tile of the lower bytes and one of the higher
    ones.

    Tensor cores take neighbours in the dimension that is summed over. Of values these are tokens,
    whose bytes would have to be loaded one by one.
    """
    if FORM == "e4m3_bits" or tl.float32 == TYPE:
        return _from_bits(tile & 0xFF, TYPE), _from_bits((tile >> 8) & 0xFF, TYPE)
    elif tl.bfloat16 == TYPE:
        return tl.inline_asm_elementwise(
            PAIRS_TO_BF16, "=r,=r,r", [tile], (tl.bfloat16, tl.bfloat16), True, 2
        )
    else:
        return tl.inline_asm_elementwise(
            PAIRS_TO_F16, "=r,=r,r", [tile], (tl.float16, tl.float16), True, 2
        )


@triton.jit
def codes(x, scale):
    """float32 x / scale as bytes of e4m3: the nearest, ties to even; saturating at 448. NaN stays
    NaN. In integers, which all GPUs and the interpreter round alike."""
    bits = tl.div_rn(x, scale).to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    is_nan = size > 0x7F800000
    size = tl.minimum(size, 0x43E00000)
    # below 2**-6 codes count steps of 2**-9, which is what float32 keeps beside 2**14
    steps = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    rounded = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    code = tl.where(size < (121 << 23), steps, rounded)
    return (tl.where(is_nan, 0x7F, code) | sign).to(tl.uint8)


@triton.jit
def kept(x, scale, pointer, FORM: tl.constexpr):
    """x, of the model's type, as a cache behind `pointer` holds it."""
    if FORM == "full":
        return x.to(pointer.dtype.element_ty)
    else:
        return codes(x.to(tl.float32), scale)


@triton.jit
def _page_tile(base, page, start, stop, block_stride, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
        BOUNDED: tl.constexpr):  # fmt: skip
    """load_tile for whole pages: the rows of a page differ by constants, which leaves registers
    free."""
    r = tl.arange(0, PAGE)
    d = tl.arange(0, D_PAD)
    pointers = (
        base + (page * block_stride)[:, None, None] + (r * D)[None, :, None] + d[None, None, :]
    )
    if BOUNDED:
        n = start + (tl.arange(0, BLOCK_N // PAGE) * PAGE)[:, None] + r[None, :]
        tile = tl.load(pointers, mask=(n < stop)[:, :, None] & (d < D)[None, None, :], other=0)
    elif D == D_PAD:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(d < D)[None, None, :], other=0)
    return tl.reshape(tile, [BLOCK_N, D_PAD])


@triton.jit
def _row_tile(base, page, start, stop, block_stride, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
        BOUNDED: tl.constexpr):  # fmt: skip
    """load_tile with a lookup for each token."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    pointers = base + (page * block_stride + (n % PAGE) * D)[:, None] + d[None, :]
    if BOUNDED:
        return tl.load(pointers, mask=(n < stop)[:, None] & (d < D)[None, :], other=0)
    return tl.load(pointers, mask=(d < D)[None, :], other=0)


@triton.jit
def load_tile(base, page, start, stop, block_stride, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
        WIDE: tl.constexpr, PER_PAGE: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    """[BLOCK_N, D_PAD] rows of one head's keys or values from token `start` on. `page` comes from
    load_pages; WIDE: offsets need 64 bits.

    What lies past D reads as zero, and with BOUNDED what lies past `stop`, which may be anything in
    memory.
    """
    if WIDE:
        page = page.to(tl.int64)
    if PER_PAGE:
        return _page_tile(base, page, start, stop, block_stride, PAGE, D, D_PAD, BLOCK_N, BOUNDED)
    else:
        return _row_tile(base, page, start, stop, block_stride, PAGE, D, D_PAD, BLOCK_N, BOUNDED)


@triton.jit
def raw_scores(q, k, scale_log2, softcap, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """float32 [M, N], still to be multiplied by `score_scale`. With CAP: softcap * tanh(scaled
    score / softcap), already in base 2."""
    return capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale_log2, softcap, CAP)


@triton.jit
def capped(s, scale_log2, softcap, CAP: tl.constexpr):
    """raw_scores of products s."""
    if CAP:
        x = s * (scale_log2 / (1.4426950408889634 * softcap))
        s = softcap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))
    return s


@triton.jit
def score_scale(scale_log2, READY: tl.constexpr):
    """What scores are multiplied by inside the exponent, where it costs nothing: 1 where they are
    in base 2 already (READY)."""
    if READY:
        return scale_log2 * 0.0 + 1.0
    return scale_log2


@triton.jit
def with_slopes(s, distance, slope, scale_log2, CAP: tl.constexpr):
    """Scores [M, N] in base 2 with ALiBi: slope [M], in base 2, times `distance` [M, N], the key's
    position less the query's."""
    if not CAP:
        s = s * scale_log2
    return s + slope[:, None] * distance.to(tl.float32)


@triton.jit
def softmax_step(s, v, acc, peak, total, scale, PRECISION: tl.constexpr):
    """Fold scores s [M, N], to be multiplied by `scale`, and values v [N, D] into the running (acc
    [M, D], peak [M], total [M])."""
    p, shrink, peak, total = softmax_weights(s, peak, total, scale)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, peak, total


@triton.jit
def softmax_weights(s, peak, total, scale):
    """Weights [M, N] of scores s, to be multiplied by `scale`, relative to the new peak; what
    earlier results shrink by; new peak and total."""
    new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    return p, shrink, new_peak, total * shrink + tl.sum(p, 1)
