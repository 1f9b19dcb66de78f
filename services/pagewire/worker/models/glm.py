"""GLM-4 as transformers has it (glm), and GLM-4-0414 (glm4), which also norms what attention and
MLP give."""

from dataclasses import replace

from .architecture import Architecture, Config, common
from .checkpoint import Names, renamed
from .rope import read_rope

SANDWICH = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
tensors = renamed(Names(layers="model.layers", top={}, parts={}))
tensors4 = renamed(Names(layers="model.layers", top={}, parts=SANDWICH))


def describe(config: Config) -> Architecture:
    """GLM-4 as transformers has it."""
    config = config | {"partial_rotary_factor": config.get("partial_rotary_factor", 0.5)}
    head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    rope = read_rope(config, head_dim, interleaved=True)
    return common(config, rope=rope, qkv_bias=bool(config.get("attention_bias", True)))


def describe4(config: Config) -> Architecture:
    """GLM-4-0414."""
    return replace(describe(config), block="sandwich")
