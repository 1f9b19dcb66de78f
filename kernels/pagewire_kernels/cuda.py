"""The operations of the CUDA back end: Triton kernels under the names that every back end has, and
the choice between kernels for one operation.

Everything here can be captured in a CUDA graph after one call outside it: no operation waits for
the device or allocates anything but its results, grids depend on shapes alone, and lengths are read
on the device. The exception is, on some GPUs, attention by torch (attention_torch.py).
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from . import (
    activation,
    attention_torch,
    gemm,
    gemm_row,
    gemm_row_parts,
    moe,
    moe_quantized,
    moe_row_int4,
    moe_row_router,
    moe_rows,
    norm,
)
from .attention_decode import Rope, decode_attention
from .attention_prefill import prefill_attention
from .backend import Ops
from .batch import Batch
from .cascade import cascade_attention
from .cuda_quantized import CudaQuantized, QuantizedMatrices
from .embedding import embedding
from .kernel_choices import KernelChoices
from .kv_cache import UNSCALED, KVScales
from .packed_matrix import PackedExperts
from .rope import rope_and_cache
from .sampling import Sampled, SamplingRows, sample, top_logprobs

__all__ = [
    "OPS",
    "CudaOps",
    "Sampled",
    "SamplingRows",
    "embedding",
    "linear",
    "paged_attention",
    "rope_attention",
    "sample",
    "top_logprobs",
]


FUSED_PROGRAMS = 512
"""Rows times KV heads."""


class CudaOps:
    """See backend.Ops and backend.FusedOps. `choices`: this process's, read in every call."""

    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    layer_norm = staticmethod(norm.layer_norm)
    add_layer_norm = staticmethod(norm.add_layer_norm)
    silu_mul = staticmethod(activation.silu_mul)
    gelu_mul = staticmethod(activation.gelu_mul)
    gelu = staticmethod(activation.gelu)
    gelu_tanh = staticmethod(activation.gelu_tanh)
    relu = staticmethod(activation.relu)
    pack_experts = staticmethod(moe.pack_experts)
    route = staticmethod(moe.route)
    norm_route = staticmethod(moe_row_router.norm_route)
    rope_and_cache = staticmethod(rope_and_cache)

    def __init__(self, choices: KernelChoices) -> None:
        self.choices = choices
        self.quantized = CudaQuantized(choices)

    @property
    def fused(self) -> "CudaOps":
        """Fused kernels are operations like the others."""
        return self

    def pack_linear(self, weight: Tensor) -> Tensor:
        """The weight itself, contiguous: both cuBLAS and the skinny kernel read rows of [N, K]."""
        return weight.contiguous()

    def tied_logits(self, x: Tensor, packed: Tensor, weight: Tensor) -> Tensor:
        """Logits of x [T, H] by the embedding's weight [V, H]; `packed` is the same tensor here."""
        return self.linear(x, packed)

    def linear(
        self, x: Tensor, weight: Tensor | QuantizedMatrices, bias: Tensor | None = None
    ) -> Tensor:
        """x [M, K] @ weight [N, K]^T + bias."""
        if isinstance(weight, QuantizedMatrices):
            return weight(x, bias)
        if len(x) > 1 and attention_torch.serves(
            x.device
        ):  # one row is multiplied without tensor cores anyway
            return F.linear(x, weight, bias)
        return gemm.linear(x, weight, bias, self.choices.gemm)

    def experts(
        self,
        x: Tensor,
        gate_up: Tensor | PackedExperts,
        down: Tensor | PackedExperts,
        top_k_ids: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """See backend.Ops; the matrices of all experts are full, or quantized."""
        if isinstance(gate_up, PackedExperts) and isinstance(down, PackedExperts):
            return moe_quantized.experts(x, gate_up, down, top_k_ids, top_k_weights)
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        return moe.experts(x, gate_up, down, top_k_ids, top_k_weights)

    def takes_row(self, weight: Tensor | QuantizedMatrices) -> bool:
        """See backend.FusedOps."""
        return isinstance(weight, Tensor) or weight.takes_row

    def norm_linear(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weight: Tensor | QuantizedMatrices,
        bias: Tensor | None = None,
    ) -> Tensor:
        """weight [N, K] @ rms_norm(x) + bias -> [1, N]; x [1, K], norm [K]."""
        if isinstance(weight, Tensor):
            return gemm_row.norm_linear(x, norm, eps, weight, bias)
        return gemm_row_parts.norm_linear(x, norm, eps, weight.parts, bias)

    def norm_gated(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor | QuantizedMatrices
    ) -> Tensor:
        """silu_mul(weight [2I, K] @ rms_norm(x)) -> [1, I]; x [1, K], norm [K]."""
        if isinstance(weight, Tensor):
            return gemm_row.norm_gated(x, norm, eps, weight)
        return gemm_row_parts.norm_gated(x, norm, eps, weight.parts)

    def linear_add(
        self,
        x: Tensor,
        weight: Tensor | QuantizedMatrices,
        bias: Tensor | None,
        residual: Tensor,
    ) -> Tensor:
        """weight [N, K] @ x + bias + residual -> [1, N]; x [1, K], residual [1, N]."""
        if isinstance(weight, Tensor):
            return gemm_row.linear_add(x, weight, bias, residual)
        return gemm_row_parts.linear_add(x, weight.parts, bias, residual)

    def takes_router(self, weight: Tensor | QuantizedMatrices) -> bool:
        """See backend.FusedOps: matrices in full."""
        return isinstance(weight, Tensor)

    def experts_add(
        self,
        x: Tensor,
        gate_up: Tensor | PackedExperts,
        down: Tensor | PackedExperts,
        top_k_ids: Tensor,
        top_k_weights: Tensor,
        residual: Tensor,
    ) -> Tensor:
        """See backend.FusedOps; the matrices of all experts are full, or quantized."""
        choice = (top_k_ids, top_k_weights)
        if isinstance(gate_up, PackedExperts) and isinstance(down, PackedExperts):
            if moe_row_int4.takes(x, gate_up, down):
                return moe_row_int4.experts_of_row(x, gate_up, down, *choice, residual)
            return moe_quantized.experts(x, gate_up, down, *choice, residual=residual)
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        return moe_rows.experts_of_rows(x, gate_up, down, *choice, residual=residual)

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        kv_scales: KVScales = UNSCALED,
    ) -> Tensor:
        """Causal attention of q [T, Hq, D] over each row's pages -> [T, Hq * D]; a window w lets
        token i see j with i - w < j <= i; `alibi_slopes` are ALiBi's, float32 [Hq].

        With max_query_len 1, token i is row i (padding rows have length 0). Otherwise rows with one
        new token go to the decode kernel, which splits long contexts, and the others to the prefill
        kernel. Common blocks are read once a group where the batch has groups and the layer neither
        window nor alibi_slopes. GPUs on which that is slow leave all of it to torch.
        """
        if attention_torch.serves(q.device):
            return attention_torch.paged_attention(
                q, k_cache, v_cache, batch, scale, window, softcap, alibi_slopes, kv_scales
            )
        rows = batch.seq_lens.shape[0]
        tables = batch.block_tables
        lengths = batch.seq_lens
        groups = batch.groups if window is None and alibi_slopes is None else None
        if batch.max_query_len == 1 and groups is not None:
            return cascade_attention(
                q, k_cache, v_cache, tables, lengths, groups, scale, softcap, kv_scales=kv_scales
            )
        if batch.max_query_len == 1:
            return decode_attention(
                q,
                k_cache,
                v_cache,
                tables,
                lengths,
                scale,
                window,
                softcap,
                alibi_slopes=alibi_slopes,
                kv_scales=kv_scales,
            )
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        mixed = rows > 1
        starts = batch.query_start
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
                kv_scales=kv_scales,
            )
        # launched even where no row has one token: two ways to compile the prefill kernel would
        # cost more
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
                kv_scales=kv_scales,
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
            hopper=self.choices.hopper_prefill,
            kv_scales=kv_scales,
        )

    def rope_attention(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        kv_scales: KVScales = UNSCALED,
        reads_ahead: bool = True,
    ) -> Tensor:
        """rope_and_cache and paged_attention in one: qkv [T, (Hq + 2 Hkv) * D] -> [T, Hq * D].
        Decoding few rows without groups takes one launch; among many, what each program does before
        it reads keys costs as much as the launch that is saved."""
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
                rope=Rope(cos_sin, q_weight, k_weight, eps),
                kv_scales=kv_scales,
                reads_ahead=reads_ahead,
            )
        q = rope_and_cache(
            qkv, cos_sin, q_weight, k_weight, eps, k_cache, v_cache, batch, kv_scales
        )
        return self.paged_attention(
            q, k_cache, v_cache, batch, scale, window, softcap, kv_scales=kv_scales
        )


OPS: Final = CudaOps(KernelChoices())
"""This process's."""
_complete: Ops = OPS

linear = OPS.linear
paged_attention = OPS.paged_attention
rope_attention = OPS.rope_attention
