"""Mistral: Llama with a sliding window in every layer (none in the later releases)."""

from .architecture import Architecture, Config, common, window_size


def describe(config: Config) -> Architecture:
    """Mistral."""
    return common(
        config,
        windows=(window_size(config.get("sliding_window")),) * int(config["num_hidden_layers"]),
    )
