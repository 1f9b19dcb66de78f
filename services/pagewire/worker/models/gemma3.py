"""Gemma 3, of which the text: Gemma 2 with queries and keys normalised, five layers in six local,
and those rotated by a base of their own. The models that also see images are served for text; their
vision parts are not loaded."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from . import gemma2
from .architecture import Architecture, Config, Unsupported
from .checkpoint import Named, plus_one
from .rope import read_rope

if TYPE_CHECKING:
    from torch import Tensor

DEFAULTS: Final[Config] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
"""What the configurations of the models with images leave out, or all of them."""
VISION: Final = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
LANGUAGE: Final = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}


def describe(config: Config) -> Architecture:
    """The text model of Gemma 3. Raises Unsupported for variants that are not built."""
    config = DEFAULTS | config | config.get("text_config", {})
    if config.get("use_bidirectional_attention"):
        raise Unsupported(
            "use_bidirectional_attention of gemma3 is not supported: it embeds, it does not generate"
        )
    size = int(config["head_dim"])
    newer = config.get("rope_parameters") or {}
    local = newer.get("sliding_attention") or {
        "rope_theta": config.get("rope_local_base_freq", 10_000.0)
    }
    return gemma2.describe(
        config,
        pattern=int(
            config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        ),
        qk_norm=True,
        rope=read_rope(config | {"rope_parameters": newer.get("full_attention")}, size),
        local_rope=read_rope(config, size, parameters=local),
    )


def tensors(name: str, tensor: "Tensor", arch: Architecture) -> Iterator[Named]:
    """The language model's, by Gemma's names; those of the vision parts are left out."""
    if name.startswith(VISION):
        return
    for theirs, ours in LANGUAGE.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    yield from plus_one(name, tensor, arch)
