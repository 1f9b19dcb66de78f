"""A decoder's layers as one piece of machine code for few tokens, where the back end and the
weights allow (pagewire_kernels.cpu_decode).

Holds no weights: it borrows those of the layers it stands for.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from pagewire_kernels.batch import Batch
from torch import Tensor

from .architecture import Architecture
from .blocks import Attention, Mixture, Mlp
from .layers import Head, Linear, Norm, RmsNorm, TiedHead


class SequentialLayer(Protocol):
    """What is borrowed of a decoder's layer."""

    @property
    def attention(self) -> Attention:
        """Its attention."""
        ...

    @property
    def mlp(self) -> Mlp | Mixture:
        """Its MLP, of either kind."""
        ...

    @property
    def norms(self) -> Sequence[Norm]:
        """Its norms, in the order of the block."""
        ...


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
        self._decoder = decoder
        self.most_tokens = most_tokens

    def __call__(
        self,
        x: Tensor,
        cos_sin: list[Tensor],
        caches: list[Tensor],
        batch: Batch,
        logits_indices: Tensor | None,
        tick: Callable[[], None],
    ) -> Tensor:
        """x [T, H] -> logits [R, V] float32."""
        logits = self._decoder(x.float().contiguous(), cos_sin, caches, batch, logits_indices)
        tick()
        return logits


def make(
    arch: Architecture, layers: Sequence[SequentialLayer], norm: Norm | None, head: Head
) -> Native | None:
    """For a decoder whose weights are packed; None where some of it has no machine code."""
    if not plain(arch) or not isinstance(norm, RmsNorm) or not isinstance(head, Linear | TiedHead):
        return None
    arguments = [_layer_arguments(layer) for layer in layers]
    if any(argument is None for argument in arguments):
        return None
    from_layers = [argument for argument in arguments if argument is not None]
    matrices = [head.kernel_weight]
    for argument in from_layers:
        matrices += argument[:4]
    if not all(not isinstance(matrix, Tensor) and matrix.machine_code for matrix in matrices):
        return None
    from pagewire_kernels.cpu_decode import MOST_TOKENS, DecodeLayer, NativeDecoder, Sizes

    made = [DecodeLayer(*argument) for argument in from_layers]
    width = arch.num_heads * arch.head_dim
    if not all(layer.fits(width) for layer in made):
        return None
    sizes = Sizes(
        arch.hidden_size,
        arch.num_heads,
        arch.num_kv_heads,
        arch.head_dim,
        arch.intermediate_size,
        arch.norm_eps,
        arch.activation == "gelu_tanh",
    )
    return Native(NativeDecoder(made, norm.weight.float(), head.kernel_weight, sizes), MOST_TOKENS)


def _layer_arguments(layer: SequentialLayer) -> tuple[Any, ...] | None:
    """What DecodeLayer is made of: four matrices first."""
    attention = layer.attention
    mlp = layer.mlp
    norms = layer.norms
    if not isinstance(mlp, Mlp):
        return None
    first, second = norms
    if not isinstance(first, RmsNorm) or not isinstance(second, RmsNorm):
        return None
    matrices = (
        attention.qkv.kernel_weight,
        attention.output.kernel_weight,
        mlp.up.kernel_weight,
        mlp.down.kernel_weight,
    )
    vectors = (
        first.weight,
        second.weight,
        attention.qkv.bias,
        attention.q_weight,
        attention.k_weight,
    )
    floats = [_float(vector) for vector in vectors]
    return *matrices, *floats, attention.window or 0, attention.scale, attention.kv_scales


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()
