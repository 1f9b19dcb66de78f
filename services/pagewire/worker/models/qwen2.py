"""Qwen2 and 2.5: biases on queries, keys and values; a sliding window in the upper layers where
switched on."""

from .architecture import Architecture, Config, common, layer_windows


def describe(config: Config) -> Architecture:
    """Qwen2 or 2.5."""
    return common(config, qkv_bias=True, windows=layer_windows(config))
