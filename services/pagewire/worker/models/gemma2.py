"""Gemma 2: norms around attention and MLP, a window in every other layer, soft caps on scores and
logits."""

from typing import Any

from . import gemma
from .architecture import Architecture, Config, window_size
from .checkpoint import plus_one as tensors

__all__ = ["describe", "tensors"]

ATTENTION_CAP = 50.0
FINAL_CAP = 30.0
"""Of configurations that do not say; those without caps say null."""


def windows(config: Config, pattern: int) -> tuple[int | None, ...]:
    """By `layer_types`, or in all layers but every `pattern`-th."""
    layers = int(config["num_hidden_layers"])
    window = window_size(config["sliding_window"])
    kinds = config.get("layer_types")
    local = (
        [kind == "sliding_attention" for kind in kinds]
        if kinds
        else [(i + 1) % pattern > 0 for i in range(layers)]
    )
    return tuple(window if near else None for near in local)


def describe(config: Config, pattern: int = 2, **differences: Any) -> Architecture:
    """Gemma 2, or with other `differences` its successor. pattern: every so many layers one sees
    all tokens."""
    return gemma.describe(
        config,
        block="sandwich",
        windows=windows(config, pattern),
        scales=(float(config["query_pre_attn_scalar"]) ** -0.5,) * int(config["num_hidden_layers"]),
        attn_logit_softcapping=config.get("attn_logit_softcapping", ATTENTION_CAP),
        final_logit_softcapping=config.get("final_logit_softcapping", FINAL_CAP),
        **differences,
    )
