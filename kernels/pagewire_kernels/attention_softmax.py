"""What the decode kernels share: tiles of a request's keys and values in an online softmax, and the
merge of the partial results of splits."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Values inside a kernel have types that only Triton's compiler knows.

import triton
import triton.language as tl

from .attention_common import (
    MASKED,
    load_pages,
    load_tile,
    raw_scores,
    score_scale,
    softmax_step,
    with_slopes,
)


@triton.jit
def _merge_tile(part, lse, base, first, active, acc, peak, total, GROUP, STRIDE: tl.constexpr, GP, SB, D, D_PAD):  # fmt: skip
    """Fold SB partial results, from number `first` on, of the GP heads at `base` into (acc [GP,
    D_PAD], peak [GP], total [GP])."""
    s = first + tl.arange(0, SB)
    g = tl.arange(0, GP)
    d = tl.arange(0, D_PAD)
    seen = (s < active)[:, None] & (g < GROUP)[None, :]
    slot = base + g[None, :] * STRIDE + s[:, None]
    weight_log = tl.load(lse + slot, mask=seen, other=-1e30, cache_modifier=".cg")
    tile = tl.load(
        part + slot[:, :, None] * D + d[None, None, :],
        mask=seen[:, :, None] & (d < D)[None, None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    new_peak = tl.maximum(peak, tl.max(weight_log, 0))
    weight = tl.where(seen, tl.exp2(weight_log - new_peak[None, :]), 0.0)
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weight, 0)
    acc = acc * shrink[:, None] + tl.sum(
        tl.where(weight[:, :, None] > 0, tile * weight[:, :, None], 0.0), 0
    )
    return acc, new_peak, total


@triton.jit
def merge(part, lse, out, base, out_base, active, GROUP: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
        GP: tl.constexpr, SB: tl.constexpr):  # fmt: skip
    """Combine the first `active` partial results of the heads at `base` into out."""
    acc = tl.zeros([GP, D_PAD], tl.float32)
    peak = tl.full([GP], MASKED, tl.float32)
    total = tl.zeros([GP], tl.float32)
    for first in range(0, active, SB):
        acc, peak, total = _merge_tile(
            part, lse, base, first, active, acc, peak, total, GROUP, STRIDE, GP, SB, D, D_PAD
        )
    g = tl.arange(0, GP)
    d = tl.arange(0, D_PAD)
    result = (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty)
    tl.store(
        out + out_base + g[:, None] * D + d[None, :],
        result,
        mask=(g < GROUP)[:, None] & (d < D)[None, :],
    )


@triton.jit
def fold_tile(q, k, v, n, acc, peak, total, stop, visible_from, position, slope, scale_log2, softcap, WINDOW: tl.constexpr,
        CAP: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Fold a tile of tokens n, as far as they come before `stop`, into the online softmax (acc [M,
    D_PAD], peak [M], total [M]) of the rows of q, whose token is at `position`."""
    s = raw_scores(q, k, scale_log2, softcap, CAP, PRECISION)
    s = visible_scores(s, n, stop, visible_from, position, slope, scale_log2, WINDOW, CAP, ALIBI)
    scale = score_scale(scale_log2, CAP or ALIBI)
    return softmax_step(s, v, acc, peak, total, scale, PRECISION)


@triton.jit
def walk(q, acc, peak, total, k_base, v_base, table, lo, hi, visible_from, position, slope, block_stride, scale_log2, softcap,
        D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
        ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """fold_tile of tokens lo..hi."""
    page = load_pages(table, lo, hi, PAGE, BLOCK_N, False)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        k = load_tile(
            k_base, page, start, hi, block_stride, PAGE, D, D_PAD, BLOCK_N, WIDE, False, True
        )
        v = load_tile(
            v_base, page, start, hi, block_stride, PAGE, D, D_PAD, BLOCK_N, WIDE, False, True
        )
        page = load_pages(table, start + BLOCK_N, hi, PAGE, BLOCK_N, False)
        acc, peak, total = fold_tile(
            q, k, v, n, acc, peak, total, hi, visible_from, position, slope, scale_log2, softcap, WINDOW, CAP, ALIBI, PRECISION
        )  # fmt: skip
    return acc, peak, total


@triton.jit
def visible_scores(s, n, stop, visible_from, position, slope, scale_log2, WINDOW: tl.constexpr, CAP: tl.constexpr,
        ALIBI: tl.constexpr):  # fmt: skip
    """Raw scores of tokens n, with slopes, masked from `stop` on and before `visible_from`."""
    if ALIBI:
        s = with_slopes(s, (n - position)[None, :], slope, scale_log2, CAP)
    visible = n < stop
    if WINDOW > 0:
        visible = visible & (n >= visible_from)
    return tl.where(visible[None, :], s, MASKED)
