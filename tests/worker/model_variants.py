"""The model families in small, as transformers names them: what the tests compare ours with. One line for each thing that may differ."""

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
VARIANTS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 21}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "gpt2": ("GPT2", GPT),
    "gpt2-by-layer": ("GPT2", GPT | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80, "tie_word_embeddings": False}),
    "neox": ("GPTNeoX", {}),
    "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "phi": ("Phi", {}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "glm": ("Glm", {"head_dim": 16, "attention_bias": True}),
    "glm4": ("Glm4", {"head_dim": 32, "attention_bias": True}),
}
CAUSAL = {"GPT2": "GPT2LMHeadModel"}
