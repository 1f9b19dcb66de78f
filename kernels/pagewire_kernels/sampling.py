"""The next token of each row from its logits: greedy, or by adding Gumbel noise and taking the
largest, which samples the softmax without a sort.

The random map is `sampling_map.sample`'s, which the CPU has too. The noise of vocabulary id v is a
pure function of (seed, position, v): Philox4x32-10 with the seed as key and (v // 4, position, 0)
as counter, word v % 4, as u = (word + 0.5) / 2**32 and noise -log(-log(1 - u)). So a resumed
request, another batch or another row of it draws the same. A row with a NaN among its logits is
flagged, never sampled from silently. Knows nothing of requests or of what the ids mean.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .filters import _thresholds
from .sampling_map import Sampled, SamplingRows
from .shapes import KIB_163, Candidate, Choice
from .workspace import counters

_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The least distance of two values of a dtype relative to the larger: a search need not go below
it."""


@triton.jit
def _log(x, FAST: tl.constexpr):
    """Natural logarithm; FAST: within 2**-21 of it, for a fifth of the instructions (the
    interpreter has none such)."""
    if FAST:
        return libdevice.fast_logf(x)
    return tl.log(x)


@triton.jit
def gumbel(seed, position, first, BLOCK: tl.constexpr, FAST: tl.constexpr):
    """Noise for the BLOCK vocabulary ids from `first`, a multiple of 4, on."""
    c0 = first // 4 + tl.arange(0, BLOCK // 4)
    zero = c0 * 0
    a, b, c, d = tl.philox(
        seed, c0, zero + position.to(tl.int32), zero + (position >> 32).to(tl.int32), zero
    )
    word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    u = (word.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1.0 + u * (0.5 + u * (0.33333333 + u * 0.25)))
    wait = tl.where(u < 0.01, series, -_log(tl.maximum(1.0 - u, 2.98e-8), FAST))
    return -_log(wait, FAST)


@triton.jit
def scale_of(temperature):
    """What logits are multiplied by before noise is added; 1 where none is."""
    return tl.where(temperature >= 1e-5, 1.0 / tl.maximum(temperature, 1e-5), 1.0)


@triton.jit
def _slice(
    logits, words, lo, hi, threshold, temperature, seed, position,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Best score and its id, running log-sum-exp (peak, total) and NaN flag of the ids lo..hi, each
    [BLOCK]. MASKED: tokens whose bits in `words` are not set count as minus infinity; else `words`
    is any pointer."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    peak = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    scale = scale_of(temperature)
    for start in tl.range(lo, hi, BLOCK, num_stages=3):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < hi, other=float("-inf")).to(tl.float32)
        if MASKED:
            word = tl.load(words + i // 32, mask=i < hi, other=0)
            x = tl.where(((word >> (i % 32)) & 1) != 0, x, float("-inf"))
        bad = bad | (x != x).to(tl.int32)
        x = tl.where(x != x, float("-inf"), x)
        score = x * scale
        if temperature >= 1e-5:
            score += gumbel(seed, position, start, BLOCK, FAST)
        score = tl.where(x >= threshold, score, float("-inf"))
        where = tl.where(score > best, i, where)
        best = tl.maximum(best, score)
        small = tl.exp(-tl.abs(x - peak))
        total = tl.where(x > peak, total * small + 1.0, total + small)
        peak = tl.maximum(peak, x)
    return best, where, peak, total, bad


@triton.jit
def _finish(numbers, ids, logits, tokens, logprobs, bads, row, slices, S_PAD: tl.constexpr):
    """Combine the slices of a row: numbers float32 [slices, 4] are best, peak, total and NaN count,
    ids int32 [slices]."""
    s = tl.arange(0, S_PAD)
    pointers = numbers + (row * slices + s) * 4
    inside = s < slices
    best = tl.load(pointers, mask=inside, other=float("-inf"), cache_modifier=".cg")
    peak = tl.load(pointers + 1, mask=inside, other=-1e30, cache_modifier=".cg")
    total = tl.load(pointers + 2, mask=inside, other=0.0, cache_modifier=".cg")
    bad = tl.load(pointers + 3, mask=inside, other=0.0, cache_modifier=".cg")
    where = tl.load(ids + row * slices + s, mask=inside, other=2147483647, cache_modifier=".cg")
    token = tl.min(tl.where(best == tl.max(best, 0), where, 2147483647), 0)
    top = tl.max(peak, 0)
    log_total = top + tl.log(tl.maximum(tl.sum(total * tl.exp(peak - top), 0), 1e-38))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.load(logits + token).to(tl.float32) - log_total)
    tl.store(bads + row, tl.sum(bad, 0) > 0)


