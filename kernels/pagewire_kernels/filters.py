"""Top-k, top-p and min-p as one threshold a row, found by search over values; nothing is sorted.

A pass over the row counts, or weighs, the tokens at or above a few pivots at once and narrows the
interval to the one between two of them. Order of the rules: min-p and top-k on the whole
distribution, then top-p on what they left, renormalised. Tokens equal to the k-th largest are all
kept; for top-p so are tokens within TOLERANCE times the temperature below the last one needed, a
ratio of 1.0005 in probability.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import triton
import triton.language as tl

from . import sampling_map

TOLERANCE: tl.constexpr = tl.constexpr(5e-4)
MAX_PASSES: tl.constexpr = tl.constexpr(24)
# Rows of `SamplingRows.values`.
TEMPERATURE: tl.constexpr = tl.constexpr(sampling_map.TEMPERATURE)
TOP_K: tl.constexpr = tl.constexpr(sampling_map.TOP_K)
TOP_P: tl.constexpr = tl.constexpr(sampling_map.TOP_P)
MIN_P: tl.constexpr = tl.constexpr(sampling_map.MIN_P)


@triton.jit
def _weigh(logits, width, p1, p2, p3, p4, peak, scale, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens (BY_MASS: how much exp((x - peak) * scale)) lie at or above each of four
    pivots; float32 scalars."""
    w1 = tl.zeros([BLOCK], tl.float32)
    w2 = tl.zeros([BLOCK], tl.float32)
    w3 = tl.zeros([BLOCK], tl.float32)
    w4 = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=4):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < width, other=float("-inf")).to(tl.float32)
        weight = 1.0
        if BY_MASS:
            weight = tl.exp((x - peak) * scale)
        w1 += tl.where(x >= p1, weight, 0.0)
        w2 += tl.where(x >= p2, weight, 0.0)
        w3 += tl.where(x >= p3, weight, 0.0)
        w4 += tl.where(x >= p4, weight, 0.0)
    return tl.sum(w1, 0), tl.sum(w2, 0), tl.sum(w3, 0), tl.sum(w4, 0)


@triton.jit
def _narrow(lo, hi, have, pivot, reached, target):
    """The interval after one pivot; pivots must come in ascending order."""
    enough = (reached >= target) & (pivot > lo)
    below = (reached < target) & (pivot < hi)
    return tl.where(enough, pivot, lo), tl.where(below, pivot, hi), tl.where(enough, reached, have)


@triton.jit
def _search(
    logits,
    width,
    target,
    lo,
    peak,
    scale,
    least_step,
    ulp,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A value in lo..peak such that the tokens at or above it number, or weigh, at least `target`,
    and few more would do so.

    The tokens at or above `lo` must reach the target. It ends when the interval holds no two values
    that are `ulp` (relative) or `least_step` apart, or when the target is met exactly.
    """
    hi = peak + tl.maximum(tl.abs(peak), 1.0) * 1e-3
    have = target + 1.0
    passes = 0
    while (
        (hi - lo > tl.maximum(least_step, ulp * tl.minimum(tl.abs(lo), tl.abs(hi))))
        & (have != target)
        & (passes < MAX_PASSES)
    ):
        step = (hi - lo) * 0.2
        p1 = lo + step
        p2 = lo + 2.0 * step
        p3 = lo + 3.0 * step
        p4 = lo + 4.0 * step
        r1, r2, r3, r4 = _weigh(logits, width, p1, p2, p3, p4, peak, scale, BY_MASS, BLOCK)
        lo, hi, have = _narrow(lo, hi, have, p1, r1, target)
        lo, hi, have = _narrow(lo, hi, have, p2, r2, target)
        lo, hi, have = _narrow(lo, hi, have, p3, r3, target)
        lo, hi, have = _narrow(lo, hi, have, p4, r4, target)
        passes += 1
    return lo


@triton.jit
def _row_range(logits, width, BLOCK: tl.constexpr):
    """The largest and the least finite logit of a row, and how many are finite."""
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, width, BLOCK, num_stages=4):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < width, other=float("-inf")).to(tl.float32)
        finite = x > float("-inf")
        high = tl.maximum(high, x)
        low = tl.minimum(low, tl.where(finite, x, float("inf")))
        count += finite.to(tl.int32)
    return tl.max(high, 0), tl.min(low, 0), tl.sum(count, 0)


@triton.jit(do_not_specialize=["values_stride"])
def _thresholds(
    logits,
    values,
    out,
    width,
    stride,
    values_stride,
    ULP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    temperature = tl.load(values + TEMPERATURE * values_stride + row)
    k = tl.load(values + TOP_K * values_stride + row)
    p = tl.load(values + TOP_P * values_stride + row)
    least = tl.load(values + MIN_P * values_stride + row)
    if (temperature < 1e-5) | (((k <= 0) | (k >= width)) & (p >= 1.0) & (least <= 0.0)):
        tl.store(out + row, float("-inf"))
        return
    row_logits = logits + row.to(tl.int64) * stride
    scale = 1.0 / temperature
    peak, low, finite = _row_range(row_logits, width, BLOCK)
    floor = tl.full([], float("-inf"), tl.float32)
    if (k > 0) & (k < finite):
        floor = _search(row_logits, width, k, low, peak, 0.0, 1e-7, ULP, False, BLOCK)
    if least > 0.0:
        floor = tl.maximum(floor, peak + temperature * tl.log(least))
    if p < 1.0:
        low = tl.maximum(tl.maximum(low, floor), peak - 40.0 * temperature)
        mass, _, _, _ = _weigh(row_logits, width, low, low, low, low, peak, scale, True, BLOCK)
        gap = TOLERANCE * temperature
        nucleus = _search(row_logits, width, p * mass, low, peak, scale, gap, ULP, True, BLOCK)
        floor = tl.maximum(floor, nucleus)
    tl.store(out + row, floor)
