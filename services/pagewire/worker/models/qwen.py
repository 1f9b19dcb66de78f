"""Qwen-1: Llama with its own names, biases on joined queries, keys and values, and the gate as the
second half of the MLP.

Beyond `seq_length`, to which it was trained, the original changes its rotary base and its queries
with the length of each prompt; keys that are cached for several requests cannot follow that, so
contexts end there."""

from .architecture import Architecture, Config, Unsupported, common
from .checkpoint import Names, renamed

NAMES = Names(
    layers="transformer.h",
    top={"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"},
    parts={
        "ln_1": "input_layernorm",
        "attn.c_attn": "self_attn.qkv_proj",
        "attn.c_proj": "self_attn.o_proj",
        "ln_2": "post_attention_layernorm",
        "mlp.w2": "mlp.gate_proj",
        "mlp.w1": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
    ignored=("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias"),
)
tensors = renamed(NAMES)


def describe(config: Config) -> Architecture:
    """Qwen-1. Raises Unsupported for variants that are not built."""
    if not config.get("scale_attn_weights", True):
        raise Unsupported(
            "attention without scaling (scale_attn_weights false) of qwen is not supported"
        )
    bias = not config.get("no_bias", True)
    overrides = {
        "head_dim": config["kv_channels"],
        "num_key_value_heads": None,
        "intermediate_size": config["intermediate_size"] // 2,
        "max_position_embeddings": config["seq_length"],
        "partial_rotary_factor": config.get("rotary_pct", 1.0),
    }
    return common(
        config | overrides,
        norm_eps=float(config["layer_norm_epsilon"]),
        qkv_bias=True,
        output_bias=bias,
        mlp_bias=bias,
    )
