"""GPT-J: attention and MLP side by side after one LayerNorm, neighbouring dimensions of a part of
each head rotated, biases in the MLP and the head only."""

from .architecture import Architecture, Config, gpt_like
from .checkpoint import Names, renamed
from .rope import Rope

NAMES = Names(
    prefix="transformer.",
    layers="h",
    top={"wte": "model.embed_tokens", "ln_f": "model.norm"},
    parts={
        "ln_1": "input_layernorm",
        "attn.q_proj": "self_attn.q_proj",
        "attn.k_proj": "self_attn.k_proj",
        "attn.v_proj": "self_attn.v_proj",
        "attn.out_proj": "self_attn.o_proj",
        "mlp.fc_in": "mlp.up_proj",
        "mlp.fc_out": "mlp.down_proj",
    },
    ignored=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),
)
tensors = renamed(NAMES)


def describe(config: Config) -> Architecture:
    """GPT-J."""
    hidden = int(config["n_embd"])
    heads = int(config["n_head"])
    own = {
        "hidden_size": hidden,
        "intermediate_size": config.get("n_inner") or 4 * hidden,
        "num_hidden_layers": config["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "max_position_embeddings": config["n_positions"],
        "hidden_act": config.get("activation_function", "gelu_new"),
    }
    return gpt_like(
        config | own,
        norm_eps=float(config["layer_norm_epsilon"]),
        bias=False,
        block="parallel",
        shared_norm=True,
        rope=Rope(
            theta=10_000.0, size=int(config.get("rotary_dim") or hidden // heads), interleaved=True
        ),
        mlp_bias=True,
        head_bias=True,
    )
