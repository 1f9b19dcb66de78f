"""Decode attention of so few rows that latency counts and not memory, with QK-norm, rotary embedding
and the new token's key and value, as attention_decode.py has it.

What the kernel before does not write is read before the wait for it: lengths, pages, the rotary
embedding's factors, and the first tile of older keys and values. A split of a request has one tile
until the context is long. The new token goes into the online softmax as its beginning, so that
nobody waits until its key and value have gone through memory. The next kernel is let in at once,
and asks for its weights meanwhile.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_common import LOG2E, MASKED, capped, load_pages, load_tile, raw_scores, score_scale
from .attention_rope import Rope, norm_weights, roped, rotation
from .attention_softmax import fold_tile, merge, walk
from .decode_shapes import FewConfig
from .workspace import counters, overlap


@triton.jit
def _new_scores(
    query,
    key,
    is_key,
    scale_log2,
    softcap,
    CAP: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores [M] in base 2 of the queries with the new key, which with NORM is a row of `query`."""
    if NORM:
        all_scores = raw_scores(query, query, scale_log2, softcap, CAP, PRECISION)
        s = tl.sum(tl.where(is_key[None, :], all_scores, 0.0), 1)
    else:
        s = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)
        s = capped(s, scale_log2, softcap, CAP)
    return s * score_scale(scale_log2, CAP)


