"""Falcon: 7B has one KV head and one LayerNorm for attention and MLP side by side; 40B and 180B
("new decoder architecture") several KV heads and a norm each; 11B several heads and one norm; the
RW models are sequential, with ALiBi."""

from .alibi import alibi_slopes
from .architecture import Architecture, Config, gpt_like
from .checkpoint import Names, renamed
from .rope import NO_ROPE, read_rope

OLD_NAMES = {
    "hidden_size": "n_embed",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_kv_heads": "n_head_kv",
}
NAMES = Names(
    prefix="transformer.",
    layers="h",
    top={"word_embeddings": "model.embed_tokens", "ln_f": "model.norm"},
    parts={
        "input_layernorm": "input_layernorm",
        "ln_attn": "input_layernorm",
        "self_attention.query_key_value": "self_attn.qkv_proj",
        "self_attention.dense": "self_attn.o_proj",
        "post_attention_layernorm": "post_attention_layernorm",
        "ln_mlp": "post_attention_layernorm",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
)
tensors = renamed(NAMES, by_group=True)


def describe(config: Config) -> Architecture:
    """Any Falcon, from today's or the first release's names."""
    own = {
        name: config[old] for name, old in OLD_NAMES.items() if name not in config and old in config
    }
    own["max_position_embeddings"] = config.get("max_position_embeddings", 2048)
    own["hidden_act"] = config.get("activation", "gelu")
    config = config | own
    hidden = int(config["hidden_size"])
    heads = int(config["num_attention_heads"])
    several = config.get("new_decoder_architecture", False)
    one_head = config.get("multi_query", True) and not several
    config["intermediate_size"] = config.get("ffn_hidden_size") or 4 * hidden
    config["num_key_value_heads"] = 1 if one_head else config.get("num_kv_heads") or heads
    size = hidden // heads
    return gpt_like(
        config,
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        bias=bool(config.get("bias", False)),
        block="parallel" if config.get("parallel_attn", True) else "sequential",
        shared_norm=not several or config.get("num_ln_in_parallel_attn") == 1,
        rope=NO_ROPE if config.get("alibi") else read_rope(config, size),
        # here the slopes are added before the scores are scaled
        alibi_slopes=tuple(slope * size**-0.5 for slope in alibi_slopes(heads))
        if config.get("alibi")
        else (),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
    )
