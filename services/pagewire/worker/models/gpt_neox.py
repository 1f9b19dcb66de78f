"""GPT-NeoX and Pythia: attention and MLP side by side, a quarter of each head rotated, LayerNorm,
queries to values joined head by head."""

from .architecture import Architecture, Config, gpt_like
from .checkpoint import Names, renamed

NAMES = Names(
    layers="gpt_neox.layers",
    top={
        "gpt_neox.embed_in": "model.embed_tokens",
        "gpt_neox.final_layer_norm": "model.norm",
        "embed_out": "lm_head",
    },
    parts={
        "input_layernorm": "input_layernorm",
        "attention.query_key_value": "self_attn.qkv_proj",
        "attention.dense": "self_attn.o_proj",
        "post_attention_layernorm": "post_attention_layernorm",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
tensors = renamed(NAMES, by_group=True)


def describe(config: Config) -> Architecture:
    """GPT-NeoX or Pythia."""
    overrides = {
        "num_key_value_heads": None,
        "hidden_act": config.get("hidden_act", "gelu"),
        "partial_rotary_factor": config.get("rotary_pct", 0.25),
    }
    bias = bool(config.get("attention_bias", True))
    block = "parallel" if config.get("use_parallel_residual", True) else "sequential"
    return gpt_like(
        config | overrides, float(config["layer_norm_eps"]), bias, mlp_bias=True, block=block
    )
