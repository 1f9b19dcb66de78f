"""The router of a mixture of experts, from logits to the chosen experts and their weights in one
launch, and the lists that grouped products read: which pairs of token and expert belong to which
expert.

Nothing here depends on timing: there are no atomic operations.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .routing import LEAST_SUM, Routing
from .workspace import overlap

ALIGNED = 4
"""Elements of 16 bytes: pointers to fewer would be another kernel to compile."""
ALIGN_BLOCK = 4096
"""The most pairs that a program looks at in a step."""


@triton.jit
def choose_experts(logit, correction_bias, slot_mapping, top_k_ids, top_k_weights, token, scaling_factor, least_sum, E: tl.constexpr,
                   E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr,
                   TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr, PADDED: tl.constexpr,
                   RENORMALIZE: tl.constexpr):  # fmt: skip
    """Stores a token's experts and their weights; logit [E_PAD] float32, -inf from E on. Scores that
    are no number count as the least there is, so that ids stay in range; the weights of such a token
    are NaN."""
    expert = tl.arange(0, E_PAD)
    inside = expert < E
    none = float("-inf")
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logit))
    else:
        exponential = tl.exp(logit - tl.max(logit, 0))
        scores = exponential / tl.sum(exponential, 0)
    choice = scores
    if BIAS:
        choice += tl.load(correction_bias + expert, mask=inside, other=0.0).to(tl.float32)
    choice = tl.where(choice > -1e38, choice, -1e38)
    choice = tl.where(inside, choice, none)
    if GROUPS > 1:
        group = expert // (E // GROUPS)
        number = tl.arange(0, GROUPS_PAD)
        group_scores = tl.full([GROUPS_PAD], none, tl.float32)
        for g in tl.static_range(GROUPS):
            members = tl.where(group == g, choice, none)
            score = tl.max(members, 0)
            if BIAS:
                best = tl.min(tl.where(members == score, expert, E_PAD), 0)
                score += tl.max(tl.where(expert == best, none, members), 0)
            group_scores = tl.where(number == g, score, group_scores)
        open_groups = expert < 0
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.min(tl.where(group_scores == tl.max(group_scores, 0), number, GROUPS_PAD), 0)
            open_groups = open_groups | (group == best)
            group_scores = tl.where(number == best, none, group_scores)
        choice = tl.where(open_groups, choice, none)
    lane = tl.arange(0, K_PAD)
    ids = tl.full([K_PAD], -1, tl.int32)
    weights = tl.zeros([K_PAD], tl.float32)
    for j in range(K):
        score = tl.max(choice, 0)
        best = tl.min(tl.where(choice == score, expert, E_PAD), 0)
        if BIAS:
            score = tl.sum(tl.where(expert == best, scores, 0.0), 0)
        ids = tl.where(lane == j, best, ids)
        weights = tl.where(lane == j, score, weights)
        choice = tl.where(expert == best, none, choice)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + least_sum)
    total = tl.sum(scores, 0)
    weights = tl.where(total == total, weights * scaling_factor, total)
    if PADDED:
        live = tl.load(slot_mapping + token) >= 0
        ids = tl.where(live, ids, -1)
        weights = tl.where(live, weights, 0.0)
    tl.store(top_k_ids + token * K + lane, ids, mask=lane < K)
    tl.store(top_k_weights + token * K + lane, weights, mask=lane < K)


@triton.jit
def _route(logits, correction_bias, slot_mapping, top_k_ids, top_k_weights, logits_stride, scaling_factor, least_sum, E: tl.constexpr,
           E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr,
           TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr, PADDED: tl.constexpr, RENORMALIZE: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """One token."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0)
    expert = tl.arange(0, E_PAD)
    logit = tl.load(
        logits + token.to(tl.int64) * logits_stride + expert, mask=expert < E, other=float("-inf")
    ).to(tl.float32)
    choose_experts(logit, correction_bias, slot_mapping, top_k_ids, top_k_weights, token, scaling_factor, least_sum, E, E_PAD, K, K_PAD,
                   GROUPS, GROUPS_PAD, TOP_GROUPS, SIGMOID, BIAS, PADDED, RENORMALIZE)  # fmt: skip


def choice_constants(
    routing: Routing, correction_bias: torch.Tensor | None, slot_mapping: torch.Tensor | None
) -> dict[str, Any]:
    """What `choose_experts` is compiled for."""
    return {
        "E": routing.num_experts,
        "E_PAD": triton.next_power_of_2(routing.num_experts),
        "K": routing.top_k,
        "K_PAD": triton.next_power_of_2(routing.top_k),
        "GROUPS": routing.num_expert_group,
        "GROUPS_PAD": triton.next_power_of_2(routing.num_expert_group),
        "TOP_GROUPS": routing.topk_group,
        "SIGMOID": routing.scoring_func == "sigmoid",
        "BIAS": correction_bias is not None,
        "PADDED": slot_mapping is not None,
        "RENORMALIZE": routing.renormalize,
    }


