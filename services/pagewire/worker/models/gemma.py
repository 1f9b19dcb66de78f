"""Gemma: a GELU gate, embeddings scaled by the root of the hidden size, norms saved as their
difference from 1, the head tied."""

from typing import Any

from .architecture import Architecture, Config, common
from .checkpoint import plus_one

tensors = plus_one


def describe(config: Config, **differences: Any) -> Architecture:
    """Gemma; `differences`: those of its successors, as for `common`."""
    bias = bool(config.get("attention_bias", False))
    return common(
        config | {"hidden_act": config.get("hidden_activation") or "gelu_pytorch_tanh"},
        fp32_norm=True,
        embedding_scale=float(config["hidden_size"]) ** 0.5,
        qkv_bias=bias,
        output_bias=bias,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        **differences,
    )
