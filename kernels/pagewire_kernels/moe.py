"""A mixture of experts on a GPU, with shapes that depend on the number of tokens alone: which
expert has how many tokens is known on the device only.

In bfloat16 the rows are sorted by expert and multiplied by torch's grouped product, which reads the
matrices of the experts in use only. It has a kernel of its own (CUTLASS) for compute capability 9.x
and 10.x; on others it copies the counts to the CPU and multiplies expert by expert, which is right
but cannot be captured in a CUDA graph (grouped_gemm.py). In other types every token goes through
every expert, weighted by zero where it is not among the token's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import silu_mul


def pack_experts(weight: Tensor) -> Tensor:
    return weight.contiguous()


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, top_k_ids: Tensor, top_k_weights: Tensor
) -> Tensor:
    """x [T, H] -> [T, H]; gate_up [E, 2I, H], down [E, H, I], top_k_ids [T, k] int64,
    top_k_weights [T, k] float32. Sums are float32."""
    if x.dtype == torch.bfloat16:
        return _grouped(x, gate_up, down, top_k_ids, top_k_weights)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(gate_up)):
        share = torch.where(top_k_ids == expert, top_k_weights, 0.0).sum(1, keepdim=True)
        out.addcmul_(F.linear(silu_mul(F.linear(x, gate_up[expert])), down[expert]).float(), share)
    return out.to(x.dtype)


def _grouped(
    x: Tensor, gate_up: Tensor, down: Tensor, top_k_ids: Tensor, top_k_weights: Tensor
) -> Tensor:
    tokens, k = top_k_ids.shape
    expert, order = top_k_ids.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(len(gate_up), device=x.device), right=True).int()
    inner = silu_mul(F.grouped_mm(x[order // k], gate_up.mT, offs=ends))
    sorted_rows = F.grouped_mm(inner, down.mT, offs=ends)
    rows = torch.empty_like(sorted_rows)
    rows[order] = sorted_rows
    return torch.einsum("tkh,tk->th", rows.view(tokens, k, -1).float(), top_k_weights).to(x.dtype)
