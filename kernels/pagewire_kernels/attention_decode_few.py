"""Decode attention of few rows, where latency counts and not memory: with QK-norm, rotary embedding
and the new token's key and value, as attention_decode.py does it, for up to 8 query heads a KV head.

What the kernel before does not write is read before the wait for it: lengths, pages, the rotary
embedding's factors and the first tile of keys and values. The new token's key and value go into
their tile as they were computed, without a way through memory. Products are sums over the tile in
registers: tensor cores would ask for tiles in shared memory, and a multiprocessor whose kernels
differ in that cannot hold both. Arithmetic is float32.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_common import LOG2E, MASKED, capped, score_scale
from .attention_decode import Rope, _merge
from .decode_shapes import FewConfig
from .workspace import counters, overlap


@triton.jit
def _tile(k_base, v_base, table, n, position, hi, d, block_stride, D: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr):
    """Keys and values [1, N, D_PAD] of tokens n [1, N, 1] before `hi`, but for that at `position`."""
    old = (n < hi) & (n != position)
    page = tl.load(table + n // PAGE, mask=old, other=0)
    if WIDE:
        page = page.to(tl.int64)
    at = page * block_stride + (n % PAGE) * D + d
    inside = old & (d < D)
    k = tl.load(k_base + at, mask=inside, other=0.0)
    return k, tl.load(v_base + at, mask=inside, other=0.0)


@triton.jit
def _partners(d, D: tl.constexpr):
    """The place of each element's partner in the rotary embedding (neox halves)."""
    return tl.where(d < D // 2, d + D // 2, d - D // 2)


@triton.jit
def _norm_weights(weight, d, D: tl.constexpr, NORM: tl.constexpr):
    """Of the QK-norm, and of each element's partner: float32, as d."""
    own = d.to(tl.float32)
    partner = own
    if NORM:
        own = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        partner = tl.load(weight + _partners(d, D), mask=d < D, other=0.0).to(tl.float32)
    return own, partner


@triton.jit
def _roped(x, inside, own, partner, cos, sin, d, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Heads at the addresses x [H, 1, 1] after QK-norm and rotary embedding: float32 [H, 1, D_PAD].
    Each element is loaded with its partner, so no tile is taken apart."""
    a = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + _partners(d, D), mask=inside, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(a * a, 2, keep_dims=True) / D + eps)
        a = a * factor * own
        b = b * factor * partner
    return a * cos + b * sin


@triton.jit
def _decode_few(qkv, k_cache, v_cache, tables, seq_lens, cos_sin, q_weight, k_weight, out, part, lse, arrived, scale_log2, softcap, eps,
        qkv_stride, table_stride, block_stride, HKV: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, SB: tl.constexpr,
        D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
        CAP: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Lengths and older tokens were written before the wait of the kernel before was over, so they
    are there when this one begins."""
    row = tl.program_id(0) // HKV
    head = tl.program_id(0) % HKV
    split = tl.program_id(1)
    length = tl.load(seq_lens + row)
    position = length - 1
    g = tl.arange(0, GP)
    d = tl.arange(0, D_PAD)
    flat = (g < GROUP)[:, None] & (d < D)[None, :]
    out_base = (row.to(tl.int64) * HKV + head) * GROUP * D
    visible_from = 0
    if WINDOW > 0:
        visible_from = tl.maximum(length - WINDOW, 0)
    begin = visible_from // BLOCK_N * BLOCK_N
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length - begin, SPLITS), BLOCK_N), 1) * BLOCK_N
    active = tl.cdiv(length - begin, chunk)
    lo = begin + split * chunk
    if lo >= length:
        if PDL:
            gdc_wait()
        if (length <= 0) & (split == 0):
            zeros = tl.zeros([GP, D_PAD], out.dtype.element_ty)
            tl.store(out + out_base + g[:, None] * D + d[None, :], zeros, mask=flat)
        return
    hi = tl.minimum(lo + chunk, length)
    g3 = g[:, None, None]
    d3 = d[None, None, :]
    t3 = tl.arange(0, BLOCK_N)[None, :, None]
    table = tables + row.to(tl.int64) * table_stride
    k_base = k_cache + head.to(tl.int64) * (PAGE * D)
    v_base = v_cache + head.to(tl.int64) * (PAGE * D)
    k, v = _tile(k_base, v_base, table, lo + t3, position, hi, d3, block_stride, D, PAGE, WIDE)
    factors = cos_sin + position.to(tl.int64) * D + d3 % (D // 2)
    cos = tl.load(factors, mask=d3 < D, other=1.0)
    sin = tl.load(factors + D // 2, mask=d3 < D, other=0.0)
    sin = tl.where(d3 < D // 2, -sin, sin)
    q_own, q_partner = _norm_weights(q_weight, d3, D, NORM)
    k_own, k_partner = _norm_weights(k_weight, d3, D, NORM)
    new_page = tl.load(table + position // PAGE).to(tl.int64)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    DT: tl.constexpr = qkv.dtype.element_ty
    x = qkv + row.to(tl.int64) * qkv_stride
    queries = (g3 < GROUP) & (d3 < D)
    q = _roped(x + (head * GROUP + g3) * D, queries, q_own, q_partner, cos, sin, d3, eps, D, NORM)
    q = q.to(DT).to(tl.float32)
    own_key = x + (HKV * GROUP + head) * D
    new_k = _roped(own_key, d3 < D, k_own, k_partner, cos, sin, d3, eps, D, NORM).to(DT)
    new_v = tl.load(own_key + HKV * D + d3, mask=d3 < D, other=0.0)
    if hi == length:
        place = new_page * block_stride + (position % PAGE) * D + d3
        tl.store(k_base + place, new_k, mask=d3 < D)
        tl.store(v_base + place, new_v, mask=d3 < D)
    acc = tl.zeros([GP, D_PAD], tl.float32)
    peak = tl.full([GP], MASKED, tl.float32)
    total = tl.zeros([GP], tl.float32)
    scale = score_scale(scale_log2, CAP)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=1):
        n3 = start + t3
        next_k, next_v = _tile(
            k_base, v_base, table, n3 + BLOCK_N, position, hi, d3, block_stride, D, PAGE, WIDE
        )
        k = tl.where(n3 == position, new_k, k)
        v = tl.where(n3 == position, new_v, v)
        s = tl.sum(q * k.to(tl.float32), 2)
        s = capped(s, scale_log2, softcap, CAP)
        n = start + tl.arange(0, BLOCK_N)[None, :]
        visible = n < hi
        if WINDOW > 0:
            visible = visible & (n >= visible_from)
        s = tl.where(visible, s * scale, MASKED)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.sum(p[:, :, None] * v.to(tl.float32), 1)
        peak = new_peak
        k, v = next_k, next_v
    if PDL and not EARLY:
        gdc_launch_dependents()
    acc = acc / total[:, None]
    if active == 1:
        tl.store(out + out_base + g[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=flat)
        return
    base = (row.to(tl.int64) * HKV + head) * GROUP * SPLITS
    slot = base + g * SPLITS + split
    tl.store(part + slot[:, None] * D + d[None, :], acc, mask=flat)
    tl.store(lse + slot, peak + tl.log2(total), mask=g < GROUP)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row * HKV + head, 1) == active - 1:
        tl.store(arrived + row * HKV + head, 0)
        _merge(part, lse, out, base, out_base, active, GROUP, SPLITS, D, D_PAD, GP, SB)


def decode_few(qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor,
               scale: float, rope: Rope, config: FewConfig, window: int | None = None, softcap: float | None = None) -> torch.Tensor:  # fmt: skip
    """decode_attention with `rope`, caches of the model's type and at most 8 query heads a KV head."""
    rows = seq_lens.shape[0]
    _, hkv, page, dim = k_cache.shape
    heads = qkv.shape[1] // dim - 2 * hkv
    group = heads // hkv
    c = config
    out = torch.empty(rows, heads * dim, dtype=qkv.dtype, device=qkv.device)
    part = torch.empty(rows * heads * c.splits * dim, dtype=torch.float32, device=qkv.device)
    lse = torch.empty(rows * heads * c.splits, dtype=torch.float32, device=qkv.device)
    d_pad = triton.next_power_of_2(dim)
    gp = triton.next_power_of_2(group)
    _decode_few[(rows * hkv, c.splits)](
        qkv, k_cache, v_cache, tables, seq_lens, rope.cos_sin, rope.q_weight, rope.k_weight, out, part, lse,
        counters(qkv.device, "decode attention", rows * hkv), scale * LOG2E, softcap or 1.0, rope.eps, qkv.stride(0), tables.stride(0),
        k_cache.stride(0), HKV=hkv, GROUP=group, GP=gp, SB=max(1, min(16, 8192 // (gp * d_pad))), D=dim, D_PAD=d_pad, PAGE=page,
        BLOCK_N=c.block_n, SPLITS=c.splits, WINDOW=window or 0, CAP=softcap is not None, NORM=rope.q_weight is not None,
        WIDE=k_cache.numel() >= 2**31, EARLY=c.early, num_warps=c.warps, **overlap(qkv.device))  # fmt: skip
    return out
