"""The model families in small, as transformers names them: what the tests compare ours with. One
line for each thing that may differ."""

SIZES = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}
FALCON = {"num_key_value_heads": None}
RW = FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
SOFT_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
GEMMA3 = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "sliding_window": 21,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 20,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 4.5,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0, 8.0, 8.0],
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "yarn-rope": ("Llama", {"rope_parameters": YARN}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 21}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "gpt2": ("GPT2", GPT),
    "gpt2-by-layer": (
        "GPT2",
        GPT
        | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80, "tie_word_embeddings": False},
    ),
    "neox": ("GPTNeoX", {}),
    "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "phi": ("Phi", {}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 21, "query_pre_attn_scalar": 20, **SOFT_CAPS},
    ),
    "gemma3": ("Gemma3Text", GEMMA3),
    "opt": ("OPT", OPT),
    "opt-350m": ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 40}),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 8}),
    "falcon-7b": ("Falcon", FALCON),
    "falcon-40b": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "Falcon",
        FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": ("Falcon", RW),
    "phi3": ("Phi3", {"sliding_window": 21}),
    "phi4-mini": ("Phi3", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 40}),
    "qwen2-moe": (
        "Qwen2Moe",
        EXPERTS | {"shared_expert_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "qwen3-moe": ("Qwen3Moe", EXPERTS | {"head_dim": 32, "mlp_only_layers": [1]}),
    "glm": ("Glm", {"head_dim": 16, "attention_bias": True}),
    "glm4": ("Glm4", {"head_dim": 32, "attention_bias": True}),
}
BY_LENGTH = {
    "longrope": ("Phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "dynamic-rope": ("Llama", {"max_position_embeddings": 64, "rope_parameters": DYNAMIC}),
}
"""Rotation depends on the length of what is computed: transformers decides anew each time, a worker
once."""
CAUSAL = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
