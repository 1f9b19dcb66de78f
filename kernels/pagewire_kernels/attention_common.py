"""What the attention kernels share: addresses of tokens in pages, scaled scores, one step of the online softmax.

Scores live in base 2: `scale_log2` is the softmax scale times log2(e), so that exp2 replaces exp. Masked scores are a large negative number
rather than minus infinity: no NaN arises where a whole tile is masked, and the next visible token wipes out what such a tile left.
"""

from typing import Final

import triton
import triton.language as tl

LOG2E: Final = 1.4426950408889634
MASKED: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def load_pages(table, start, stop, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """int32 [BLOCK_N]: the pages of tokens start..; 0 from `stop` on. Loops load them one tile ahead, so that the tiles of a pipeline do not wait."""
    n = start + tl.arange(0, BLOCK_N)
    return tl.load(table + n // PAGE, mask=n < stop, other=0)


@triton.jit
def page_offsets(page, n, block_stride, PAGE: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """[BLOCK_N]: where the rows of tokens n lie in a cache. WIDE: offsets need 64 bits."""
    if WIDE:
        return page.to(tl.int64) * block_stride + (n % PAGE) * D
    return page * block_stride + (n % PAGE) * D


@triton.jit
def load_rows(base, offsets, n, stop, D: tl.constexpr, D_PAD: tl.constexpr, BOUNDED: tl.constexpr):
    """[BLOCK_N, D_PAD] rows of a cache; what lies past `stop` or past D reads as zero."""
    d = tl.arange(0, D_PAD)
    at = base + offsets[:, None] + d[None, :]
    if BOUNDED:
        if D == D_PAD:
            return tl.load(at, mask=(n < stop)[:, None], other=0.0)
        return tl.load(at, mask=(n < stop)[:, None] & (d < D)[None, :], other=0.0)
    if D == D_PAD:
        return tl.load(at)
    return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def scaled_scores(q, k, scale_log2, soft_cap, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """float32 [M, N] scores times log2(e). With CAP, soft_cap * tanh(score / soft_cap) is taken before the change of base."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CAP:
        x = s * (scale_log2 / (1.4426950408889634 * soft_cap))
        s = soft_cap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))
    else:
        s = s * scale_log2
    return s


@triton.jit
def softmax_step(s, v, acc, peak, total, PRECISION: tl.constexpr):
    """Fold scores s [M, N] and values v [N, D] into the running (acc [M, D], peak [M], total [M])."""
    new_peak = tl.maximum(peak, tl.max(s, 1))
    p = tl.exp2(s - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_peak, total
