"""Qwen-1, Baichuan and ChatGLM written for reading, in plain torch and float32, from what their
authors published; and tiny checkpoints.

One sequence at a time, no cache, no batching. They share nothing with the worker: weights are
looked up by the checkpoints' own names.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, normalize, silu

Weights = dict[str, Tensor]
Config = dict[str, Any]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate_halves(x: Tensor, theta: float) -> Tensor:
    """x [T, heads, D]: dimension i turns with i + D/2 (GPT-NeoX's layout)."""
    size = x.shape[-1]
    angle = torch.outer(
        torch.arange(len(x)).float(), theta ** -(torch.arange(0, size, 2).float() / size)
    )[:, None]
    a, b = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def rotate_pairs(x: Tensor, size: int, theta: float) -> Tensor:
    """x [T, heads, D]: of the first `size` dimensions, 2i turns with 2i + 1 (GPT-J's layout)."""
    out = x.clone()
    for position in range(len(x)):
        for pair in range(size // 2):
            angle = position * theta ** -(2 * pair / size)
            a, b = x[position, :, 2 * pair], x[position, :, 2 * pair + 1]
            out[position, :, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            out[position, :, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: list[float] | None = None) -> Tensor:
    """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq * D], causal; query head h reads KV head h // (Hq
    / Hkv)."""
    tokens, heads, size = q.shape
    out = torch.zeros_like(q)
    for head in range(heads):
        keys, values = k[:, head * k.shape[1] // heads], v[:, head * k.shape[1] // heads]
        scores = q[:, head] @ keys.T / math.sqrt(size)
        if alibi_slopes is not None:
            scores = scores + alibi_slopes[head] * (
                torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
            )
        hidden = torch.arange(tokens)[None] > torch.arange(tokens)[:, None]
        out[:, head] = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values
    return out.flatten(1)


def qwen(weights: Weights, config: Config, tokens: list[int]) -> Tensor:
    heads, size, eps = (
        config["num_attention_heads"],
        config["kv_channels"],
        config["layer_norm_epsilon"],
    )
    x = weights["transformer.wte.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        name = f"transformer.h.{layer}"
        normed = rms(x, weights[f"{name}.ln_1.weight"], eps)
        joined = linear(
            normed, weights[f"{name}.attn.c_attn.weight"], weights[f"{name}.attn.c_attn.bias"]
        )
        q, k, v = (part.view(len(x), heads, size) for part in joined.chunk(3, -1))
        q, k = (rotate_halves(part, config["rotary_emb_base"]) for part in (q, k))
        x = x + linear(attend(q, k, v), weights[f"{name}.attn.c_proj.weight"])
        normed = rms(x, weights[f"{name}.ln_2.weight"], eps)
        inner = linear(normed, weights[f"{name}.mlp.w1.weight"]) * silu(
            linear(normed, weights[f"{name}.mlp.w2.weight"])
        )
        x = x + linear(inner, weights[f"{name}.mlp.c_proj.weight"])
    return linear(rms(x, weights["transformer.ln_f.weight"], eps), weights["lm_head.weight"])


def alibi(heads: int) -> list[float]:
    """The slopes as the paper's code makes them: a series for a power of two, for other numbers
    mixed from the two nearest ones."""
    power = 2 ** math.floor(math.log2(heads))
    first = 2 ** -(2 ** -(math.log2(power) - 3))
    found = [first ** (n + 1) for n in range(power)]
    if power < heads:
        found += alibi(2 * power)[0::2][: heads - power]
    return found


def baichuan(weights: Weights, config: Config, tokens: list[int]) -> Tensor:
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    size = config["hidden_size"] // heads
    rotary = "max_position_embeddings" in config
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        normed = rms(x, weights[f"{name}.input_layernorm.weight"], eps)
        q, k, v = (
            part.view(len(x), heads, size)
            for part in linear(normed, weights[f"{name}.self_attn.W_pack.weight"]).chunk(3, -1)
        )
        if rotary:
            q, k = rotate_halves(q, 10_000.0), rotate_halves(k, 10_000.0)
        x = x + linear(
            attend(q, k, v, None if rotary else alibi(heads)),
            weights[f"{name}.self_attn.o_proj.weight"],
        )
        normed = rms(x, weights[f"{name}.post_attention_layernorm.weight"], eps)
        gate, up = (
            linear(normed, weights[f"{name}.mlp.{part}_proj.weight"]) for part in ("gate", "up")
        )
        x = x + linear(silu(gate) * up, weights[f"{name}.mlp.down_proj.weight"])
    head = weights["lm_head.weight"]
    return linear(
        rms(x, weights["model.norm.weight"], eps),
        normalize(head) if "z_loss_weight" in config else head,
    )


def chatglm(weights: Weights, config: Config, tokens: list[int]) -> Tensor:
    heads, groups, size = (
        config["num_attention_heads"],
        config["multi_query_group_num"],
        config["kv_channels"],
    )
    eps, theta = config["layernorm_epsilon"], 10_000.0 * config.get("rope_ratio", 1)
    x = weights["transformer.embedding.word_embeddings.weight"][tokens]
    for layer in range(config["num_layers"]):
        name = f"transformer.encoder.layers.{layer}"
        normed = rms(x, weights[f"{name}.input_layernorm.weight"], eps)
        joined = linear(
            normed,
            weights[f"{name}.self_attention.query_key_value.weight"],
            weights[f"{name}.self_attention.query_key_value.bias"],
        )
        q, k, v = joined.view(len(x), -1, size).split((heads, groups, groups), 1)
        q, k = rotate_pairs(q, size // 2, theta), rotate_pairs(k, size // 2, theta)
        x = x + linear(attend(q, k, v), weights[f"{name}.self_attention.dense.weight"])
        gate, up = linear(
            rms(x, weights[f"{name}.post_attention_layernorm.weight"], eps),
            weights[f"{name}.mlp.dense_h_to_4h.weight"],
        ).chunk(2, -1)
        x = x + linear(silu(gate) * up, weights[f"{name}.mlp.dense_4h_to_h.weight"])
    return linear(
        rms(x, weights["transformer.encoder.final_layernorm.weight"], eps),
        weights["transformer.output_layer.weight"],
    )


COMMON = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
QWEN = COMMON | {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "intermediate_size": 192,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10_000,
    "rotary_pct": 1.0,
    "seq_length": 256,
    "max_position_embeddings": 512,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
}
BAICHUAN = COMMON | {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "hidden_act": "silu",
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
CHATGLM = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "padded_vocab_size": 257,
    "hidden_size": 64,
    "num_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 96,
    "layernorm_epsilon": 1e-5,
    "seq_length": 256,
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
CASES: dict[str, tuple[Callable[[Weights, Config, list[int]], Tensor], Config]] = {
    "qwen1": (qwen, QWEN),
    "baichuan-7b": (
        baichuan,
        BAICHUAN | {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 256},
    ),
    "baichuan-13b": (baichuan, BAICHUAN | {"model_max_length": 256, "num_attention_heads": 8}),
    "baichuan-13b-six-heads": (
        baichuan,
        BAICHUAN | {"model_max_length": 256, "hidden_size": 96, "num_attention_heads": 6},
    ),
    "baichuan2-7b": (baichuan, BAICHUAN | {"max_position_embeddings": 256, "z_loss_weight": 0}),
    "chatglm2": (chatglm, CHATGLM),
    "glm-4-9b": (
        chatglm,
        CHATGLM
        | {
            "architectures": ["ChatGLMForConditionalGeneration"],
            "rope_ratio": 500,
            "multi_query_group_num": 1,
        },
    ),
}


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, those that a loader has to skip included."""
    hidden, kind = config["hidden_size"], config["model_type"]
    if kind == "qwen":
        inner, attention = (
            config["intermediate_size"] // 2,
            config["num_attention_heads"] * config["kv_channels"],
        )
        layer = {
            "ln_1.weight": (hidden,),
            "ln_2.weight": (hidden,),
            "attn.c_attn.weight": (3 * attention, hidden),
        }
        layer |= {"attn.c_attn.bias": (3 * attention,), "attn.c_proj.weight": (hidden, attention)}
        layer |= {
            "mlp.w1.weight": (inner, hidden),
            "mlp.w2.weight": (inner, hidden),
            "mlp.c_proj.weight": (hidden, inner),
        }
        top = {
            "transformer.wte.weight": (257, hidden),
            "transformer.ln_f.weight": (hidden,),
            "lm_head.weight": (257, hidden),
        }
        return top | {
            f"transformer.h.{n}.{name}": shape for n in range(3) for name, shape in layer.items()
        }
    if kind == "baichuan":
        layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        layer |= {
            "self_attn.W_pack.weight": (3 * hidden, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
        }
        layer |= {
            "mlp.gate_proj.weight": (96, hidden),
            "mlp.up_proj.weight": (96, hidden),
            "mlp.down_proj.weight": (hidden, 96),
        }
        if "max_position_embeddings" in config:
            layer["self_attn.rotary_emb.inv_freq"] = (hidden // config["num_attention_heads"] // 2,)
        top = {
            "model.embed_tokens.weight": (257, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (257, hidden),
        }
        return top | {
            f"model.layers.{n}.{name}": shape for n in range(3) for name, shape in layer.items()
        }
    size, groups = config["kv_channels"], config["multi_query_group_num"]
    attention = config["num_attention_heads"] * size
    layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    layer["self_attention.query_key_value.weight"] = (attention + 2 * groups * size, hidden)
    layer["self_attention.query_key_value.bias"] = (attention + 2 * groups * size,)
    layer |= {"self_attention.dense.weight": (hidden, attention)}
    layer |= {"mlp.dense_h_to_4h.weight": (192, hidden), "mlp.dense_4h_to_h.weight": (hidden, 96)}
    top = {
        "embedding.word_embeddings.weight": (257, hidden),
        "encoder.final_layernorm.weight": (hidden,),
    }
    top |= {"output_layer.weight": (257, hidden), "rotary_pos_emb.inv_freq": (size // 4,)}
    layers = {
        f"encoder.layers.{n}.{name}": shape for n in range(3) for name, shape in layer.items()
    }
    return {f"transformer.{name}": shape for name, shape in (top | layers).items()}


@dataclass
class Remote:
    """A tiny checkpoint as its authors would have saved it, and its oracle."""

    path: Path
    weights: Weights
    config: Config
    oracle: Callable[[Weights, Config, list[int]], Tensor]

    def logits(self, tokens: list[int]) -> Tensor:
        return self.oracle(self.weights, self.config, tokens)


def make(name: str, path: Path) -> Remote:
    oracle, config = CASES[name]
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for key, shape in shapes(config).items():
        noise = torch.randn(shape, generator=generator) * 0.2
        weights[key] = 1 + noise if len(shape) == 1 and not key.endswith("bias") else noise
    path.mkdir()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return Remote(path, weights, config, oracle)
