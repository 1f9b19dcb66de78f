"""Causal attention of many new tokens against cached pages plus themselves, compute-bound; any
chunk sizes, many requests in one launch.

Query tokens and the query heads of one KV head fill the rows of one tile together. The grid is an
upper bound from the number of tokens and rows; each program finds its request from `query_start` on
the device. Tiles of the longest contexts come first, so the short ones fill the end of the launch.
The keys and values of the new tokens are in the pages already (rope.py wrote them).

Where attention_prefill_hopper.py has a kernel for the GPU and the shape, and there are tokens
enough, `prefill_attention` takes that one.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from .attention_common import (
    HIDDEN,
    LOG2E,
    MASKED,
    load_pages,
    load_tile,
    numbers,
    raw_scores,
    score_scale,
    softmax_step,
    with_slopes,
)
from .kv_cache import UNSCALED, KernelCaches, KVScales, kernel_caches
from .shapes import KIB_163, Candidate, Choice, elements

LEAST_TOKENS: Final = 512
"""Of a launch of the Hopper kernel: its programs are large and begin slowly."""


@dataclass(frozen=True)
class PrefillConfig:
    """Launch shape. block_m: rows (tokens times heads) a tile; block_n: tokens of context a
    step."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    per_page: bool = True


@triton.jit
def _find_request(query_start, lengths, block, rows, B_PAD: tl.constexpr, BQ: tl.constexpr):
    """Of the row whose tiles include number `block`: its number, first token, token count, its
    entry of `lengths`, and the tokens before `block`.

    All rows are looked at at once: three loads that do not wait for each other, where a search
    would chain them.
    """
    i = tl.arange(0, B_PAD)
    starts = tl.load(query_start + i, mask=i < rows, other=1 << 30)
    ends = tl.load(query_start + i + 1, mask=i < rows, other=1 << 30)
    length = tl.load(lengths + i, mask=i < rows, other=0)
    first_tile = starts // BQ + i
    row = tl.sum((first_tile <= block).to(tl.int32), 0) - 1
    chosen = i == row
    start = tl.sum(tl.where(chosen, starts, 0), 0)
    count = tl.sum(tl.where(chosen, ends, 0), 0) - start
    skipped = (block - tl.sum(tl.where(chosen, first_tile, 0), 0)) * BQ
    return row, start, count, tl.sum(tl.where(chosen, length, 0), 0), skipped