@triton.jit
def _decode_few(qkv, k_cache, v_cache, tables, seq_lens, cos_sin, q_weight, k_weight, out, part, lse, arrived, scale_log2, softcap, eps,
        qkv_stride, table_stride, block_stride, HKV: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, GP: tl.constexpr,
        SB: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, FIRST_N: tl.constexpr, BLOCK_N: tl.constexpr,
        SPLITS: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
        STAGES: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Lengths and older tokens were written before the wait of the kernel before was over, so they
    are there when this one begins."""
    DT: tl.constexpr = qkv.dtype.element_ty
    row = tl.program_id(0) // HKV
    head = tl.program_id(0) % HKV
    split = tl.program_id(1)
    g = tl.arange(0, M)
    d = tl.arange(0, D_PAD)
    inside = (g < GROUP)[:, None] & (d < D)[None, :]
    out_at = out + (row.to(tl.int64) * HKV + head) * GROUP * D + g[:, None] * D + d[None, :]
    length = tl.load(seq_lens + row)
    position = length - 1
    visible_from = 0
    if WINDOW > 0:
        visible_from = tl.maximum(length - WINDOW, 0)
    begin = visible_from // FIRST_N * FIRST_N
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length - begin, SPLITS), FIRST_N), 1) * FIRST_N
    active = tl.cdiv(length - begin, chunk)
    lo = begin + split * chunk
    if lo >= length:
        if PDL:
            gdc_wait()
        if (length <= 0) & (split == 0):
            tl.store(out_at, tl.zeros([M, D_PAD], out.dtype.element_ty), mask=inside)
        return
    hi = tl.minimum(lo + chunk, length)
    old = tl.minimum(hi, position)
    table = tables + row.to(tl.int64) * table_stride
    keys = k_cache + head.to(tl.int64) * (PAGE * D)
    values = v_cache + head.to(tl.int64) * (PAGE * D)
    page = load_pages(table, lo, old, PAGE, FIRST_N, False)
    first_k = load_tile(
        keys, page, lo, old, block_stride, PAGE, D, D_PAD, FIRST_N, WIDE, False, True
    )
    first_v = load_tile(
        values, page, lo, old, block_stride, PAGE, D, D_PAD, FIRST_N, WIDE, False, True
    )
    new_page = tl.load(table + position // PAGE).to(tl.int64)
    cos, sin = rotation(cos_sin, position, d, D)
    own, partner = norm_weights(q_weight, d, D, NORM)
    k_own, k_partner = norm_weights(k_weight, d, D, NORM)
    # with a norm the key is the row behind the queries: one reduction for all
    is_key = g == GROUP
    heads = head * GROUP + g
    taken = inside
    if NORM:
        heads = tl.where(is_key, HKV * GROUP + head, heads)
        taken = (g <= GROUP)[:, None] & (d < D)[None, :]
        own = tl.where(is_key[:, None], k_own, own)
        partner = tl.where(is_key[:, None], k_partner, partner)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row_at = qkv + row.to(tl.int64) * qkv_stride
    query = roped(row_at + (heads * D)[:, None], own, partner, cos, sin, d, taken, eps, D, NORM).to(
        DT
    )
    one = (tl.arange(0, 1) == 0)[:, None] & (d < D)[None, :]
    key_at = row_at + (HKV * GROUP + head) * D + tl.arange(0, 1)[:, None]
    value = tl.load(key_at + HKV * D + d[None, :], mask=one, other=0.0)
    key = value
    if not NORM:
        key = roped(key_at, k_own, k_partner, cos, sin, d, one, eps, D, NORM).to(DT)
    mine = hi == length
    if mine:
        place = new_page * block_stride + (position % PAGE) * D + d[None, :]
        if NORM:
            tl.store(
                keys + place + (g * 0)[:, None], query, mask=is_key[:, None] & (d < D)[None, :]
            )
        else:
            tl.store(keys + place, key, mask=one)
        tl.store(values + place, value, mask=one)
    scores = _new_scores(query, key, is_key, scale_log2, softcap, CAP, NORM, PRECISION)
    peak = tl.where(mine, scores, MASKED)
    total = tl.where(mine, 1.0, tl.zeros([M], tl.float32))
    acc = tl.where(mine, value.to(tl.float32), tl.zeros([M, D_PAD], tl.float32))
    n = lo + tl.arange(0, FIRST_N)
    acc, peak, total = fold_tile(
        query, first_k, first_v, n, acc, peak, total, old, visible_from, position, 0, scale_log2, softcap, WINDOW, CAP, False,
        PRECISION
    )  # fmt: skip
    acc, peak, total = walk(
        query, acc, peak, total, keys, values, table, lo + FIRST_N, old, visible_from, position, 0, block_stride, scale_log2,
        softcap, D, D_PAD, PAGE, BLOCK_N, WINDOW, CAP, False, PRECISION, STAGES, WIDE
    )  # fmt: skip
    acc = acc / total[:, None]
    if active == 1:
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)
        return
    base = (row.to(tl.int64) * HKV + head) * GROUP * SPLITS
    slot = base + g * SPLITS + split
    tl.store(part + slot[:, None] * D + d[None, :], acc, mask=inside)
    tl.store(lse + slot, peak + tl.log2(total), mask=g < GROUP)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row * HKV + head, 1) == active - 1:
        tl.store(arrived + row * HKV + head, 0)
        out_base = (row.to(tl.int64) * HKV + head) * GROUP * D
        merge(part, lse, out, base, out_base, active, GROUP, SPLITS, D, D_PAD, GP, SB)


def decode_few(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    rope: Rope,
    out: torch.Tensor,
    config: FewConfig,
) -> None:
    """attention_decode.decode_attention with `rope`, into `out`; caches are of the model's type."""
    rows = seq_lens.shape[0]
    _, hkv, page, dim = k_cache.shape
    heads = qkv.shape[1] // dim - 2 * hkv
    group = heads // hkv
    c = config
    part = torch.empty(rows * heads * c.splits * dim, dtype=torch.float32, device=qkv.device)
    lse = torch.empty(rows * heads * c.splits, dtype=torch.float32, device=qkv.device)
    d_pad = triton.next_power_of_2(dim)
    gp = triton.next_power_of_2(group)
    normed = rope.q_weight is not None
    _decode_few[(rows * hkv, c.splits)](
        qkv, k_cache, v_cache, tables, seq_lens, rope.cos_sin, rope.q_weight, rope.k_weight, out, part, lse,
        counters(qkv.device, "decode attention", rows * hkv), scale * LOG2E, softcap or 1.0, rope.eps, qkv.stride(0), tables.stride(0),
        k_cache.stride(0), HKV=hkv, GROUP=group, M=max(16, triton.next_power_of_2(group + normed)), GP=gp,
        SB=max(1, min(16, 8192 // (gp * d_pad))), D=dim, D_PAD=d_pad, PAGE=page, FIRST_N=c.first_n, BLOCK_N=c.block_n,
        SPLITS=c.splits, WINDOW=window or 0, CAP=softcap is not None, NORM=normed,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32", STAGES=c.stages, WIDE=k_cache.numel() >= 2**31, num_warps=c.warps,
        **overlap(qkv.device))  # fmt: skip
