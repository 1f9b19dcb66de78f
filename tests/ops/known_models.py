"""Sizes of public models, as their config.json has them, with few layers: all that decides which
kernels are launched in which shapes.

Layers are cut to one of each kind, and experts to four: more of the same launch the same.
"""

from typing import Any

Config = dict[str, Any]


def _llama(
    kind: str, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> Config:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    rest = {
        "num_hidden_layers": 1,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
    }
    return {"model_type": kind, "vocab_size": vocab, **sizes, **rest, **more}


EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
TWO_KINDS = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
TIED = {"tie_word_embeddings": True}

MODELS: dict[str, Config] = {
    "Llama-3.1-8B": _llama("llama", 4096, 14336, 32, 8, 128_256),
    "Llama-3.2-1B": _llama("llama", 2048, 8192, 32, 8, 128_256, head_dim=64, **TIED),
    "TinyLlama-1.1B": _llama("llama", 2048, 5632, 32, 4, 32_000),
    "SmolLM2-135M": _llama("llama", 576, 1536, 9, 3, 49_152, **TIED),
    "Mistral-7B": _llama("mistral", 4096, 14336, 32, 8, 32_768, sliding_window=None),
    "Mixtral-8x7B": _llama("mixtral", 4096, 14336, 32, 8, 32_000, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "Qwen2.5-0.5B": _llama("qwen2", 896, 4864, 14, 2, 151_936, **TIED),
    "Qwen2.5-3B": _llama("qwen2", 2048, 11008, 16, 2, 151_936, **TIED),
    "Qwen2.5-7B": _llama("qwen2", 3584, 18944, 28, 4, 152_064),
    "Qwen3-0.6B": _llama("qwen3", 1024, 3072, 16, 8, 151_936, head_dim=128, **TIED),
    "Qwen3-8B": _llama("qwen3", 4096, 12288, 32, 8, 151_936, head_dim=128),
    "Qwen3-30B-A3B": _llama("qwen3_moe", 2048, 6144, 32, 4, 151_936, head_dim=128, **EXPERTS),
    "Gemma-2B": _llama("gemma", 2048, 16384, 8, 1, 256_000, head_dim=256),
    "Gemma-2-2B": _llama("gemma2", 2304, 9216, 8, 4, 256_000, **TWO_KINDS, **CAPS),
    "Gemma-2-9B": _llama("gemma2", 3584, 14336, 16, 8, 256_000, **TWO_KINDS, **CAPS),
    "Gemma-3-1B": _llama("gemma3_text", 1152, 6912, 4, 1, 262_144, **TWO_KINDS, sliding_window=512),
    "Gemma-3-4B": _llama("gemma3_text", 2560, 10240, 8, 4, 262_208, **TWO_KINDS, sliding_window=1024),
    "Phi-2": _llama("phi", 2560, 10240, 32, 32, 51_200, layer_norm_eps=1e-5, partial_rotary_factor=0.4, hidden_act="gelu_new"),
    "Phi-3-mini": _llama("phi3", 3072, 8192, 32, 32, 32_064, sliding_window=2047),
    "GLM-4-9B": _llama("glm", 4096, 13696, 32, 2, 151_552, head_dim=128, attention_bias=True),
    "Baichuan-7B": _llama("baichuan", 4096, 11008, 32, 32, 64_000),
    "Pythia-1B": _llama("gpt_neox", 2048, 8192, 8, 8, 50_304, layer_norm_eps=1e-5, hidden_act="gelu"),
    "Baichuan-13B": {
        "model_type": "baichuan",
        "vocab_size": 64_000,
        "hidden_size": 5120,
        "intermediate_size": 13696,
        "num_attention_heads": 40,
        "num_hidden_layers": 1,
        "model_max_length": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    },
    "ChatGLM3-6B": {
        "model_type": "chatglm",
        "padded_vocab_size": 65_024,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "num_attention_heads": 32,
        "multi_query_group_num": 2,
        "kv_channels": 128,
        "num_layers": 1,
        "seq_length": 8192,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
    },
    "Falcon-7B": {
        "model_type": "falcon",
        "vocab_size": 65_024,
        "hidden_size": 4544,
        "num_attention_heads": 71,
        "num_hidden_layers": 1,
        "multi_query": True,
        "parallel_attn": True,
        "layer_norm_epsilon": 1e-5,
    },
    "GPT-2": {
        "model_type": "gpt2",
        "vocab_size": 50_257,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 1,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
    },
    "GPT-J-6B": {
        "model_type": "gptj",
        "vocab_size": 50_400,
        "n_embd": 4096,
        "n_head": 16,
        "n_layer": 1,
        "n_positions": 2048,
        "rotary_dim": 64,
        "layer_norm_epsilon": 1e-5,
    },
    "OPT-1.3B": {
        "model_type": "opt",
        "vocab_size": 50_272,
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 1,
        "max_position_embeddings": 2048,
    },
}  # fmt: skip
