"""A mixture of experts on a GPU, with launches that depend on the number of tokens alone: which
expert has how many tokens is known on the device only.

Few tokens go through their experts row by row (moe_rows.py). More of them are put in the order of
their experts (moe_router.align) and multiplied by groups (moe_grouped.py), which was measured to be
faster than torch's grouped product at every number of rows. A token that chose no expert
(routing.NO_EXPERT, which all padding does) reads no weights and gives zeros. Sums over a token's
experts are float32, in a fixed order.
"""

import torch
from torch import Tensor

from . import moe_shapes
from .moe_grouped import combine, grouped_down, grouped_up
from .moe_router import align, route
from .moe_rows import experts_of_rows

__all__ = ["experts", "grouped_experts", "pack_experts", "route"]


def pack_experts(weight: Tensor) -> Tensor:
    """weight [E, N, K] itself, contiguous."""
    return weight.contiguous()


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, top_k_ids: Tensor, top_k_weights: Tensor
) -> Tensor:
    """x [T, H] -> [T, H]; gate_up [E, 2I, H], down [E, H, I], top_k_ids [T, k] of any integer type,
    NO_EXPERT for none, top_k_weights [T, k] float32."""
    tokens, k = top_k_ids.shape
    top_k_ids = top_k_ids.contiguous()
    top_k_weights = top_k_weights.contiguous()
    rows_per_expert = tokens * k / len(gate_up)
    if tokens == 0:
        return torch.empty_like(x)
    if tokens <= moe_shapes.MAX_ROWS and (tokens == 1 or rows_per_expert <= moe_shapes.MAX_SHARED):
        return experts_of_rows(x, gate_up, down, top_k_ids, top_k_weights)
    return grouped_experts(x, gate_up, down, top_k_ids, top_k_weights)


def grouped_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k_ids: Tensor,
    top_k_weights: Tensor,
    shapes: moe_shapes.GroupedPair | None = None,
) -> Tensor:
    """`experts` by the kernels of moe_grouped.py. shapes: exactly these launch shapes."""
    k = top_k_ids.shape[1]
    best = shapes or moe_shapes.pick_grouped(top_k_ids.numel() / len(gate_up), x.dtype, x.device)
    aligned = align(top_k_ids, len(gate_up), best.up.block_m)
    exact = shapes is not None
    inner = grouped_up(x, gate_up, aligned, k, best.up, exact)
    rows = grouped_down(inner, down, aligned, best.down, exact)
    return combine(rows, aligned, top_k_ids, top_k_weights)
