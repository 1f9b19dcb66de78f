"""The operations of the CUDA back end: Triton kernels under the names that every back end has, and the choice between kernels for one
operation.

Everything here can be captured in a CUDA graph after one call outside it: no operation waits for the device or allocates anything but its
results, grids depend on shapes alone, and lengths are read on the device.
"""

import torch
from torch import Tensor

from .activation import gelu, gelu_mul, gelu_tanh, relu, silu_mul
from .attention_decode import decode_attention
from .attention_prefill import prefill_attention
from .batch import Batch
from .cascade import cascade_attention
from .embedding import embedding
from .gemm import linear
from .moe import experts, pack_experts
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .rope import rope_and_cache
from .sampling import Sampled, SamplingRows, sample, top_logprobs

__all__ = [
    "Sampled",
    "SamplingRows",
    "add_layer_norm",
    "add_rms_norm",
    "embedding",
    "experts",
    "gelu",
    "gelu_mul",
    "gelu_tanh",
    "layer_norm",
    "linear",
    "pack_experts",
    "pack_linear",
    "paged_attention",
    "relu",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "silu_mul",
    "tied_logits",
    "top_logprobs",
]


def pack_linear(weight: Tensor) -> Tensor:
    """The weight itself, contiguous: both cuBLAS and the skinny kernel read rows of [N, K]."""
    return weight.contiguous()


def tied_logits(x: Tensor, packed: Tensor, weight: Tensor) -> Tensor:
    """Logits of x [T, H] by the embedding's weight [V, H]; `packed` is the same tensor here."""
    return linear(x, packed)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float, window: int | None, soft_cap: float | None = None
) -> Tensor:
    """Causal attention of q [T, Hq, D] over each row's pages -> [T, Hq * D]; a window w lets token i see j with i - w < j <= i.

    With max_query_len 1, token i is row i (padding rows have length 0). Otherwise rows with one new token go to the decode kernel, which
    splits long contexts, and the others to the prefill kernel. Common blocks are read once a group where the batch has groups and the
    layer no window.
    """
    rows = batch.seq_lens.shape[0]
    if batch.max_query_len == 1 and batch.groups is not None and window is None:
        return cascade_attention(q, k_cache, v_cache, batch.block_tables, batch.seq_lens, batch.groups, scale, soft_cap)
    if batch.max_query_len == 1:
        return decode_attention(q, k_cache, v_cache, batch.block_tables, batch.seq_lens, scale, window, soft_cap)
    out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    mixed = rows > 1
    if mixed:  # launched even where no row has one token: two ways to compile the prefill kernel would cost more
        decode_attention(
            q, k_cache, v_cache, batch.block_tables, batch.seq_lens, scale, window, soft_cap, query_start=batch.query_start, out=out
        )
    return prefill_attention(
        q, k_cache, v_cache, batch.block_tables, batch.seq_lens, batch.query_start, scale, window, soft_cap, skip_one=mixed, out=out
    )
