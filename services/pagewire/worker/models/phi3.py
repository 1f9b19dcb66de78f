"""Phi-3, 3.5 and 4: Llama with joined matrices, a window in every layer where one is named, and
LongRoPE."""

from .architecture import Architecture, Config, common, window_size
from .checkpoint import split as tensors
from .rope import read_rope

__all__ = ["describe", "tensors"]


def describe(config: Config) -> Architecture:
    """Phi-3, 3.5 or 4."""
    head_dim = int(config["hidden_size"]) // int(config["num_attention_heads"])
    scaling = config.get("rope_scaling") or {}
    if (
        scaling.get("rope_type", scaling.get("type")) == "yarn"
    ):  # what the first release called its own kind
        config = config | {"rope_scaling": scaling | {"type": "longrope", "rope_type": "longrope"}}
    return common(
        config,
        rope=read_rope(config, head_dim),
        windows=(window_size(config.get("sliding_window")),) * int(config["num_hidden_layers"]),
    )
