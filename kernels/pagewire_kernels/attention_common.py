"""What the attention kernels share: addresses of tokens in pages, scaled scores, one step of the
online softmax.

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


@triton.jit
def _page_tile(base, page, start, stop, block_stride, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
        BOUNDED: tl.constexpr):  # fmt: skip
    """load_tile for whole pages: the rows of a page differ by constants, which leaves registers
    free."""
    r = tl.arange(0, PAGE)
    d = tl.arange(0, D_PAD)
    at = base + (page * block_stride)[:, None, None] + (r * D)[None, :, None] + d[None, None, :]
    if BOUNDED:
        n = start + (tl.arange(0, BLOCK_N // PAGE) * PAGE)[:, None] + r[None, :]
        tile = tl.load(at, mask=(n < stop)[:, :, None] & (d < D)[None, None, :], other=0.0)
    elif D == D_PAD:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(d < D)[None, None, :], other=0.0)
    return tl.reshape(tile, [BLOCK_N, D_PAD])


@triton.jit
def _row_tile(base, page, start, stop, block_stride, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
        BOUNDED: tl.constexpr):  # fmt: skip
    """load_tile with a lookup for each token."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    at = base + (page * block_stride + (n % PAGE) * D)[:, None] + d[None, :]
    if BOUNDED:
        return tl.load(at, mask=(n < stop)[:, None] & (d < D)[None, :], other=0.0)
    return tl.load(at, mask=(d < D)[None, :], other=0.0)


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
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
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
    new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_peak, total
