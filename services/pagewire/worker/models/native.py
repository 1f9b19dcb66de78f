"""A decoder's layers as one piece of machine code for few tokens, where the back end and the
weights allow (pagewire_kernels.cpu_decode).

Holds no weights: it borrows those of the layers it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pagewire_kernels.batch import Batch
from torch import Tensor

from .architecture import Architecture
from .blocks import Attention, Mlp
from .layers import Linear, RmsNorm, TiedHead

if TYPE_CHECKING:
    from .decoder import Decoder


def plain(arch: Architecture) -> bool:
    """Whether layers are of the kind that the machine code knows."""
    sequential = (
        arch.block == "sequential" and arch.norm == "rms" and arch.gated and arch.moe is None
    )
    return (
        sequential
        and arch.attn_logit_softcapping is None
        and not (arch.alibi_slopes or arch.mlp_bias or arch.output_bias or arch.head_bias)
    )


class Native:
    """Called like Decoder, with embeddings instead of ids."""

    def __init__(self, decoder: Any, most_tokens: int) -> None:
        self._decoder, self.most_tokens = decoder, most_tokens

    def __call__(
        self,
        x: Tensor,
        cos_sin: list[Tensor],
        caches: list[Tensor],
        batch: Batch,
        wanted: Tensor | None,
        tick: Callable[[], None],
    ) -> Tensor:
        """x [T, H] -> logits [R, V] float32."""
        logits = self._decoder(x.float().contiguous(), cos_sin, caches, batch, wanted)
        tick()
        return logits


def make(decoder: Decoder) -> Native | None:
    """For a decoder whose weights are packed; None where some of it has no machine code."""
    arch, norm, head = decoder.arch, decoder.norm, decoder.head
    if not plain(arch) or not isinstance(norm, RmsNorm) or not isinstance(head, Linear | TiedHead):
        return None
    pieces = [_pieces(layer) for layer in decoder.layers]
    matrices = [head.weight, *(matrix for piece in pieces if piece for matrix in piece[:4])]
    if not all(pieces) or any(isinstance(matrix, Tensor) for matrix in matrices):
        return None
    from pagewire_kernels.cpu_decode import MOST_TOKENS, DecodeLayer, NativeDecoder, Sizes

    layers = [DecodeLayer(*piece) for piece in pieces if piece]
    width = arch.num_heads * arch.head_dim
    if not all(layer.fits(width) for layer in layers):
        return None
    gelu = arch.activation == "gelu_tanh"
    sizes = Sizes(
        arch.hidden_size,
        arch.num_heads,
        arch.num_kv_heads,
        arch.head_dim,
        arch.intermediate_size,
        arch.norm_eps,
        gelu,
    )
    return Native(NativeDecoder(layers, norm.weight.float(), head.weight, sizes), MOST_TOKENS)


def _pieces(layer: Any) -> tuple[Any, ...] | None:
    """What DecodeLayer is made of."""
    attention, mlp, norms = layer.attention, layer.mlp, layer.norms_made
    if (
        not isinstance(attention, Attention)
        or not isinstance(mlp, Mlp)
        or not all(isinstance(norm, RmsNorm) for norm in norms)
    ):
        return None
    matrices = (attention.qkv.weight, attention.output.weight, mlp.up.weight, mlp.down.weight)
    floats = [
        _float(x)
        for x in (
            norms[0].weight,
            norms[1].weight,
            attention.qkv.bias,
            attention.q_weight,
            attention.k_weight,
        )
    ]
    return *matrices, *floats, attention.window or 0, attention.scale


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()