@triton.jit
def _span(q, k_base, v_base, table, lo, hi, stop, position, slope, block_stride, scale_log2, softcap, acc, peak, total,
        D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
        ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr, PER_PAGE: tl.constexpr,
        FORM: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Fold tokens lo..hi into the running softmax. EDGE: some of them are hidden from some rows, or
    lie past `stop`."""
    scale = score_scale(scale_log2, CAP or ALIBI)
    page = load_pages(table, lo, stop, PAGE, BLOCK_N, PER_PAGE)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        k = load_tile(
            k_base, page, start, stop, block_stride, PAGE, D, D_PAD, BLOCK_N, WIDE, PER_PAGE, EDGE
        )
        v = load_tile(
            v_base, page, start, stop, block_stride, PAGE, D, D_PAD, BLOCK_N, WIDE, PER_PAGE, EDGE
        )
        page = load_pages(table, start + BLOCK_N, stop, PAGE, BLOCK_N, PER_PAGE)
        k = numbers(k, q.dtype, FORM)
        v = numbers(v, q.dtype, FORM)
        s = raw_scores(q, k, scale_log2, softcap, CAP, PRECISION)
        n = start + tl.arange(0, BLOCK_N)
        if ALIBI:
            s = with_slopes(s, n[None, :] - position[:, None], slope, scale_log2, CAP)
        if EDGE:
            visible = n[None, :] <= position[:, None]
            if WINDOW > 0:
                visible = visible & (n[None, :] > position[:, None] - WINDOW)
            s = tl.where(visible, s, HIDDEN)
        acc, peak, total = softmax_step(s, v, acc, peak, total, scale, PRECISION)
    return acc, peak, total


@triton.jit
def _bounds(first, last, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile whose tokens have positions first..last: where its context begins, and between
    which tokens no mask is needed."""
    begin = 0
    clear = 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        clear = tl.cdiv(tl.maximum(last - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
    diagonal = tl.maximum((first + 1) // BLOCK_N * BLOCK_N, begin)
    return begin, tl.minimum(clear, diagonal), diagonal


@triton.jit
def _prefill(q, k_cache, v_cache, tables, seq_lens, query_start, alibi_slopes, out, scale_log2, softcap, v_scale, q_stride,
             table_stride, block_stride, rows, HKV: tl.constexpr, GROUP: tl.constexpr,
             GP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
             BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, B_PAD: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr,
             SKIP_ONE: tl.constexpr, PRECISION: tl.constexpr,
             STAGES: tl.constexpr, WIDE: tl.constexpr, PER_PAGE: tl.constexpr, FORM: tl.constexpr):  # fmt: skip
    BQ: tl.constexpr = BLOCK_M // GP
    block = tl.num_programs(0) // HKV - 1 - tl.program_id(0) // HKV
    head = tl.program_id(0) % HKV
    row, begin_token, count, length, skipped = _find_request(
        query_start, seq_lens, block, rows, B_PAD, BQ
    )
    if (skipped >= count) | (SKIP_ONE & (count == 1)):
        return
    m = tl.arange(0, BLOCK_M)
    t = skipped + m // GP
    d = tl.arange(0, D_PAD)
    inside = ((t < count) & (m % GP < GROUP))[:, None] & (d < D)[None, :]
    at = (begin_token + t).to(tl.int64)
    query = tl.load(
        q + at[:, None] * q_stride + ((head * GROUP + m % GP) * D)[:, None] + d[None, :],
        mask=inside,
        other=0.0,
    )
    first = length - count + skipped
    stop = tl.minimum(first + BQ, length)
    begin, clear, diagonal = _bounds(first, stop - 1, WINDOW, BLOCK_N)
    position = length - count + t
    k_base = k_cache + head.to(tl.int64) * (PAGE * D)
    v_base = v_cache + head.to(tl.int64) * (PAGE * D)
    table = tables + row.to(tl.int64) * table_stride
    slope = m.to(tl.float32)
    if ALIBI:
        slope = (
            tl.load(alibi_slopes + head * GROUP + m % GP, mask=m % GP < GROUP, other=0.0)
            * 1.4426950408889634
        )
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    peak = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if WINDOW > 0:
        acc, peak, total = _span(query, k_base, v_base, table, begin, clear, stop, position, slope, block_stride, scale_log2, softcap, acc,
            peak, total, D, D_PAD, PAGE, BLOCK_N, WINDOW, CAP, ALIBI, PRECISION, STAGES, WIDE, PER_PAGE, FORM, True)  # fmt: skip
        begin = tl.maximum(begin, clear)
    acc, peak, total = _span(query, k_base, v_base, table, begin, diagonal, stop, position, slope, block_stride, scale_log2, softcap, acc,
        peak, total, D, D_PAD, PAGE, BLOCK_N, WINDOW, CAP, ALIBI, PRECISION, STAGES, WIDE, PER_PAGE, FORM, False)  # fmt: skip
    acc, peak, total = _span(query, k_base, v_base, table, diagonal, stop, stop, position, slope, block_stride, scale_log2, softcap, acc,
        peak, total, D, D_PAD, PAGE, BLOCK_N, WINDOW, CAP, ALIBI, PRECISION, STAGES, WIDE, PER_PAGE, FORM, True)  # fmt: skip
    acc = acc / tl.maximum(total, 1e-30)[:, None]
    if FORM != "full":
        acc = acc * v_scale
    out_at = at[:, None] * (HKV * GROUP * D) + ((head * GROUP + m % GP) * D)[:, None] + d[None, :]
    tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=inside)


_IN_FLOAT32: Final = {
    64: (
        Candidate(PrefillConfig(32, 32, warps=8, stages=2)),
        Candidate(PrefillConfig(16, 16, warps=4, stages=1)),
    ),
    128: (
        Candidate(PrefillConfig(32, 32, warps=8, stages=2)),
        Candidate(PrefillConfig(16, 16, warps=4, stages=1)),
    ),
    256: (
        Candidate(PrefillConfig(32, 16, warps=8, stages=1)),
        Candidate(PrefillConfig(16, 16, warps=4, stages=1)),
    ),
}
"""By the largest head size. Exact products have no tensor cores: each multiplication is an
instruction, unrolled, so that large tiles take minutes to compile and keep kilobytes of a thread's
registers in memory; these take seconds."""
_IN_HALF: Final = {
    64: (
        Candidate(PrefillConfig(128, 64, warps=8, stages=3)),
        Candidate(PrefillConfig(64, 32, warps=4, stages=2)),
    ),
    128: (
        Candidate(PrefillConfig(64, 64, warps=4, stages=3)),
        Candidate(PrefillConfig(64, 32, warps=4, stages=2)),
    ),
    256: (
        Candidate(PrefillConfig(128, 64, warps=8, stages=2), KIB_163),
        Candidate(PrefillConfig(64, 32, warps=4, stages=2)),
        Candidate(PrefillConfig(32, 32, warps=4, stages=1)),
    ),
}
"""In bfloat16 and float16. The first of each was measured on an H200 (docs/performance.md)."""
_OF_BYTES: Final = {
    **_IN_HALF,
    128: (
        Candidate(PrefillConfig(128, 64, warps=8, stages=3), KIB_163),
        *_IN_HALF[128],
    ),
}
"""The same with caches of 8-bit codes: each program turns codes into numbers, so that more rows a
tile leave less of that. Not measured yet."""


@functools.cache
def choose(head_dim: int, itemsize: int, kv_itemsize: int) -> Choice[PrefillConfig]:
    """The launch shapes for a head size and elements of queries and of caches of so many bytes."""
    halves = _OF_BYTES if kv_itemsize == 1 else _IN_HALF
    table = _IN_FLOAT32 if itemsize == 4 else halves
    size = next((size for size in table if head_dim <= size), max(table))
    words = elements(head_dim, itemsize, kv_itemsize)
    return Choice(f"prefill attention ({words})", table[size])


def hopper_has(
    capability: tuple[int, int], dtype: torch.dtype, dim: int, group: int, page: int
) -> bool:
    """Whether attention_prefill_hopper.py has a kernel for this GPU, this release of Triton (the
    language it is written in changes from one to the next) and this shape."""
    known = triton.__version__.split(".")[:2] == ["3", "6"] and capability == (9, 0)
    return (
        known
        and dtype in (torch.bfloat16, torch.float16)
        and dim == 128
        and group <= 16
        and page in (16, 32, 64, 128)
    )


def takes_hopper(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Whether these go to the Hopper kernel: the GPU's copy engine wants rows that begin at
    multiples of 16 bytes, and caches without gaps; its tensor cores read the caches as they are, so
    that these must have the queries' type."""
    if q.device.type != "cuda" or q.shape[0] < LEAST_TOKENS:
        return False
    _, hkv, page, dim = k_cache.shape
    if not hopper_has(
        torch.cuda.get_device_capability(q.device), q.dtype, dim, q.shape[1] // hkv, page
    ):
        return False
    aligned = (
        q.data_ptr() % 16 == 0
        and q.stride(2) == 1
        and q.stride(0) % 8 == 0
        and q.stride(1) % 8 == 0
    )
    same = k_cache.dtype == q.dtype and v_cache.dtype == q.dtype
    return aligned and same and k_cache.is_contiguous() and v_cache.is_contiguous()


def prefill_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor,
        query_start: torch.Tensor,
                      scale: float, window: int | None = None, softcap: float | None = None, *, skip_one: bool = False,
                      alibi_slopes: torch.Tensor | None = None, out: torch.Tensor | None = None,
                      config: PrefillConfig | None = None, hopper: bool = True,
                      kv_scales: KVScales = UNSCALED) -> torch.Tensor:  # fmt: skip
    """[T, Hq * D]: row i's tokens query_start[i]..query_start[i + 1] are the last of seq_lens[i]
    tokens, and see all before them.

    q [T, Hq, D]; caches [num_blocks, Hkv, block_size, D]; tables [B, M] int32; seq_lens [B],
    query_start [B + 1] int32. Rows without new tokens are padding; with `skip_one` rows of one
    token are left to decode attention. Rows of `out` past the last token stay as they are.
    `alibi_slopes`: ALiBi's, float32 [Hq]. `config` asks for this file's kernel,
    in that shape; `hopper` False for it in the usual one. `kv_scales`: of caches of 8-bit codes.
    """
    dim = k_cache.shape[3]
    if out is None:
        out = torch.empty(q.shape[0], q.shape[1] * dim, dtype=q.dtype, device=q.device)
    if (
        hopper
        and config is None
        and window is None
        and softcap is None
        and alibi_slopes is None
        and takes_hopper(q, k_cache, v_cache)
    ):
        from .attention_prefill_hopper import hopper_prefill

        return hopper_prefill(
            q, k_cache, v_cache, tables, seq_lens, query_start, scale, skip_one=skip_one, out=out
        )
    launch = functools.partial(
        _launch,
        q,
        kernel_caches(k_cache, v_cache, kv_scales, scale),
        tables,
        seq_lens,
        query_start,
        alibi_slopes,
        out,
        window,
        softcap,
        skip_one,
    )
    if config is not None:
        launch(config)
    else:
        choose(dim, q.element_size(), k_cache.element_size()).launch(q.device, launch)
    return out


def _launch(q: torch.Tensor, caches: KernelCaches, tables: torch.Tensor, seq_lens: torch.Tensor,
            query_start: torch.Tensor, alibi_slopes: torch.Tensor | None, out: torch.Tensor, window: int | None,
            softcap: float | None, skip_one: bool, c: PrefillConfig) -> None:  # fmt: skip
    rows = seq_lens.shape[0]
    _, hkv, page, dim = caches.keys.shape
    group = q.shape[1] // hkv
    gp = triton.next_power_of_2(group)
    block_m = max(c.block_m, gp)
    _prefill[((q.shape[0] // (block_m // gp) + rows) * hkv,)](
        q, caches.keys, caches.values, tables, seq_lens, query_start, alibi_slopes, out, caches.score_scale * LOG2E, softcap or 1.0,
        caches.v_scale, q.stride(0), tables.stride(0), caches.keys.stride(0), rows,
        HKV=hkv, GROUP=group, GP=gp, D=dim, D_PAD=triton.next_power_of_2(dim), PAGE=page, BLOCK_M=block_m, BLOCK_N=c.block_n,
        B_PAD=triton.next_power_of_2(rows),
        WINDOW=window or 0, CAP=softcap is not None, ALIBI=alibi_slopes is not None,
        SKIP_ONE=skip_one, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=c.stages, WIDE=caches.keys.numel() >= 2**31, PER_PAGE=c.per_page and c.block_n % page == 0 and page & (page - 1) == 0,
        FORM=caches.form,
        num_warps=c.warps)  # fmt: skip
