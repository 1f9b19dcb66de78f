"""Qwen3-MoE: Qwen3 with many small experts; a window, where switched on, is in every layer."""

from .architecture import Architecture, Config, common, window_size
from .qwen2_moe import mixture


def describe(config: Config) -> Architecture:
    """Qwen3-MoE."""
    bias = bool(config.get("attention_bias", False))
    window = window_size(config.get("sliding_window"))
    window = window if config.get("use_sliding_window") else None
    windows = (window,) * int(config["num_hidden_layers"])
    return common(
        config, moe=mixture(config), qk_norm=True, qkv_bias=bias, output_bias=bias, windows=windows
    )
