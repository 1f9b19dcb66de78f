"""GPT-2: learned positions, biases everywhere, LayerNorm, an MLP without a gate; matrices saved
transposed, queries to values joined."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .architecture import Architecture, Config, Unsupported, gpt_like
from .checkpoint import Named, Names, split
from .rope import NO_ROPE

if TYPE_CHECKING:
    from torch import Tensor

NAMES = Names(
    prefix="transformer.",
    layers="h",
    top={"wte": "model.embed_tokens", "wpe": "model.embed_positions", "ln_f": "model.norm"},
    parts={
        "ln_1": "input_layernorm",
        "attn.c_attn": "self_attn.qkv_proj",
        "attn.c_proj": "self_attn.o_proj",
        "ln_2": "post_attention_layernorm",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
    ignored=(".attn.bias", ".attn.masked_bias"),
)


def describe(config: Config) -> Architecture:
    """GPT-2. Raises Unsupported for variants that are not built."""
    if config.get("add_cross_attention"):
        raise Unsupported("add_cross_attention of gpt2 is not supported")
    hidden = int(config["n_embd"])
    layers = int(config["n_layer"])
    overrides = {
        "hidden_size": hidden,
        "intermediate_size": config.get("n_inner") or 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": config["n_head"],
        "num_key_value_heads": None,
        "max_position_embeddings": config["n_positions"],
        "hidden_act": config.get("activation_function", "gelu_new"),
    }
    scale = (
        (hidden // int(config["n_head"])) ** -0.5 if config.get("scale_attn_weights", True) else 1.0
    )
    by_layer = config.get("scale_attn_by_inverse_layer_idx", False)
    return gpt_like(
        config | overrides,
        norm_eps=float(config["layer_norm_epsilon"]),
        bias=True,
        rope=NO_ROPE,
        learned_positions=True,
        scales=tuple(scale / (i + 1) if by_layer else scale for i in range(layers)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


def tensors(name: str, tensor: "Tensor", arch: Architecture) -> Iterator[Named]:
    """Renamed and cut; the layers' matrices are saved transposed."""
    ours = NAMES(name)
    if ours is not None:
        inside = ours.startswith("model.layers.") and tensor.ndim == 2
        yield from split(ours, tensor.T if inside else tensor, arch)
