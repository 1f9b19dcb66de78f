"""OPT and Galactica: learned positions, saved behind two rows that are never used. The 350M model
normalises after each addition and has smaller embeddings than layers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .architecture import Architecture, Config, Unsupported, gpt_like
from .checkpoint import Named, Names
from .rope import NO_ROPE

if TYPE_CHECKING:
    from torch import Tensor

UNUSED_POSITIONS = 2
NAMES = Names(
    prefix="model.",
    layers="decoder.layers",
    top={
        "decoder.embed_tokens": "model.embed_tokens",
        "decoder.embed_positions": "model.embed_positions",
        "decoder.project_in": "model.project_in",
        "decoder.project_out": "model.project_out",
        "decoder.final_layer_norm": "model.norm",
    },
    parts={
        "self_attn_layer_norm": "input_layernorm",
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.k_proj",
        "self_attn.v_proj": "self_attn.v_proj",
        "self_attn.out_proj": "self_attn.o_proj",
        "final_layer_norm": "post_attention_layernorm",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
    },
)
NEEDED = {"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False}


def describe(config: Config) -> Architecture:
    """OPT or Galactica. Raises Unsupported for variants that are not built."""
    for name, value in NEEDED.items():
        if config.get(name, value) != value:
            raise Unsupported(f"{name} {config[name]} of opt is not supported; {value} is")
    bias = bool(config.get("enable_bias", True))
    width = config.get("word_embed_proj_dim") or config["hidden_size"]
    overrides = {
        "intermediate_size": config["ffn_dim"],
        "num_key_value_heads": None,
        "hidden_act": config.get("activation_function", "relu"),
    }
    return gpt_like(
        config | overrides,
        norm_eps=1e-5,
        bias=bias,
        block="sequential" if config.get("do_layer_norm_before", True) else "post",
        rope=NO_ROPE,
        learned_positions=True,
        embedding_size=0 if width == config["hidden_size"] else width,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


def tensors(name: str, tensor: "Tensor", arch: Architecture) -> Iterator[Named]:
    """Renamed; positions without the two rows that are never used."""
    ours = NAMES(name)
    if ours is not None:
        yield (
            ours,
            tensor[UNUSED_POSITIONS:] if ours == "model.embed_positions.weight" else tensor,
        )
