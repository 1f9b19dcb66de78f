"""Mixtral: Mistral with a mixture of experts for each MLP, under names of its own."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from pagewire_kernels.routing import Routing

from .architecture import Architecture, Config, Moe, common, window_size
from .checkpoint import Named

if TYPE_CHECKING:
    from torch import Tensor

PARTS: Final = {
    ".block_sparse_moe.": ".mlp.",
    ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
}

DEFAULT_THETA: Final = 1e6
"""Of configurations that do not say."""


def describe(config: Config) -> Architecture:
    """Mixtral."""
    config = {"rope_theta": DEFAULT_THETA} | config
    routing = Routing(
        int(config["num_local_experts"]), int(config["num_experts_per_tok"]), renormalize=True
    )
    moe = Moe(routing, int(config["intermediate_size"]))
    return common(
        config,
        moe=moe,
        windows=(window_size(config.get("sliding_window")),) * int(config["num_hidden_layers"]),
    )


def tensors(name: str, tensor: "Tensor", arch: Architecture) -> Iterator[Named]:
    """With the experts' matrices renamed."""
    for theirs, ours in PARTS.items():
        name = name.replace(theirs, ours)
    yield name, tensor
