"""Attention of one new token a request over its pages, memory-bound: every key and value is read
once.

The query heads of one KV head fill the rows of one tile. A request's context is cut into splits
whose number is decided on the device from its length, under a grid fixed by the batch size alone,
so a captured graph stays valid for any lengths. The split that finishes last merges the partial
results. Optionally a row starts behind a shared prefix whose partial result another kernel left in
the workspace (cascade.py), or the kernel does what comes before attention as well: QK-norm, rotary
embedding and the new token's key and value into their page. Knows nothing of scheduling; rows of
length 0 are padding and give zeros.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_common import (
    LOG2E,
    MASKED,
    capped,
    kept,
    load_pages,
    load_tile,
    pair_numbers,
    score_scale,
    softmax_weights,
)
from .attention_decode_few import decode_few
from .attention_rope import Rope, norm_weights, roped, rotation
from .attention_softmax import merge, visible_scores, walk
from .decode_shapes import DecodeConfig, choose, pick_config, pick_few
from .kv_cache import UNSCALED, KernelCaches, KVScales, kernel_caches
from .workspace import counters, overlap


@triton.jit
def _walk_codes(q, k_base, v_base, table, lo, hi, stop, visible_from, position, slope, block_stride, scale_log2, softcap,
        M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
        CAP: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
        FORM: tl.constexpr):  # fmt: skip
    """walk over caches of 8-bit codes, which are read two dimensions at a time: even and odd ones
    have tiles of their own, and results of their own until the end."""
    HALF: tl.constexpr = D_PAD // 2
    q_even, q_odd = tl.split(tl.reshape(q, [M, HALF, 2]))
    even = tl.zeros([M, HALF], tl.float32)
    odd = tl.zeros([M, HALF], tl.float32)
    peak = tl.full([M], MASKED, tl.float32)
    total = tl.zeros([M], tl.float32)
    scale = score_scale(scale_log2, CAP or ALIBI)
    keys = k_base.to(tl.pointer_type(tl.int16))
    values = v_base.to(tl.pointer_type(tl.int16))
    page = load_pages(table, lo, stop, PAGE, BLOCK_N, False)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        k = load_tile(
            keys,
            page,
            start,
            stop,
            block_stride // 2,
            PAGE,
            D // 2,
            HALF,
            BLOCK_N,
            WIDE,
            False,
            True,
        )
        v = load_tile(
            values,
            page,
            start,
            stop,
            block_stride // 2,
            PAGE,
            D // 2,
            HALF,
            BLOCK_N,
            WIDE,
            False,
            True,
        )
        page = load_pages(table, start + BLOCK_N, stop, PAGE, BLOCK_N, False)
        k_even, k_odd = pair_numbers(k, q.dtype, FORM)
        s = tl.dot(q_even, tl.trans(k_even), input_precision=PRECISION)
        s = tl.dot(q_odd, tl.trans(k_odd), s, input_precision=PRECISION)
        s = capped(s, scale_log2, softcap, CAP)
        s = visible_scores(
            s, n, stop, visible_from, position, slope, scale_log2, WINDOW, CAP, ALIBI
        )
        p, shrink, peak, total = softmax_weights(s, peak, total, scale)
        p = p.to(q.dtype)
        v_even, v_odd = pair_numbers(v, q.dtype, FORM)
        even = tl.dot(p, v_even, even * shrink[:, None], input_precision=PRECISION)
        odd = tl.dot(p, v_odd, odd * shrink[:, None], input_precision=PRECISION)
    return tl.reshape(tl.join(even, odd), [M, D_PAD]), peak, total


@triton.jit
def _write_new(qkv, k_weight, cos, sin, k_cache, v_cache, table, position, eps, k_scale, v_scale, block_stride,
        HKV: tl.constexpr, HQ: tl.constexpr, head, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, NORM: tl.constexpr,
        FORM: tl.constexpr):  # fmt: skip
    """The key and value of one head of the token at `position` into its page, seen by this
    program's later loads."""
    d = tl.arange(0, D_PAD)
    one = tl.arange(0, 1)
    inside = (one == 0)[:, None] & (d < D)[None, :]
    pointers = qkv + ((HQ + head) * D + one)[:, None]
    own, partner = norm_weights(k_weight, d, D, NORM)
    key = roped(pointers, own, partner, cos, sin, d, inside, eps, D, NORM).to(qkv.dtype.element_ty)
    value = tl.load(pointers + HKV * D + d[None, :], mask=inside, other=0.0)
    block = tl.load(table + position // PAGE).to(tl.int64)
    place = block * block_stride + (head * PAGE + position % PAGE) * D + (one[:, None] + d[None, :])
    tl.store(k_cache + place, kept(key, k_scale, k_cache, FORM), mask=inside)
    tl.store(v_cache + place, kept(value, v_scale, v_cache, FORM), mask=inside)
    tl.debug_barrier()


@triton.jit
def _decode(q, k_cache, v_cache, tables, seq_lens, query_start, shared, alibi_slopes, cos_sin, q_weight, k_weight, out, part, lse, arrived,
        scale_log2, softcap, eps, k_scale, v_scale, q_stride, table_stride, block_stride,
            HKV: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, GP: tl.constexpr, SB: tl.constexpr, D: tl.constexpr,
            D_PAD: tl.constexpr, PAGE: tl.constexpr,
            BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PREFIXES: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
            CAP: tl.constexpr, ALIBI: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr,
            MIXED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr, FORM: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
    row = tl.program_id(0) // HKV
    head = tl.program_id(0) % HKV
    split = tl.program_id(1)
    token = row
    if MIXED:
        token = tl.load(query_start + row)
        if tl.load(query_start + row + 1) - token != 1:
            return
    length = tl.load(seq_lens + row)
    g = tl.arange(0, M)
    d = tl.arange(0, D_PAD)
    inside = (g < GROUP)[:, None] & (d < D)[None, :]
    out_base = (token.to(tl.int64) * HKV + head) * GROUP * D
    if length <= 0:
        if split == 0:
            tl.store(
                out + out_base + g[:, None] * D + d[None, :],
                tl.zeros([M, D_PAD], out.dtype.element_ty),
                mask=inside,
            )
        return
    visible_from = 0
    if WINDOW > 0:
        visible_from = tl.maximum(length - WINDOW, 0)
    begin = visible_from // BLOCK_N * BLOCK_N
    prefixes = 0
    if PREFIXES > 0:
        common = tl.load(shared + row)
        prefixes = tl.where(common > 0, PREFIXES, 0)
        begin = tl.maximum(begin, common)
    chunk = tl.maximum(CHUNK, tl.cdiv(tl.cdiv(length - begin, SPLITS), BLOCK_N) * BLOCK_N)
    active = tl.cdiv(length - begin, chunk)
    lo = begin + split * chunk
    if lo >= length:
        return
    q_at = q + token.to(tl.int64) * q_stride + head * GROUP * D
    page_base = head.to(tl.int64) * (PAGE * D)
    table = tables + row.to(tl.int64) * table_stride
    hi = tl.minimum(lo + chunk, length)
    if ROPE:
        cos, sin = rotation(cos_sin, length - 1, d, D)
        own, partner = norm_weights(q_weight, d, D, NORM)
        heads = q_at + (g * D)[:, None]
        query = roped(heads, own, partner, cos, sin, d, inside, eps, D, NORM).to(q.dtype.element_ty)
        if hi == length:
            _write_new(q + token.to(tl.int64) * q_stride, k_weight, cos, sin, k_cache, v_cache, table, length - 1, eps, k_scale, v_scale,
                block_stride, HKV, HKV * GROUP, head, D, D_PAD, PAGE, NORM, FORM)  # fmt: skip
    else:
        query = tl.load(q_at + g[:, None] * D + d[None, :], mask=inside, other=0.0)
    slope = g.to(tl.float32)
    if ALIBI:
        slope = (
            tl.load(alibi_slopes + head * GROUP + g, mask=g < GROUP, other=0.0) * 1.4426950408889634
        )
    if FORM == "full":
        acc = tl.zeros([M, D_PAD], tl.float32)
        peak = tl.full([M], MASKED, tl.float32)
        total = tl.zeros([M], tl.float32)
        acc, peak, total = walk(query, acc, peak, total, k_cache + page_base, v_cache + page_base, table, lo, hi, visible_from,
            length - 1, slope, block_stride, scale_log2, softcap, D, D_PAD, PAGE, BLOCK_N, WINDOW, CAP, ALIBI, PRECISION, STAGES,
            WIDE)  # fmt: skip
    else:
        acc, peak, total = _walk_codes(query, k_cache + page_base, v_cache + page_base, table, lo, hi, hi, visible_from, length - 1,
            slope, block_stride, scale_log2, softcap, M, D, D_PAD, PAGE, BLOCK_N, WINDOW, CAP, ALIBI, PRECISION, STAGES, WIDE,
            FORM)  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    acc = acc / total[:, None]
    if FORM != "full":
        acc = acc * v_scale
    if active + prefixes == 1:
        tl.store(
            out + out_base + g[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=inside
        )
        return
    STRIDE: tl.constexpr = SPLITS + PREFIXES
    base = (row.to(tl.int64) * HKV + head) * GROUP * STRIDE
    slot = base + g * STRIDE + prefixes + split
    tl.store(part + slot[:, None] * D + d[None, :], acc, mask=inside)
    tl.store(lse + slot, peak + tl.log2(total), mask=g < GROUP)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row * HKV + head, 1) == active - 1:
        tl.store(arrived + row * HKV + head, 0)
        merge(part, lse, out, base, out_base, active + prefixes, GROUP, STRIDE, D, D_PAD, GP, SB)


def decode_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor,
        scale: float,
                     window: int | None = None, softcap: float | None = None, *, query_start: torch.Tensor | None = None,
                     out: torch.Tensor | None = None, alibi_slopes: torch.Tensor | None = None, rope: Rope | None = None,
                     shared: Any = None, config: DecodeConfig | None = None, kv_scales: KVScales = UNSCALED,
                     reads_ahead: bool = True) -> torch.Tensor:  # fmt: skip
    """[T, Hq * D]: attention of the last token of each row.

    q [T, Hq, D]; caches [num_blocks, Hkv, block_size, D]; tables [B, M] int32; seq_lens [B] int32,
    0 for padding. Without `query_start`, row i is token i. With it ([B + 1] int32) only rows of
    exactly one token are computed, and the other rows of `out` stay as they are. `alibi_slopes`:
    ALiBi's, float32 [Hq]. `rope`: q is [T, (Hq + 2 Hkv) * D] as the projection gave it; the new
    keys and values are written to their pages. `shared`: a cascade.Shared whose partial results
    join the merge. `kv_scales`: of caches of 8-bit codes. `reads_ahead`: see
    backend.FusedOps.rope_attention.
    """
    rows = seq_lens.shape[0]
    _, hkv, _, dim = k_cache.shape
    heads = q.shape[1] if rope is None else q.shape[1] // dim - 2 * hkv
    group = heads // hkv
    if out is None:
        out = torch.empty(q.shape[0], heads * dim, dtype=q.dtype, device=q.device)
    kv_itemsize = k_cache.element_size()
    if rope is not None and config is None and reads_ahead:
        normed = rope.q_weight is not None
        few = pick_few(dim, group, rows * hkv, q.element_size(), kv_itemsize, normed)
        if few is not None:
            decode_few(
                q, k_cache, v_cache, tables, seq_lens, scale, window, softcap, rope, out, few
            )
            return out
    splits = (config or pick_config(dim, group, rows * hkv, kv_itemsize)).splits
    if shared is None:
        part = torch.empty(
            rows * heads * splits * dim if splits > 1 else 1, dtype=torch.float32, device=q.device
        )
        partial = _Partial(
            part, torch.empty(rows * heads * splits, dtype=torch.float32, device=q.device)
        )
    else:
        partial = _Partial(shared.part, shared.lse, shared.splits, shared.lengths)
    caches = kernel_caches(k_cache, v_cache, kv_scales, scale)
    inputs = q, caches, tables, seq_lens, query_start, alibi_slopes, out
    launch = functools.partial(_launch, inputs, rope, partial, group, window, softcap)
    if config is not None:
        launch(config)
    else:
        choose(dim, group, rows * hkv, q.element_size(), kv_itemsize).launch(q.device, launch)
    return out


class _Partial(NamedTuple):
    """The workspace: partial results and their log-sum-exps, in which each row has `prefixes` slots
    of a common prefix before its own."""

    part: torch.Tensor
    lse: torch.Tensor
    prefixes: int = 0
    lengths: torch.Tensor | None = None


_Inputs = tuple[
    torch.Tensor, KernelCaches, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor
]  # fmt: skip
"""Those of decode_attention, and `out`."""


def _launch(inputs: _Inputs, rope: Rope | None, partial: _Partial, group: int, window: int | None, softcap: float | None,
            c: DecodeConfig) -> None:  # fmt: skip
    q, caches, tables, seq_lens, query_start, alibi_slopes, out = inputs
    rows = seq_lens.shape[0]
    _, hkv, page, dim = caches.keys.shape
    cos_sin, q_weight, k_weight, eps = (
        (rope.cos_sin, rope.q_weight, rope.k_weight, rope.eps) if rope else (None, None, None, 0.0)
    )
    # halves of heads are factors of their own where the caches hold codes
    least = 1 if caches.form == "full" else 32
    d_pad = max(triton.next_power_of_2(dim), least)
    gp = triton.next_power_of_2(group)
    _decode[(rows * hkv, c.splits)](
        q, caches.keys, caches.values, tables, seq_lens, query_start, partial.lengths, alibi_slopes, cos_sin, q_weight, k_weight,
        out, partial.part, partial.lse, counters(q.device, "decode attention", rows * hkv),
        caches.score_scale * LOG2E, softcap or 1.0, eps, caches.k_scale, caches.v_scale, q.stride(0), tables.stride(0),
        caches.keys.stride(0),
        HKV=hkv, GROUP=group, M=max(16, gp), GP=gp, SB=max(1, min(16, 8192 // (gp * d_pad))), D=dim, D_PAD=d_pad, PAGE=page,
        BLOCK_N=c.block_n, SPLITS=c.splits,
        PREFIXES=partial.prefixes, CHUNK=max(c.chunk, c.block_n), WINDOW=window or 0,
        CAP=softcap is not None, ALIBI=alibi_slopes is not None,
        ROPE=rope is not None, NORM=q_weight is not None, MIXED=query_start is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", STAGES=c.stages, WIDE=caches.keys.numel() >= 2**31, FORM=caches.form,
        num_warps=c.warps, **overlap(q.device))  # fmt: skip
