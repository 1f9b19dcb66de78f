"""Decode attention for rows that share leading blocks: the common blocks are read once a group, the
rest by the decode kernel of each row.

The members of a group fill the rows of a tile, as a chunk's tokens do in prefill, and see all
common tokens; the partial results go to the workspace, where the decode kernel's merge
(log-sum-exp) takes them in. Groups are read on the device, so a captured graph serves any grouping
of its batch size, none at all included. Knows nothing of how groups are found.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from . import attention_prefill
from .attention_common import LOG2E, MASKED
from .attention_decode import decode_attention, pick_config
from .attention_prefill import PrefillConfig, _find_request, _span
from .kv_cache import UNSCALED, KernelCaches, KVScales, kernel_caches
from .shapes import Candidate, Choice, elements


@dataclass
class Groups:
    """G groups over B rows, all int32. Group g has the rows order[starts[g]..starts[g + 1]], whose
    first lengths[g] tokens lie in the same blocks.

    order [B], starts [G + 1], lengths [G]; shared [B]: the same length for each row, 0 for a row of
    no group. A length is a multiple of the block size and less than the length of every member.
    Unused groups have starts[g] == starts[g + 1].
    """

    order: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    shared: torch.Tensor


@dataclass
class Shared:
    """Partial results for the decode kernel: slots 0..splits of each row and head in part [.., D]
    and lse, float32; lengths: Groups.shared."""

    splits: int
    lengths: torch.Tensor
    part: torch.Tensor
    lse: torch.Tensor


@triton.jit
def _store_partial(part, lse, slot, inside, acc, peak, total, D: tl.constexpr, D_PAD: tl.constexpr):
    d = tl.arange(0, D_PAD)
    tl.store(lse + slot, peak + tl.log2(tl.maximum(total, 1e-30)), mask=inside)
    tl.store(
        part + slot[:, None] * D + d[None, :],
        acc / tl.maximum(total, 1e-30)[:, None],
        mask=inside[:, None] & (d < D)[None, :],
    )


@triton.jit
def _prefix(q, k_cache, v_cache, tables, order, starts, lengths, part, lse, scale_log2, softcap, v_scale, q_stride, table_stride,
        block_stride,
        groups,
            HKV: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
            BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr, G_PAD: tl.constexpr, SPLITS: tl.constexpr, STRIDE: tl.constexpr, CAP: tl.constexpr,
            PRECISION: tl.constexpr,
            STAGES: tl.constexpr, WIDE: tl.constexpr, PER_PAGE: tl.constexpr, FORM: tl.constexpr):  # fmt: skip
    BQ: tl.constexpr = BLOCK_M // GP
    block = tl.program_id(0) // HKV
    head = tl.program_id(0) % HKV
    split = tl.program_id(1)
    _, first, count, length, skipped = _find_request(starts, lengths, block, groups, G_PAD, BQ)
    if skipped >= count:
        return
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    inside = (skipped + m // GP < count) & (m % GP < GROUP)
    row = tl.load(order + first + skipped + m // GP, mask=inside, other=0).to(tl.int64)
    offsets = row[:, None] * q_stride + ((head * GROUP + m % GP) * D)[:, None] + d[None, :]
    query = tl.load(q + offsets, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    chunk = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    lo = tl.minimum(split * chunk, length)
    hi = tl.minimum(lo + chunk, length)
    table = tables + tl.load(order + first).to(tl.int64) * table_stride
    k_base = k_cache + head.to(tl.int64) * (PAGE * D)
    v_base = v_cache + head.to(tl.int64) * (PAGE * D)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    peak = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = lo + (hi - lo) // BLOCK_N * BLOCK_N
    last = m * 0 + hi - 1
    acc, peak, total = _span(query, k_base, v_base, table, lo, whole, hi, last, last, block_stride, scale_log2, softcap, acc, peak,
        total, D, D_PAD, PAGE, BLOCK_N, 0, CAP, False, PRECISION, STAGES, WIDE, PER_PAGE, FORM, False)  # fmt: skip
    acc, peak, total = _span(query, k_base, v_base, table, whole, hi, hi, last, last, block_stride, scale_log2, softcap, acc, peak,
        total, D, D_PAD, PAGE, BLOCK_N, 0, CAP, False, PRECISION, STAGES, WIDE, PER_PAGE, FORM, True)  # fmt: skip
    if FORM != "full":
        acc = acc * v_scale
    slot = ((row * HKV + head) * GROUP + m % GP) * STRIDE + split
    _store_partial(part, lse, slot, inside, acc, peak, total, D, D_PAD)


def _shared(
    q: torch.Tensor, rows: int, groups: int, hkv: int, dim: int, splits: int, lengths: torch.Tensor
) -> Shared:
    """Workspace for `splits` of the tails and as many of the prefixes as fill the GPU: a power of
    two, since each is a compilation."""
    tiles = (rows * q.shape[1] // 64 // hkv + groups) * hkv
    prefixes = 1 << max(1, min(8, 512 // tiles)).bit_length() - 1
    slots = rows * q.shape[1] * (splits + prefixes)
    part = torch.empty(slots * dim, dtype=torch.float32, device=q.device)
    return Shared(prefixes, lengths, part, torch.empty(slots, dtype=torch.float32, device=q.device))


_SMALLER: Final = Candidate(PrefillConfig(64, 32, warps=4, stages=2))
_IN_HALF: Final = {
    128: (Candidate(PrefillConfig(64, 64, warps=4, stages=3)), _SMALLER),
    256: (_SMALLER, Candidate(PrefillConfig(32, 32, warps=4, stages=1))),
}
"""In bfloat16 and float16, by the largest head size."""


@functools.cache
def choose(head_dim: int, itemsize: int, kv_itemsize: int) -> Choice[PrefillConfig]:
    """The launch shapes of the part that reads common blocks; in float32 those of prefill, which
    compile in seconds. itemsize, kv_itemsize: bytes of an element of queries and of
    caches."""
    shapes = (
        attention_prefill.choose(head_dim, itemsize, kv_itemsize).candidates
        if itemsize == 4
        else _IN_HALF[128 if head_dim <= 128 else 256]
    )
    words = elements(head_dim, itemsize, kv_itemsize)
    return Choice(f"attention to common blocks ({words})", shapes)


def cascade_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor,
        groups: Groups,
                      scale: float, softcap: float | None = None, *, query_start: torch.Tensor | None = None,
                      out: torch.Tensor | None = None, config: PrefillConfig | None = None,
                      kv_scales: KVScales = UNSCALED) -> torch.Tensor:  # fmt: skip
    """[T, Hq * D], equal to decode_attention on the same rows. Arguments as there; a sliding window
    is not supported: use decode_attention. With `query_start`, the rows in groups are of one token
    and come first, so that row i is token i. `config` is the launch shape of the part that reads
    common blocks."""
    rows = seq_lens.shape[0]
    _, hkv, _, dim = k_cache.shape
    group = q.shape[1] // hkv
    count = groups.lengths.shape[0]
    kv_itemsize = k_cache.element_size()
    splits = pick_config(dim, group, rows * hkv, kv_itemsize).splits
    shared = _shared(q, rows, count, hkv, dim, splits, groups.shared)
    caches = kernel_caches(k_cache, v_cache, kv_scales, scale)
    launch = functools.partial(_launch, q, caches, tables, groups, shared, splits, softcap)
    if config is not None:
        launch(config)
    else:
        choose(dim, q.element_size(), kv_itemsize).launch(q.device, launch)
    return decode_attention(
        q,
        k_cache,
        v_cache,
        tables,
        seq_lens,
        scale,
        None,
        softcap,
        query_start=query_start,
        out=out,
        shared=shared,
        kv_scales=kv_scales,
    )


def _launch(q: torch.Tensor, caches: KernelCaches, tables: torch.Tensor, groups: Groups, shared: Shared,
            splits: int, softcap: float | None, c: PrefillConfig) -> None:  # fmt: skip
    (_, hkv, page, dim), count, rows = (
        caches.keys.shape,
        groups.lengths.shape[0],
        groups.shared.shape[0],
    )
    group = q.shape[1] // hkv
    gp = triton.next_power_of_2(group)
    block_m = max(c.block_m, gp)
    _prefix[((rows // (block_m // gp) + count) * hkv, shared.splits)](
        q, caches.keys, caches.values, tables, groups.order, groups.starts, groups.lengths, shared.part, shared.lse,
        caches.score_scale * LOG2E, softcap or 1.0, caches.v_scale, q.stride(0), tables.stride(0),
        caches.keys.stride(0), count, HKV=hkv, GROUP=group, GP=gp, D=dim, D_PAD=triton.next_power_of_2(dim), PAGE=page, BLOCK_M=block_m,
        BLOCK_N=c.block_n,
        G_PAD=triton.next_power_of_2(count), SPLITS=shared.splits, STRIDE=shared.splits + splits, CAP=softcap is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", STAGES=c.stages, WIDE=caches.keys.numel() >= 2**31,
        PER_PAGE=c.block_n % page == 0 and page & (page - 1) == 0, FORM=caches.form, num_warps=c.warps)  # fmt: skip
