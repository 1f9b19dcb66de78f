"""Mistral: Llama with a sliding window in every layer (none in the later releases), or, as Ministral 8B,
in those that `layer_types` names."""

from .architecture import Architecture, Config, common, window_size

DEFAULT_WINDOW = 4096
"""Of configurations that do not say; later releases say null."""


def describe(config: Config) -> Architecture:
    """Mistral."""
    layers = int(config["num_hidden_layers"])
    window = window_size(config.get("sliding_window", DEFAULT_WINDOW))
    kinds = config.get("layer_types") or ["sliding_attention"] * layers
    return common(
        config, windows=tuple(window if kind == "sliding_attention" else None for kind in kinds)
    )
