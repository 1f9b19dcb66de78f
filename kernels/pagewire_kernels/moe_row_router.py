"""The router of a mixture of experts for one row, in one launch: the norm before it, its product and
the choice of experts.

A program has an expert's logit, with the norm of the row inside; the one that finishes last makes
the choice. Normed values and logits are rounded where the kernels for any number of rows round
them (norm.py, gemm.py), so that a row has the same experts among others as alone, but for ties
within the order of a sum. Results do not depend on which program is last.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import norm as norms
from .moe_router import choice_constants, choose_experts, empty_choice
from .norm import normalized
from .routing import LEAST_SUM, Routing
from .workspace import counters, overlap

ONE_WARP: Final = 32
"""Experts up to which each warp of a program holds all logits, so that the choice asks no others."""
THREAD_INPUTS: Final = 64
"""The most inputs of a row that a thread holds."""


class Routed(NamedTuple):
    """normed [1, H]: the row as the experts read it; top_k_ids int32 [1, k]; top_k_weights float32
    [1, k]."""

    normed: torch.Tensor
    top_k_ids: torch.Tensor
    top_k_weights: torch.Tensor


@triton.jit
def _row_router(x, norm, weight, correction_bias, slot_mapping, normed, logits, arrived, top_k_ids, top_k_weights, eps, scaling_factor,
                least_sum, H: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr,
                K_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr, TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr,
                BIAS: tl.constexpr, PADDED: tl.constexpr, RENORMALIZE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One expert. All weights, which no other kernel writes, are asked for before the wait for x."""
    number = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < H
    w = tl.load(weight + number.to(tl.int64) * H + i, mask=inside, other=0.0)
    gain = tl.load(norm + i, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    result = normalized(value, gain.to(tl.float32), i, inside, None, eps, H, False, False)
    rounded = result.to(x.dtype.element_ty)
    if number == 0:
        tl.store(normed + i, rounded, mask=inside)
    logit = tl.sum(w.to(tl.float32) * rounded.to(tl.float32), 0)
    tl.store(logits + number, logit.to(logits.dtype.element_ty))
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1) == E - 1:
        tl.store(arrived, 0)
        expert = tl.arange(0, E_PAD)
        row = tl.load(
            logits + expert, mask=expert < E, other=float("-inf"), cache_modifier=".cg"
        ).to(tl.float32)
        choose_experts(row, correction_bias, slot_mapping, top_k_ids, top_k_weights, 0, scaling_factor, least_sum, E, E_PAD, K, K_PAD,
                       GROUPS, GROUPS_PAD, TOP_GROUPS, SIGMOID, BIAS, PADDED, RENORMALIZE)  # fmt: skip


def pick_warps(block: int, experts: int) -> int:
    """Of a program that holds a row of up to `block` inputs. Those that make a choice among many
    experts exchange what they reduce many times, so few share the row."""
    if experts <= ONE_WARP:
        return norms.warps(block)
    return max(1, min(16, block // (32 * THREAD_INPUTS)))


def norm_route(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    routing: Routing,
    correction_bias: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    warps: int | None = None,
) -> Routed:
    """`route` of the logits weight [E, H] @ rms_norm(x): x [1, H], norm [H]; correction_bias and
    slot_mapping as in backend.Ops.route. warps: of a program, None: as pick_warps says. Raises
    ValueError for any other number of rows."""
    experts, hidden = weight.shape
    if x.shape != (1, hidden) or experts != routing.num_experts:
        raise ValueError(
            f"x is {list(x.shape)} and the router {list(weight.shape)}, and this product takes one row and {routing.num_experts} experts"
        )
    block = triton.next_power_of_2(hidden)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    logits = torch.empty(experts, dtype=x.dtype, device=x.device)
    ids, weights = empty_choice(1, routing, x.device)
    _row_router[(experts,)](
        x, norm, weight, correction_bias, slot_mapping, normed, logits, counters(x.device, "router of one row", 1), ids, weights, eps,
        routing.routed_scaling_factor, LEAST_SUM, H=hidden, BLOCK=block, **choice_constants(routing, correction_bias, slot_mapping),
        num_warps=warps or pick_warps(block, experts), **overlap(x.device))  # fmt: skip
    return Routed(normed, ids, weights)
