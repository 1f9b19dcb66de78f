"""Llama, and the many models that share its architecture (SmolLM2, TinyLlama, Yi, ...)."""

from .architecture import Architecture, Config, common


def describe(config: Config) -> Architecture:
    """Llama or one of its likes."""
    bias = bool(config.get("attention_bias", False))
    return common(
        config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False))
    )
