"""Qwen3 (dense): queries and keys are normalised by head; biases only where the configuration asks
for them."""

from .architecture import Architecture, Config, common, layer_windows


def describe(config: Config) -> Architecture:
    """Qwen3 without experts."""
    bias = bool(config.get("attention_bias", False))
    return common(
        config, qk_norm=True, qkv_bias=bias, output_bias=bias, windows=layer_windows(config)
    )
