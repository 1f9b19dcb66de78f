"""Top-k, top-p and min-p as one threshold a row, found by search over the ordered bit patterns of the logits; nothing is sorted.

A pass counts, or weighs, the tokens at or above a few pivots at once and narrows the interval to the one between two of them. Tokens equal to
the threshold are all kept. Order of the rules: min-p and top-k on the whole distribution, then top-p on what they left, renormalised.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """int32 keys in the order of the float32 values x."""
    i = x.to(tl.int32, bitcast=True)
    return i ^ ((i >> 31) & 0x7FFFFFFF)


@triton.jit
def from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weigh(logits, width, pivots, floor, peak, scale, SHIFT: tl.constexpr, BY_MASS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr):
    """float32 [P]: how many tokens (BY_MASS: how much exp((x - peak) * scale)) lie at or above each pivot and at or above `floor`."""
    total = tl.zeros([P], tl.float32)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < width, other=float("-inf")).to(tl.float32)
        weight = tl.where((x >= floor) & (i < width), 1.0, 0.0)
        if BY_MASS:
            weight *= tl.exp((x - peak) * scale)
        above = (ordered(x) >> SHIFT)[:, None] >= pivots[None, :]
        total += tl.sum(tl.where(above, weight[:, None], 0.0), 0)
    return total


@triton.jit
def search(logits, width, target, floor, peak, scale, SHIFT: tl.constexpr, BY_MASS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr):
    """float32: the largest logit such that the tokens at or above it number, or weigh, at least `target`."""
    lo = (ordered(floor) >> SHIFT).to(tl.int64)
    hi = (ordered(peak) >> SHIFT).to(tl.int64) + 1
    while hi - lo > 1:
        step = tl.maximum((hi - lo) // (P + 1), 1)
        pivots = tl.minimum(lo + (tl.arange(0, P) + 1) * step, hi)
        enough = _weigh(logits, width, pivots.to(tl.int32), floor, peak, scale, SHIFT, BY_MASS, BLOCK, P) >= target
        enough = enough & (pivots < hi)
        lo = tl.max(tl.where(enough, pivots, lo), 0)
        hi = tl.min(tl.where(enough, hi, pivots), 0)
    return from_key((lo << SHIFT).to(tl.int32))


@triton.jit
def _row_peak(logits, width, BLOCK: tl.constexpr):
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(logits + i, mask=i < width, other=float("-inf")).to(tl.float32))
    return tl.max(best, 0)


@triton.jit
def _thresholds(logits, temperature, top_k, top_p, min_p, out, width, stride, SHIFT: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr):
    row = tl.program_id(0)
    heat = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    least = tl.load(min_p + row)
    by_k = (k > 0) & (k < width)
    if (heat < 1e-5) | ((by_k == 0) & (p >= 1.0) & (least <= 0.0)):
        tl.store(out + row, float("-inf"))
        return
    at = logits + row.to(tl.int64) * stride
    scale = 1.0 / heat
    peak = _row_peak(at, width, BLOCK)
    floor = tl.full([], float("-inf"), tl.float32)
    if by_k:
        floor = search(at, width, k.to(tl.float32), floor, peak, 0.0, SHIFT, False, BLOCK, P)
    if least > 0.0:
        floor = tl.maximum(floor, peak + heat * tl.log(least))
    if p < 1.0:
        bottom = tl.full([1], -2147483648, tl.int32)
        mass = tl.sum(_weigh(at, width, bottom, floor, peak, scale, 0, True, BLOCK, 1), 0)
        floor = tl.maximum(floor, search(at, width, p * mass, floor, peak, scale, SHIFT, True, BLOCK, P))
    tl.store(out + row, floor)