def empty_choice(
    tokens: int, routing: Routing, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(top_k_ids int32 [T, k], top_k_weights float32 [T, k]), not written yet."""
    ids = torch.empty(tokens, routing.top_k, dtype=torch.int32, device=device)
    return ids, torch.empty(tokens, routing.top_k, dtype=torch.float32, device=device)


def route(
    logits: torch.Tensor,
    routing: Routing,
    correction_bias: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See backend.Ops."""
    constants = choice_constants(routing, correction_bias, slot_mapping)
    ids, weights = empty_choice(len(logits), routing, logits.device)
    if len(logits):
        _route[(len(logits),)](
            logits, correction_bias, slot_mapping, ids, weights, logits.stride(0), routing.routed_scaling_factor, LEAST_SUM,
            **constants, num_warps=1 if constants["E_PAD"] <= 256 else 4, **overlap(logits.device))  # fmt: skip
    return ids, weights


@dataclass(frozen=True)
class Aligned:
    """The T * k pairs of a token and its expert, in the order of experts, those without an expert
    last; among equals the first token comes first. All int32.

    order [T * k]: the pair (token * k + place among the token's experts) at each position.
    positions [T * k]: the position of each pair. ends [E]: of each expert, one behind its last
    position. tiles [3, slots]: expert (or NO_EXPERT), first position and one behind the expert's
    last position of each tile of `block_m` positions.
    """

    order: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    tiles: torch.Tensor
    block_m: int

    @property
    def slots(self) -> int:
        """The most tiles there can be, of whatever rows choose which experts."""
        return self.tiles.shape[1]


@triton.jit(do_not_specialize=["pairs", "slots", "block_m"])
def _align(top_k_ids, order, positions, ends, tiles, pairs, slots, block_m, E: tl.constexpr, BLOCK: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """One expert; the last program has the pairs without one.

    The tiles of an expert begin at slot (its first position // block_m + its id). That leaves room
    for the partly filled tiles of all experts before, so that no program needs to know how many
    tiles those have; slots in between stay empty.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    smaller = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        chosen = tl.load(top_k_ids + pair, mask=pair < pairs, other=E + 1).to(tl.int32)
        chosen = tl.where(chosen < 0, E, chosen)
        smaller += (chosen < expert).to(tl.int32)
        equal += (chosen == expert).to(tl.int32)
    first = tl.sum(smaller, 0)
    end = first + tl.sum(equal, 0)
    position = first
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        chosen = tl.load(top_k_ids + pair, mask=pair < pairs, other=E + 1).to(tl.int32)
        mine = tl.where(chosen < 0, E, chosen) == expert
        at = position + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + at, pair, mask=mine)
        tl.store(positions + pair, at, mask=mine)
        position += tl.sum(mine.to(tl.int32), 0)
    base = first // block_m + expert
    if expert < E:
        tl.store(ends + expert, end)
        for slot in range(base, end // block_m + expert + 1):
            row = first + (slot - base) * block_m
            tl.store(tiles + slot, tl.where(row < end, expert, -1))
            tl.store(tiles + slots + slot, row)
            tl.store(tiles + 2 * slots + slot, end)
    else:
        for slot in range(base, slots):
            tl.store(tiles + slot, -1)


def align(top_k_ids: torch.Tensor, num_experts: int, block_m: int) -> Aligned:
    """Sort the pairs of top_k_ids [T, k] (contiguous) by expert, for tiles of `block_m` of them."""
    pairs = top_k_ids.numel()
    device = top_k_ids.device
    slots = pairs // block_m + num_experts
    sizes = [pairs, pairs, num_experts, 3 * slots]
    spaced = [-(-size // ALIGNED) * ALIGNED for size in sizes]
    memory = torch.empty(sum(spaced), dtype=torch.int32, device=device)
    order, positions, ends, tiles = [
        part[:size] for part, size in zip(memory.split(spaced), sizes, strict=True)
    ]
    block = min(ALIGN_BLOCK, max(128, triton.next_power_of_2(pairs)))
    _align[(num_experts + 1,)](
        top_k_ids, order, positions, ends, tiles, pairs, slots, block_m, E=num_experts, BLOCK=block,
        num_warps=4 if block <= 1024 else 8, **overlap(device))  # fmt: skip
    return Aligned(order, positions, ends, tiles.view(3, slots), block_m)
