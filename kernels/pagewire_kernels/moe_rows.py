"""A mixture of experts for few tokens, memory-bound: nothing is sorted, and two launches do all. In
the first a program has a pair of token and expert and some of the inner results, in the second a
token and some of the results, over all of its experts in their order.

Programs of all pairs that want the same part of the matrices run side by side, so that an expert
that several tokens chose is read from memory once. Arithmetic is float32.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .moe_shapes import PairConfig, pick_down, pick_up
from .workspace import overlap


@triton.jit
def _matrix_rows(matrix, n, k, N, K: tl.constexpr, EVEN: tl.constexpr):
    pointers = matrix + n.to(tl.int64)[:, None] * K + k[None, :]
    if EVEN:
        return tl.load(pointers).to(tl.float32)
    return tl.load(pointers, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _vector(x, k, K: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(x + k).to(tl.float32)
    return tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _pair_up(x, gate_up, top_k_ids, inner, x_stride, N, K: tl.constexpr, TOP_K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
             EVEN: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """silu(gate x) * (up x) of a pair."""
    pair = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    expert = tl.load(top_k_ids + pair).to(tl.int64)
    if expert < 0:
        return
    gate = gate_up + expert * 2 * N * K
    up = gate + N.to(tl.int64) * K
    row = x + (pair // TOP_K).to(tl.int64) * x_stride
    acc = tl.zeros([BN, BK], tl.float32)
    acc_up = tl.zeros([BN, BK], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        h = _vector(row, k, K, EVEN)
        acc += _matrix_rows(gate, n, k, N, K, EVEN) * h[None, :]
        acc_up += _matrix_rows(up, n, k, N, K, EVEN) * h[None, :]
    if PDL and not EARLY:
        gdc_launch_dependents()
    result = tl.sum(acc, 1)
    result = result / (1.0 + tl.exp(-result)) * tl.sum(acc_up, 1)
    tl.store(inner + pair.to(tl.int64) * N + n, result.to(inner.dtype.element_ty), mask=n < N)


@triton.jit
def _experts_tile(down, expert, n, k, N, K: tl.constexpr, EVEN: tl.constexpr):
    """[EB, BN, BK] of the chosen experts' matrices; zeros for places without one."""
    matrix = down + tl.maximum(expert, 0).to(tl.int64) * N * K
    pointers = matrix[:, None, None] + n.to(tl.int64)[None, :, None] * K + k[None, None, :]
    mask = (expert >= 0)[:, None, None] & (k < K)[None, None, :]
    if not EVEN:
        mask = mask & (n < N)[None, :, None]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _shared_inputs(inner, first, place, share, k, K: tl.constexpr):
    """[EB, BK] of a token's inner results, times their shares."""
    # rows without an expert, whose share is 0, hold anything
    inside = (share != 0.0)[:, None] & (k < K)[None, :]
    h = tl.load(inner + (first + place)[:, None] * K + k[None, :], mask=inside, other=0.0)
    return h.to(tl.float32) * share[:, None]


@triton.jit
def _token_down(inner, down, top_k_ids, top_k_weights, residual, out, N, K: tl.constexpr, TOP_K: tl.constexpr, EB: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
                EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The weighted sum of a token's experts, whose tiles are read together. Places without an
    expert read nothing. The first tile is asked for before the wait for the inner results: the
    kernel that gives them begins after the choice was made."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    place = tl.arange(0, EB)
    first = token * TOP_K
    expert = tl.load(top_k_ids + first + place, mask=place < TOP_K, other=-1)
    share = tl.load(top_k_weights + first + place, mask=expert >= 0, other=0.0)
    w = _experts_tile(down, expert, n, k, N, K, EVEN)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    h = _shared_inputs(inner, first, place, share, k, K)
    acc = w.to(tl.float32) * h[:, None, :]
    for start in tl.range(BK, K, BK, num_stages=STAGES):
        h = _shared_inputs(inner, first, place, share, start + k, K)
        w = _experts_tile(down, expert, n, start + k, N, K, EVEN)
        acc += w.to(tl.float32) * h[:, None, :]
    if PDL and not EARLY:
        gdc_launch_dependents()
    result = tl.sum(tl.sum(acc, 2), 0)
    if ADD:
        result += tl.load(residual + token * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, result.to(out.dtype.element_ty), mask=n < N)


def pair_up(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    top_k_ids: torch.Tensor,
    config: PairConfig | None = None,
) -> torch.Tensor:
    """silu(gate x) * (up x) of each pair: x [T, H], gate_up [E, 2I, H], top_k_ids [T, k] ->
    [T * k, I]. Rows of no expert are left as they are."""
    hidden = x.shape[1]
    width = gate_up.shape[1] // 2
    c = config or pick_up(hidden)
    inner = torch.empty(top_k_ids.numel(), width, dtype=x.dtype, device=x.device)
    _pair_up[(len(inner), triton.cdiv(width, c.block_n))](
        x, gate_up, top_k_ids, inner, x.stride(0), width, K=hidden, TOP_K=top_k_ids.shape[1], BN=c.block_n, BK=c.block_k,
        EVEN=hidden % c.block_k == 0 and width % c.block_n == 0, STAGES=c.stages, EARLY=c.early, num_warps=c.warps,
        **overlap(x.device))  # fmt: skip
    return inner


def token_down(
    inner: torch.Tensor,
    down: torch.Tensor,
    top_k_ids: torch.Tensor,
    top_k_weights: torch.Tensor,
    residual: torch.Tensor | None = None,
    config: PairConfig | None = None,
) -> torch.Tensor:
    """The weighted sum over each token's experts, plus residual [T, H]: inner [T * k, I], down
    [E, H, I] -> [T, H]."""
    (tokens, k), (hidden, width) = top_k_ids.shape, down.shape[1:]
    c = config or pick_down(width, k)
    out = torch.empty(tokens, hidden, dtype=inner.dtype, device=inner.device)
    _token_down[(tokens, triton.cdiv(hidden, c.block_n))](
        inner, down, top_k_ids, top_k_weights, residual, out, hidden, K=width, TOP_K=k, EB=triton.next_power_of_2(k), BN=c.block_n,
        BK=c.block_k, ADD=residual is not None, EVEN=hidden % c.block_n == 0, STAGES=c.stages, EARLY=c.early, num_warps=c.warps,
        **overlap(inner.device))  # fmt: skip
    return out


def experts_of_rows(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k_ids: torch.Tensor,
    top_k_weights: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """moe.experts of few tokens, plus residual [T, H]. Ids and weights are contiguous."""
    inner = pair_up(x, gate_up, top_k_ids)
    return token_down(inner, down, top_k_ids, top_k_weights, residual)
