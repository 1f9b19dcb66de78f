"""What the architectures of GGUF files are here: the family that serves them, what their metadata
means as a config.json, and the names of tensors that not all of them have.

Written by llama.cpp's convert_hf_to_gguf.py, whose changes to tensors are undone by gguf_file.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..models.architecture import Config
from ..models.rope import DEFAULT_THETA

Key = Callable[..., Any]
"""(name, default=None): the metadata of that name after the architecture's."""
Settings = Callable[[Key, Config], Config]
"""(metadata, what config.json has of all architectures) -> what it has besides, or instead."""


def _nothing(key: Key, config: Config) -> Config:
    return {}


@dataclass(frozen=True)
class GgufArchitecture:
    """family: the config.json's model_type. names: of a layer's tensors, beyond LAYER_NAMES or in
    place of them; without .weight. permuted: queries and keys are in the order of a rotation of
    neighbours."""

    family: str
    settings: Settings = _nothing
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    permuted: bool = False


LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
"""Of a layer, in a file and in a checkpoint."""
EXPERTS: Final = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}
"""Tensors of all experts of a layer, [experts, rows, columns]."""
ONE_ROW: Final = ("ffn_gate_inp_shexp",)
"""Matrices of one row, which files have as vectors."""
TOP_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
"""Outside layers."""


def _mixtral(key: Key, config: Config) -> Config:
    return {
        "num_local_experts": key("expert_count"),
        "num_experts_per_tok": key("expert_used_count"),
    }


def _mixture(key: Key, config: Config) -> Config:
    return {
        "num_experts": key("expert_count"),
        "num_experts_per_tok": key("expert_used_count"),
        "moe_intermediate_size": key("expert_feed_forward_length"),
    }


def _qwen3_moe(key: Key, config: Config) -> Config:
    return {**_mixture(key, config), "norm_topk_prob": True}


def _qwen2_moe(key: Key, config: Config) -> Config:
    return {
        **_mixture(key, config),
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": key("expert_shared_feed_forward_length"),
    }


def _gemma2(key: Key, config: Config) -> Config:
    """Defaults are those of llama.cpp, which files of the first converters count on."""
    return {
        "sliding_window": key("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _attention_scalar(config, GEMMA2_27B_LAYERS),
        "attn_logit_softcapping": key("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": key("final_logit_softcapping", 30.0) or None,
    }


def _gemma3(key: Key, config: Config) -> Config:
    """Scaling of the rotation is that of layers which see all tokens. No window: all layers are
    such layers."""
    window = key("attention.sliding_window") or 0
    return {
        "sliding_window": window,
        "query_pre_attn_scalar": _attention_scalar(config, GEMMA3_27B_LAYERS),
        "final_logit_softcapping": key("final_logit_softcapping") or None,
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_theta": key("rope.freq_base_swa", DEFAULT_THETA)},
        },
        **_pattern((key("attention.sliding_window_pattern") or GEMMA3_PATTERN) if window else 1),
    }


def _pattern(found: int | list[bool]) -> Config:
    """Every so many layers one sees all tokens, or, by layer, whether it has a window."""
    if isinstance(found, int):
        return {"sliding_window_pattern": found}
    return {"layer_types": ["sliding_attention" if near else "full_attention" for near in found]}


def _attention_scalar(config: Config, layers_of_27b: int) -> int:
    """Files do not say it; it is another one in the models of 27B, which are known by their number
    of layers."""
    if config["num_hidden_layers"] == layers_of_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _phi3(key: Key, config: Config) -> Config:
    """A window of 0 is none."""
    window = key("attention.sliding_window", _phi3_window(config))
    size = key("rope.dimension_count", config["head_dim"])
    return {
        "sliding_window": window or None,
        "partial_rotary_factor": size / config["head_dim"],
    }


def _phi3_window(config: Config) -> int:
    """Of files from before the converter wrote it: Phi-3's mini and medium of 4,096 positions have
    one, the others none that is shorter than their context."""
    short = config["max_position_embeddings"] == 4096
    return 2047 if short and config["num_hidden_layers"] in (32, 40) else 0


GEMMA2_27B_LAYERS: Final = 46
GEMMA3_27B_LAYERS: Final = 62
GEMMA3_PATTERN: Final = 6
SANDWICH_NAMES: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Norms before and after attention and MLP."""
JOINED_NAMES: Final = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
"""As models/checkpoint.py's `split` cuts them."""
ARCHITECTURES: Final = {
    "gemma": GgufArchitecture("gemma"),
    "gemma2": GgufArchitecture("gemma2", _gemma2, SANDWICH_NAMES),
    "gemma3": GgufArchitecture("gemma3_text", _gemma3, SANDWICH_NAMES),
    "llama": GgufArchitecture("llama", permuted=True),
    "phi3": GgufArchitecture("phi3", _phi3, JOINED_NAMES),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen2moe": GgufArchitecture("qwen2_moe", _qwen2_moe),
    "qwen3": GgufArchitecture("qwen3"),
    "qwen3moe": GgufArchitecture("qwen3_moe", _qwen3_moe),
}
"""By general.architecture. Norms of Gemma's files are final: converters have added the 1."""
MIXTRAL: Final = GgufArchitecture("mixtral", _mixtral, permuted=True)
"""Whose files call themselves llama."""


def of(name: str, key: Key) -> GgufArchitecture:
    """That of a file whose general.architecture is `name`."""
    return MIXTRAL if name == "llama" and key("expert_count") else ARCHITECTURES[name]


def checkpoint_name(name: str, architecture: GgufArchitecture) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight. Names without a counterpart
    stay, and loading refuses them."""
    head, _, suffix = name.rpartition(".")
    if head in TOP_NAMES:
        return f"{TOP_NAMES[head]}.{suffix}"
    parts = head.split(".")
    if parts[0] != "blk":
        return name
    known = {**LAYER_NAMES, **architecture.names}
    if len(parts) == 3 and parts[2] in known:
        return f"model.layers.{parts[1]}.{known[parts[2]]}.{suffix}"
    # files of before experts were put together have a tensor for each
    if len(parts) == 4 and f"{parts[2]}_exps" in EXPERTS and parts[3].isdigit():
        return expert_name(f"blk.{parts[1]}.{parts[2]}_exps.{suffix}", int(parts[3]))
    return name


def expert_name(name: str, expert: int) -> str:
    """blk.3.ffn_up_exps.weight -> model.layers.3.mlp.experts.5.up_proj.weight."""
    _, number, part, suffix = name.split(".")
    return f"model.layers.{number}.mlp.experts.{expert}.{EXPERTS[part]}.{suffix}"


def holds_experts(name: str) -> bool:
    """Whether a tensor is of all experts."""
    return name.split(".")[-2] in EXPERTS
