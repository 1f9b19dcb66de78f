"""Mistral: Llama with a sliding window in every layer (none in the later releases)."""

from .architecture import Architecture, Config, common


def describe(config: Config) -> Architecture:
    """Mistral."""
    return common(
        config, windows=(config.get("sliding_window"),) * int(config["num_hidden_layers"])
    )
