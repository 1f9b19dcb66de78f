"""The operations of the CUDA back end: Triton kernels under the names that every back end has, and
the choice between kernels for one operation.

Everything here can be captured in a CUDA graph after one call outside it: no operation waits for
the device or allocates anything but its results, grids depend on shapes alone, and lengths are read
on the device. Exceptions are, on some GPUs, attention by torch (attention_torch.py) and a mixture
of experts (grouped_product.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_torch, gemm
from .activation import gelu, gelu_mul, gelu_tanh, relu, silu_mul
from .attention_decode import Rope, decode_attention
from .attention_prefill import prefill_attention
from .batch import Batch
from .cascade import cascade_attention
from .embedding import embedding
from .gemm_row import linear_add, norm_gated, norm_linear
from .moe import experts, pack_experts
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .rope import rope_and_cache
from .sampling import Sampled, SamplingRows, sample, top_logprobs

__all__ = [
    "Rope",
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
    "linear_add",
    "norm_gated",
    "norm_linear",
    "pack_experts",
    "pack_linear",
    "paged_attention",
    "relu",
    "rms_norm",
    "rope_and_cache",
    "rope_attention",
    "sample",
    "silu_mul",
    "tied_logits",
    "top_logprobs",
]


FUSED_PROGRAMS = 512
"""Rows times KV heads."""


def pack_linear(weight: Tensor) -> Tensor:
    """The weight itself, contiguous: both cuBLAS and the skinny kernel read rows of [N, K]."""
    return weight.contiguous()


def tied_logits(x: Tensor, packed: Tensor, weight: Tensor) -> Tensor:
    """Logits of x [T, H] by the embedding's weight [V, H]; `packed` is the same tensor here."""
    return linear(x, packed)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] @ weight [N, K]^T + bias."""
    if len(x) > 1 and attention_torch.serves(
        x.device
    ):  # one row is multiplied without tensor cores anyway
        return F.linear(x, weight, bias)
    return gemm.linear(x, weight, bias)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [T, Hq, D] over each row's pages -> [T, Hq * D]; a window w lets token
    i see j with i - w < j <= i; `alibi_slopes` are ALiBi's, float32 [Hq].

    With max_query_len 1, token i is row i (padding rows have length 0). Otherwise rows with one new
    token go to the decode kernel, which splits long contexts, and the others to the prefill kernel.
    Common blocks are read once a group where the batch has groups and the layer neither window nor
    alibi_slopes. GPUs on which that is slow leave all of it to torch.
    """
    if attention_torch.serves(q.device):
        return attention_torch.paged_attention(
            q, k_cache, v_cache, batch, scale, window, softcap, alibi_slopes
        )
    rows, tables, lengths = batch.seq_lens.shape[0], batch.block_tables, batch.seq_lens
    groups = batch.groups if window is None and alibi_slopes is None else None
    if batch.max_query_len == 1 and groups is not None:
        return cascade_attention(q, k_cache, v_cache, tables, lengths, groups, scale, softcap)
    if batch.max_query_len == 1:
        return decode_attention(
            q, k_cache, v_cache, tables, lengths, scale, window, softcap, alibi_slopes=alibi_slopes
        )
    out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    mixed, starts = rows > 1, batch.query_start
    if mixed and groups is not None:
        cascade_attention(
            q,
            k_cache,
            v_cache,
            tables,
            lengths,
            groups,
            scale,
            softcap,
            query_start=starts,
            out=out,
        )
    # launched even where no row has one token: two ways to compile the prefill kernel would cost
    # more
    elif mixed:
        decode_attention(
            q,
            k_cache,
            v_cache,
            tables,
            lengths,
            scale,
            window,
            softcap,
            query_start=starts,
            alibi_slopes=alibi_slopes,
            out=out,
        )
    return prefill_attention(
        q,
        k_cache,
        v_cache,
        tables,
        lengths,
        starts,
        scale,
        window,
        softcap,
        skip_one=mixed,
        alibi_slopes=alibi_slopes,
        out=out,
    )


def rope_attention(
    qkv: Tensor,
    rope: Rope,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:
    """rope_and_cache and paged_attention in one: qkv [T, (Hq + 2 Hkv) * D] -> [T, Hq * D]. Decoding
    few rows without groups takes one launch; among many, what each program does before it reads
    keys costs as much as the launch that is saved."""
    few = (
        not attention_torch.serves(qkv.device)
        and batch.seq_lens.shape[0] * k_cache.shape[1] <= FUSED_PROGRAMS
    )
    if few and batch.max_query_len == 1 and batch.groups is None:
        return decode_attention(
            qkv,
            k_cache,
            v_cache,
            batch.block_tables,
            batch.seq_lens,
            scale,
            window,
            softcap,
            rope=rope,
        )
    q = rope_and_cache(
        qkv, rope.cos_sin, rope.q_weight, rope.k_weight, rope.eps, k_cache, v_cache, batch
    )
    return paged_attention(q, k_cache, v_cache, batch, scale, window, softcap)
