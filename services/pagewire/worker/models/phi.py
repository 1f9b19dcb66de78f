"""Phi 1, 1.5 and 2: attention and MLP side by side after one LayerNorm, a part of each head
rotated, biases everywhere, the head's too."""

from .architecture import Architecture, Config, Unsupported, gpt_like
from .checkpoint import Names, renamed

NAMES = Names(
    layers="model.layers",
    top={"model.final_layernorm": "model.norm"},
    parts={
        "self_attn.dense": "self_attn.o_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    },
)
tensors = renamed(NAMES)


def describe(config: Config) -> Architecture:
    """Phi 1, 1.5 or 2. Raises Unsupported for variants that are not built."""
    if config.get("qk_layernorm"):
        raise Unsupported("qk_layernorm of phi is not supported")
    overrides = {
        "partial_rotary_factor": config.get("partial_rotary_factor", 0.5),
        "hidden_act": config.get("hidden_act", "gelu_new"),
    }
    return gpt_like(
        config | overrides,
        float(config["layer_norm_eps"]),
        bias=True,
        head_bias=True,
        block="parallel",
        shared_norm=True,
    )
