"""ChatGLM 2 and 3, and GLM-4 as first published: few KV heads, half of each head rotated by pairs
of neighbours, joined matrices."""

from .architecture import Architecture, Config, Unsupported, common
from .checkpoint import Names, renamed
from .rope import Rope

NAMES = Names(
    prefix="transformer.",
    layers="encoder.layers",
    top={
        "embedding.word_embeddings": "model.embed_tokens",
        "encoder.final_layernorm": "model.norm",
        "output_layer": "lm_head",
    },
    parts={
        "input_layernorm": "input_layernorm",
        "self_attention.query_key_value": "self_attn.qkv_proj",
        "self_attention.dense": "self_attn.o_proj",
        "post_attention_layernorm": "post_attention_layernorm",
        "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    ignored=("rotary_pos_emb.inv_freq",),
)
NEEDED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "multi_query_attention": True,
    "apply_residual_connection_post_layernorm": False,
}
tensors = renamed(NAMES)


def describe(config: Config) -> Architecture:
    """ChatGLM 2 or 3, or GLM-4. Raises Unsupported for variants that are not built."""
    if "padded_vocab_size" not in config:
        raise Unsupported("the first ChatGLM is not supported; ChatGLM 2 and 3 and GLM-4 are")
    if config.get("quantization_bit"):
        raise Unsupported(
            f"weights of {config['quantization_bit']} bits (quantization_bit) of chatglm are not supported"
        )
    for name, value in NEEDED.items():
        if bool(config.get(name, value)) != value:
            raise Unsupported(f"{name} {config[name]} of chatglm is not supported; {value} is")
    bias = bool(config.get("add_bias_linear", False))
    size = int(config["kv_channels"])
    overrides = {
        "vocab_size": config["padded_vocab_size"],
        "num_hidden_layers": config["num_layers"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_key_value_heads": config["multi_query_group_num"],
        "head_dim": size,
        "max_position_embeddings": config["seq_length"],
    }
    rope = Rope(
        theta=10_000.0 * float(config.get("rope_ratio", 1)), size=size // 2, interleaved=True
    )
    qkv_bias = bias or bool(config.get("add_qkv_bias", False))
    return common(
        config | overrides,
        norm_eps=float(config["layernorm_epsilon"]),
        rope=rope,
        qkv_bias=qkv_bias,
        output_bias=bias,
        mlp_bias=bias,
    )
