"""Grouped products of a mixture of experts: rows in the order of their experts, each tile of them
times the matrix of its expert.

Which tiles there are is read on the device (moe_router.Aligned): the grid has room for the most
that there may be, and programs without a tile end at once. Rows are gathered where they are loaded,
and SiLU of the gate times up is taken before anything is stored. No split of the inner dimension,
so a row's result does not depend on the rows beside it.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .moe_router import Aligned
from .moe_shapes import GroupedConfig, choose
from .workspace import overlap


@triton.jit
def _rows(x, row_start, valid, k, K: tl.constexpr, EVEN: tl.constexpr, SWAP: tl.constexpr):
    """[BK, BM] with SWAP, else [BM, BK]."""
    if SWAP:
        addresses = x + row_start[None, :] + k[:, None]
        mask = valid[None, :]
        if not EVEN:
            mask = mask & (k < K)[:, None]
    else:
        addresses = x + row_start[:, None] + k[None, :]
        mask = valid[:, None]
        if not EVEN:
            mask = mask & (k < K)[None, :]
    return tl.load(addresses, mask=mask, other=0.0)


@triton.jit
def _columns(matrix, n, k, N, K: tl.constexpr, EVEN: tl.constexpr, SWAP: tl.constexpr):
    """Weight rows n: [BN, BK] with SWAP, else [BK, BN]."""
    if SWAP:
        addresses = matrix + n.to(tl.int64)[:, None] * K + k[None, :]
        mask = (n < N)[:, None] & (k < K)[None, :]
    else:
        addresses = matrix + n.to(tl.int64)[None, :] * K + k[:, None]
        mask = (n < N)[None, :] & (k < K)[:, None]
    return tl.load(addresses) if EVEN else tl.load(addresses, mask=mask, other=0.0)


@triton.jit
def _multiplied(rows, columns, acc, SWAP: tl.constexpr):
    left, right = (columns, rows) if SWAP else (rows, columns)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["slots"])
def _grouped(x, weight, out, order, tiles, slots, x_stride, N, K: tl.constexpr, TOP_K: tl.constexpr, BM: tl.constexpr,
             BN: tl.constexpr, BK: tl.constexpr, GATHER: tl.constexpr, GATED: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr,
             STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Tiles of the same rows follow each other, and then those of the expert's next rows, which
    find its matrix in the cache."""
    slot = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if PDL:
        gdc_wait()
    expert = tl.load(tiles + slot).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tiles + slots + slot) + tl.arange(0, BM)
    valid = row < tl.load(tiles + 2 * slots + slot)
    source = row
    if GATHER:
        source = tl.load(order + row, mask=valid, other=0) // TOP_K
    row_start = source.to(tl.int64) * x_stride
    matrix = weight + expert * (2 if GATED else 1) * N * K
    up = matrix + N.to(tl.int64) * K
    if SWAP:
        acc = tl.zeros([BN, BM], tl.float32)
        acc_up = tl.zeros([BN, BM], tl.float32)
    else:
        acc = tl.zeros([BM, BN], tl.float32)
        acc_up = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        rows = _rows(x, row_start, valid, k, K, EVEN, SWAP)
        acc = _multiplied(rows, _columns(matrix, n, k, N, K, EVEN, SWAP), acc, SWAP)
        if GATED:
            acc_up = _multiplied(rows, _columns(up, n, k, N, K, EVEN, SWAP), acc_up, SWAP)
    if PDL:
        gdc_launch_dependents()
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    if SWAP:
        addresses = out + row.to(tl.int64)[None, :] * N + n[:, None]
        mask = valid[None, :] & (n < N)[:, None]
    else:
        addresses = out + row.to(tl.int64)[:, None] * N + n[None, :]
        mask = valid[:, None] & (n < N)[None, :]
    tl.store(addresses, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine(rows, positions, top_k_ids, top_k_weights, residual, out, H, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
             ADD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        chosen = tl.load(top_k_ids + pair) >= 0
        share = tl.load(top_k_weights + pair, mask=chosen, other=0.0)
        row = tl.load(positions + pair).to(tl.int64)
        value = tl.load(rows + row * H + h, mask=chosen & (h < H), other=0.0)
        acc += share * value.to(tl.float32)
    if ADD:
        acc += tl.load(residual + token * H + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out + token * H + h, acc.to(out.dtype.element_ty), mask=h < H)


def grouped_up(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    aligned: Aligned,
    top_k: int,
    config: GroupedConfig,
    exact: bool = False,
) -> torch.Tensor:
    """silu(gate x) * (up x): x [T, H], gate_up [E, 2I, H] -> [T * k, I] in the order of `aligned`,
    which was made with the config's block_m. Rows without an expert are left as they are. exact: a
    launch shape that the GPU refuses raises instead of giving way to a smaller one."""
    pairs = aligned.order.shape[0]
    out = torch.empty(pairs, gate_up.shape[1] // 2, dtype=x.dtype, device=x.device)
    _launch(x, gate_up, out, aligned, top_k, config, exact)
    return out


def grouped_down(
    inner: torch.Tensor,
    down: torch.Tensor,
    aligned: Aligned,
    config: GroupedConfig,
    exact: bool = False,
) -> torch.Tensor:
    """inner [T * k, I] in the order of `aligned`, down [E, H, I] -> [T * k, H] in that order; see
    grouped_up."""
    out = torch.empty(len(inner), down.shape[1], dtype=inner.dtype, device=inner.device)
    _launch(inner, down, out, aligned, 0, config, exact)
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    aligned: Aligned,
    top_k: int,
    best: GroupedConfig,
    exact: bool,
) -> None:
    """top_k 0: the second product."""
    n = out.shape[1]
    k = weight.shape[2]
    first = top_k > 0

    def run(c: GroupedConfig) -> None:
        _grouped[(triton.cdiv(n, c.block_n), aligned.slots)](
            x, weight, out, aligned.order, aligned.tiles, aligned.slots, x.stride(0), n, K=k, TOP_K=top_k, BM=c.block_m, BN=c.block_n,
            BK=c.block_k, GATHER=first, GATED=first, SWAP=c.swap, EVEN=k % c.block_k == 0 and n % c.block_n == 0, STAGES=c.stages,
            num_warps=c.warps, **overlap(x.device))  # fmt: skip

    if exact:
        run(best)
    else:
        choose(best, x.element_size(), first).launch(x.device, run)


def combine(
    rows: torch.Tensor,
    aligned: Aligned,
    top_k_ids: torch.Tensor,
    top_k_weights: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sums of rows [T * k, H] in the order of `aligned` -> [T, H], over each token's
    experts in their order, plus residual [T, H], in float32."""
    tokens = top_k_ids.shape[0]
    width = rows.shape[1]
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    block = min(1024, triton.next_power_of_2(width))
    _combine[(tokens, triton.cdiv(width, block))](
        rows, aligned.positions, top_k_ids, top_k_weights, residual, out, width, TOP_K=top_k_ids.shape[1], BLOCK=block,
        ADD=residual is not None, num_warps=4, **overlap(rows.device))  # fmt: skip
    return out
