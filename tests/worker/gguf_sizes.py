"""The metadata that a GGUF file of any architecture has of its model's sizes."""

from typing import Any

import gguf


def add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """Of a transformers configuration."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