@triton.jit(do_not_specialize=["slices"])
def _sample(logits, thresholds, temperatures, seeds, positions, numbers, ids, arrived, tokens, logprobs, bads, width, stride,
            slices, S_PAD: tl.constexpr, BLOCK: tl.constexpr, FILTERED: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row_logits = logits + row * stride
    span = tl.cdiv(tl.cdiv(width, slices), BLOCK) * BLOCK
    lo = part * span
    hi = tl.minimum(lo + span, width)
    threshold = tl.full([], float("-inf"), tl.float32)
    if FILTERED:
        threshold = tl.load(thresholds + row)
    temperature = tl.load(temperatures + row)
    best, where, peak, total, bad = _slice(
        row_logits,
        row_logits,
        lo,
        hi,
        threshold,
        temperature,
        tl.load(seeds + row),
        tl.load(positions + row),
        False,
        BLOCK,
        FAST,
    )
    winner = tl.max(best, 0)
    token = tl.min(tl.where(best == winner, where, 2147483647), 0)
    top = tl.max(peak, 0)
    out = numbers + (row * slices + part) * 4
    tl.store(out, winner)
    tl.store(out + 1, top)
    tl.store(out + 2, tl.sum(total * tl.exp(peak - top), 0))
    tl.store(out + 3, tl.sum(bad, 0).to(tl.float32))
    tl.store(ids + row * slices + part, token)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1) == slices - 1:
        tl.store(arrived + row, 0)
        _finish(numbers, ids, row_logits, tokens, logprobs, bads, row, slices, S_PAD)


@functools.cache
def choose_block(itemsize: int) -> Choice[int]:
    """Logits a step of the search, three of which are under way beside the one in work: in float32,
    8192 are all but 3 KiB of what the smallest cards have."""
    shapes = (
        Candidate(8192, KIB_163 if itemsize == 4 else 0),
        Candidate(4096, 0),
        Candidate(1024, 0),
    )
    return Choice(f"top-k and top-p ({itemsize} bytes an element)", shapes)


def thresholds(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """float32 [B]: the least logit that top-k, top-p and min-p leave to each row; minus infinity
    where nothing restricts it."""
    out = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)

    def launch(block: int) -> None:
        _thresholds[(logits.shape[0],)](logits, rows.values, out, logits.shape[1], logits.stride(0), rows.values.stride(0),
                                        ULP=_ULP[logits.dtype], BLOCK=block, num_warps=16)  # fmt: skip

    choose_block(logits.element_size()).launch(logits.device, launch)
    return out


def slices_of(count: int, width: int, block: int) -> int:
    """Programs that share one of `count` rows of `width` logits, of which each looks at multiples
    of `block`."""
    return max(1, min(-(-width // block), -(-2048 // count)))


def sample(logits: torch.Tensor, rows: SamplingRows) -> Sampled:
    """One token a row of logits [B, V] (float32, float16 or bfloat16; rows may be strided)."""
    count, width = logits.shape
    device = logits.device
    block = 1024
    slices = slices_of(count, width, block)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    logprobs = torch.empty(count, dtype=torch.float32, device=device)
    bad = torch.empty(count, dtype=torch.bool, device=device)
    numbers = torch.empty(count * slices * 4, dtype=torch.float32, device=device)
    ids = torch.empty(count * slices, dtype=torch.int32, device=device)
    least = thresholds(logits, rows) if rows.filtered else None
    _sample[(count, slices)](logits, least, rows.temperature, rows.seeds, rows.positions, numbers, ids, counters(device, "sampling",
        count), tokens, logprobs, bad, width,
                             logits.stride(0), slices, S_PAD=triton.next_power_of_2(slices), BLOCK=block, FILTERED=rows.filtered,
                             FAST=device.type == "cuda", num_warps=4)  # fmt: skip
    return Sampled(tokens, logprobs, bad)


def top_logprobs(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [B, count], logprobs float32 [B, count]) of the most likely tokens, for the few
    rows that ask for them."""
    values, ids = torch.topk(logits, count, dim=-1)
    return ids, values.float() - torch.logsumexp(logits.float(), -1, keepdim=True)
