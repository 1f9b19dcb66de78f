"""Causal attention of many new tokens on Hopper GPUs (compute capability 9.0), for the shapes most
models have; see attention_prefill.py.

A program is 128 rows: one warp copies queries, and pages of keys and values, to shared memory; two
groups of four warps, 64 rows each, read the same tiles there. While one group takes exponents the
other multiplies, and inside a group the products with a tile's values run beside the exponents of
the next tile. Tiles go from the diagonal backward. Knows nothing of windows, caps and alibi_slopes.

Written in Gluon, whose interface changes between releases of Triton: `attention_prefill.hopper_has`
names the one this is for.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# pyright: reportAssignmentType=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_common import LOG2E

D = gl.constexpr(128)
HALF = gl.constexpr(64)
"""Columns of a copy: as wide as the pattern in which the tensor cores expect rows to be spread over
the banks."""
ROWS = gl.constexpr(64)
"""Of one group of warps."""
MASKED = gl.constexpr(-1e30)
HIDDEN = gl.constexpr(float("-inf"))
SPREAD = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
SPREAD_3D = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))
BLOCK_N, STAGES = 128, 2


# --- the warp that copies ---


@gluon.jit
def _page_rows(table, tile, length, head, HKV: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr):
    """At which row of the caches each page of a tile begins; past the end, that of some page."""
    rows = ()
    for p in gl.static_range(N // PAGE):
        at = tile * (N // PAGE) + p
        page = gl.load(table + at, mask=at * PAGE < length, other=0)
        rows = rows + ((page * HKV + head) * PAGE,)  # noqa: RUF005 - the compiler knows no starred tuple
    return rows


@gluon.jit
def _copy_tile(
    desc, rows, pages, full, empty, i, N: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr
):
    """Keys or values of the tile copied as number i, page by page. A page's halves land where those
    of [N, D] lie."""
    COUNT: gl.constexpr = N // PAGE
    stage = i % STAGES
    mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), N * D * 2)
    for p in gl.static_range(COUNT):
        for half in gl.static_range(2):
            place = pages.index((stage * 2 + half) * COUNT + p)
            tma.async_copy_global_to_shared(desc, [rows[p], half * HALF], full.index(stage), place)


@gluon.jit
def _produce(q_desc, k_desc, v_desc, token, table, tiles, length, head, q_parts, k_pages, v_pages, q_full, k_full, k_empty, v_full, v_empty,
             HKV: gl.constexpr, GROUP: gl.constexpr, GP: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    for part in gl.static_range(2):
        mbarrier.expect(q_full.index(part), ROWS * D * 2)
        for half in gl.static_range(2):
            at = [token + part * (ROWS // GP), head * GROUP, half * HALF]
            tma.async_copy_global_to_shared(
                q_desc, at, q_full.index(part), q_parts.index(part * 2 + half)
            )
    for i in range(tiles):
        rows = _page_rows(table, tiles - 1 - i, length, head, HKV, N, PAGE)
        _copy_tile(k_desc, rows, k_pages, k_full, k_empty, i, N, PAGE, STAGES)
        _copy_tile(v_desc, rows, v_pages, v_full, v_empty, i, N, PAGE, STAGES)


# --- the warps that compute ---


@gluon.jit
def _scores(q, k_tiles, k_full, i, S: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    """Begins the products of the queries with the keys of the tile copied as number i."""
    mbarrier.wait(k_full.index(i % STAGES), (i // STAGES) & 1)
    return warpgroup_mma(
        q,
        k_tiles.index(i % STAGES).permute((1, 0)),
        gl.zeros([ROWS, N], gl.float32, S),
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def _softmax(
    s, start, position, peak, total, scale, S: gl.constexpr, N: gl.constexpr, MASK: gl.constexpr
):
    """Exponents [64, N] of scores of tokens start.., the new peak and total, and by what earlier
    results shrink."""
    if MASK:
        n = start + gl.arange(0, N, gl.SliceLayout(0, S))
        s = gl.where(n[None, :] <= position[:, None], s, HIDDEN)
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale)
    e = gl.exp2(s * scale - new_peak[:, None])
    shrink = gl.exp2(peak - new_peak)
    return e, new_peak, total * shrink + gl.sum(e, 1), shrink


@gluon.jit
def _step(i, tiles, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, position, e, acc, peak, total, scale, S: gl.constexpr,
          ACC: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr):  # fmt: skip
    """Scores and exponents of tile i beside the products of the exponents `e` with the values of
    the tile before, which have arrived.

    The wait for this tile's values is no earlier than needed: it ends a block of instructions, so
    that the assembler cannot move the exponents behind the wait for the products that they are to
    run beside.
    """
    last = (i - 1) % STAGES
    p = gl.convert_layout(e.to(v_tiles.dtype), gl.DotOperandLayout(0, ACC, 2))
    token = _scores(q, k_tiles, k_full, i, S, N, STAGES)
    acc = warpgroup_mma(p, v_tiles.index(last), acc, is_async=True)
    s = warpgroup_mma_wait(1, [token])
    mbarrier.arrive(k_empty.index(i % STAGES))
    e, peak, total, shrink = _softmax(
        s, (tiles - 1 - i) * N, position, peak, total, scale, S, N, MASK
    )
    mbarrier.wait(v_full.index(i % STAGES), (i // STAGES) & 1)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(v_empty.index(last))
    return e, acc * gl.convert_layout(shrink, gl.SliceLayout(1, ACC))[:, None], peak, total


@gluon.jit
def _clear_tail(v_pages, v_full, start, length, N: gl.constexpr, PAGE: gl.constexpr):
    """Zero the first tile's values past the end: they may be anything, also what times zero is not
    zero. Both groups do it: the same."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    mbarrier.wait(v_full.index(0), 0)
    for p in range((length - start) // PAGE, N // PAGE):
        for half in gl.static_range(2):
            page = v_pages.index(half * (N // PAGE) + p)
            n = start + p * PAGE + gl.arange(0, PAGE, gl.SliceLayout(1, layout))
            page.store(
                gl.where(
                    (n < length)[:, None],
                    page.load(layout),
                    gl.zeros([PAGE, HALF], v_pages.dtype, layout),
                )
            )
    hopper.fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _store(
    acc,
    out,
    q,
    token,
    left,
    head,
    PART: gl.constexpr,
    HKV: gl.constexpr,
    GROUP: gl.constexpr,
    GP: gl.constexpr,
):
    """A group's rows to `out`, by way of the queries' place. `left`: tokens of the request from
    `token` on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    q.store(acc.to(q.dtype))
    m = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    at = (
        (token + m // GP).to(gl.int64)[:, None] * (HKV * GROUP * D)
        + ((head * GROUP + m % GP) * D)[:, None]
        + d[None, :]
    )
    inside = (m // GP < left) & (m % GP < GROUP)
    gl.store(out + at, q.load(layout), mask=inside[:, None] & (d < D)[None, :])


@gluon.jit
def _consume(out, q_tiles, k_tiles, v_tiles, v_pages, q_full, k_full, k_empty, v_full, v_empty, tiles, token, left, first, length, head,
             scale, PART: gl.constexpr, HKV: gl.constexpr, GROUP: gl.constexpr, GP: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    top = (tiles - 1) * N
    if top + N > length:
        _clear_tail(v_pages, v_full, top, length, N, PAGE)
    position = first + (PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S))) // GP
    peak = gl.full([ROWS], MASKED, gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    acc = gl.zeros([ROWS, D], gl.float32, ACC)
    q = q_tiles.index(PART)
    mbarrier.wait(q_full.index(PART), 0)
    s = warpgroup_mma_wait(0, [_scores(q, k_tiles, k_full, 0, S, N, STAGES)])
    mbarrier.arrive(k_empty.index(0))
    e, peak, total, _ = _softmax(s, top, position, peak, total, scale, S, N, True)
    mbarrier.wait(v_full.index(0), 0)
    masked = tiles - (first + 1) // N
    for i in range(1, masked):
        e, acc, peak, total = _step(i, tiles, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, position, e, acc, peak, total, scale,
                                    S, ACC, N, STAGES, True)  # fmt: skip
    for i in range(gl.maximum(masked, 1), tiles):
        e, acc, peak, total = _step(i, tiles, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, position, e, acc, peak, total, scale,
                                    S, ACC, N, STAGES, False)  # fmt: skip
    p = gl.convert_layout(e.to(v_tiles.dtype), gl.DotOperandLayout(0, ACC, 2))
    acc = warpgroup_mma_wait(
        0, [warpgroup_mma(p, v_tiles.index((tiles - 1) % STAGES), acc, is_async=True)]
    )
    acc = acc / gl.convert_layout(gl.maximum(total, 1e-30), gl.SliceLayout(1, ACC))[:, None]
    _store(acc, out, q, token, left, head, PART, HKV, GROUP, GP)


# --- both ---


@gluon.jit
def _find_request(query_start, lengths, block, rows, B_PAD: gl.constexpr, BQ: gl.constexpr):
    """Of the row whose tiles include number `block`: its number, first token, token count, its
    entry of `lengths`, and the tokens before `block`. Each warp looks at all rows, so that none
    waits for another."""
    layout: gl.constexpr = gl.BlockedLayout([B_PAD // 32], [32], [4], [0])
    i = gl.arange(0, B_PAD, layout)
    starts = gl.load(query_start + i, mask=i < rows, other=1 << 30)
    ends = gl.load(query_start + i + 1, mask=i < rows, other=1 << 30)
    length = gl.load(lengths + i, mask=i < rows, other=0)
    row = gl.sum((starts // BQ + i <= block).to(gl.int32), 0) - 1
    chosen = i == row
    start = gl.sum(gl.where(chosen, starts, 0), 0)
    count = gl.sum(gl.where(chosen, ends, 0), 0) - start
    return (
        row,
        start,
        count,
        gl.sum(gl.where(chosen, length, 0), 0),
        (block - start // BQ - row) * BQ,
    )


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit(do_not_specialize=["table_stride", "rows"])
def _prefill(q_desc, k_desc, v_desc, tables, seq_lens, query_start, out, scale, table_stride, rows, HKV: gl.constexpr, GROUP: gl.constexpr,
             GP: gl.constexpr, PAGE: gl.constexpr, B_PAD: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
             SKIP_ONE: gl.constexpr):  # fmt: skip
    BQ: gl.constexpr = 2 * ROWS // GP
    TYPE: gl.constexpr = q_desc.dtype
    block = gl.num_programs(0) // HKV - 1 - gl.program_id(0) // HKV
    head = gl.program_id(0) % HKV
    row, begin, count, length, skipped = _find_request(
        query_start, seq_lens, block, rows, B_PAD, BQ
    )
    if (skipped >= count) | (SKIP_ONE & (count == 1)):
        return
    token = begin + skipped
    left = count - skipped
    first = length - left
    tiles = gl.maximum(
        gl.cdiv(gl.minimum(first + BQ, length), N), 1
    )  # one also where nothing is seen: it gives zeros
    table = tables + row.to(gl.int64) * table_stride
    q_parts = gl.allocate_shared_memory(TYPE, [4, ROWS // GP, GP, HALF], SPREAD_3D)
    k_pages = gl.allocate_shared_memory(TYPE, [STAGES * 2 * (N // PAGE), PAGE, HALF], SPREAD)
    v_pages = gl.allocate_shared_memory(TYPE, [STAGES * 2 * (N // PAGE), PAGE, HALF], SPREAD)
    q_tiles = q_parts._reinterpret(TYPE, [2, ROWS, D], SPREAD)
    k_tiles = k_pages._reinterpret(TYPE, [STAGES, N, D], SPREAD)
    v_tiles = v_pages._reinterpret(TYPE, [STAGES, N, D], SPREAD)
    q_full = _barriers(2, 1)
    k_full = _barriers(STAGES, 1)
    v_full = _barriers(STAGES, 1)
    k_empty = _barriers(STAGES, 2)
    v_empty = _barriers(STAGES, 2)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [(_consume, (out, q_tiles, k_tiles, v_tiles, v_pages, q_full, k_full, k_empty, v_full, v_empty, tiles, token, left, first, length,
                     head, scale, 0, HKV, GROUP, GP, N, PAGE, STAGES)),
         (_consume, (out, q_tiles, k_tiles, v_tiles, v_pages, q_full, k_full, k_empty, v_full, v_empty, tiles, token, left, first, length,
                     head, scale, 1, HKV, GROUP, GP, N, PAGE, STAGES)),
         (_produce, (q_desc, k_desc, v_desc, token, table, tiles, length, head, q_parts, k_pages, v_pages, q_full, k_full, k_empty, v_full,
                     v_empty, HKV, GROUP, GP, N, PAGE, STAGES))],
        [4, 1], [240, 24])  # fmt: skip


# --- the host's side ---


def hopper_prefill(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor,
                   query_start: torch.Tensor, scale: float, *, skip_one: bool, out: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """As prefill_attention, where `hopper_has` the shape; caches are contiguous, q and its strides
    multiples of 16 bytes."""
    rows = seq_lens.shape[0]
    blocks, hkv, page, dim = k_cache.shape
    group = q.shape[1] // hkv
    gp = triton.next_power_of_2(group)
    shape = [blocks * hkv * page, dim]
    k_desc, v_desc = (
        TensorDescriptor(cache, shape, [dim, 1], [page, HALF.value], SPREAD.value)
        for cache in (k_cache, v_cache)
    )
    q_desc = TensorDescriptor(
        q, list(q.shape), list(q.stride()), [ROWS.value // gp, gp, HALF.value], SPREAD_3D.value
    )
    _prefill[((q.shape[0] // (2 * ROWS.value // gp) + rows) * hkv,)](
        q_desc, k_desc, v_desc, tables, seq_lens, query_start, out, scale * LOG2E, tables.stride(0), rows,
        HKV=hkv, GROUP=group, GP=gp, PAGE=page, B_PAD=max(triton.next_power_of_2(rows), 32), N=BLOCK_N, STAGES=STAGES, SKIP_ONE=skip_one,
        num_warps=4, maxnreg=168)  # fmt: skip
    return out
