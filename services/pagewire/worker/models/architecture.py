"""What a model's configuration says about its shape, in one frozen record whatever file it came
from.

Reads config.json directly: importing transformers would cost seconds of
every start. The files under models/ turn a configuration into an Architecture and say only what
differs between families.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from pagewire_kernels.routing import Routing

from .rope import Rope, Unsupported, read_rope

__all__ = [
    "Architecture",
    "Config",
    "Moe",
    "Unsupported",
    "activation_of",
    "common",
    "gpt_like",
    "layer_windows",
    "read_config",
    "window_size",
]

Config = dict[str, Any]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Block = Literal["sequential", "parallel", "sandwich", "post"]
ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""By the names of configurations. The three spellings of GELU's approximation differ only in the
order of their arithmetic."""
GATED: Final = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class Moe:
    """A mixture of experts in place of the MLP. dense_layers: those that have a plain MLP all the
    same."""

    routing: Routing
    intermediate_size: int
    correction_bias: bool = False
    """The checkpoint has a bias that routers add to scores for the choice of experts only."""
    shared_size: int = 0
    """Inner size of an expert that every token goes through, behind a gate of its own; 0: none."""
    dense_layers: frozenset[int] = frozenset()

    @property
    def num_experts(self) -> int:
        """Of a layer, without shared ones."""
        return self.routing.num_experts

    @property
    def top_k(self) -> int:
        """Experts that a token goes through, without shared ones."""
        return self.routing.top_k


@dataclass(frozen=True)
class Architecture:
    """Sizes are counts, not bytes. What is not given is as in Llama."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    tie_word_embeddings: bool
    rope: Rope
    windows: tuple[int | None, ...]
    """For each layer how many tokens it sees, itself included; None is all."""
    local_rope: Rope | None = None
    """Of the layers with a window, where it differs. Must have the same `size` and
    `interleaved`."""
    extended_position: int = 0
    """How far the context may be stretched beyond max_position where asked for; 0: not at all."""
    block: Block = "sequential"
    """sequential: x += attention(norm(x)), x += mlp(norm(x)). parallel: x += attention(norm(x)) +
    mlp(norm(x)). sandwich: as sequential, with norms on what is added too. post: x = norm(x +
    attention(x)), x = norm(x + mlp(x)), and no norm at the end."""
    shared_norm: bool = False
    """Of a parallel block: attention and MLP read the same normed input."""
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    fp32_norm: bool = False
    """Norm weights are kept in float32."""
    activation: Activation = "silu"
    gated: bool = True
    moe: Moe | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are normalised by head (RMS) before they are rotated."""
    scales: tuple[float, ...] = ()
    """Of attention scores, by layer; empty: head_dim ** -0.5."""
    alibi_slopes: tuple[float, ...] = ()
    """ALiBi, by head: slope * (key position - query position) is added to the scaled score."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    embedding_size: int = 0
    """Of the token embedding and the head, with projections to and from the hidden size; 0: the
    hidden size itself."""
    learned_positions: bool = False

    @property
    def parameters(self) -> int:
        """The weights' count, norms and biases left out; a tied head counts once."""
        hidden = self.hidden_size
        width = self.embedding_size or self.hidden_size
        moe = self.moe
        attention = 2 * hidden * (self.num_heads + self.num_kv_heads) * self.head_dim
        total = self.num_layers * attention + self.vocab_size * width * (
            1 if self.tie_word_embeddings else 2
        )
        total += self.max_position * hidden * self.learned_positions + 2 * width * hidden * (
            self.embedding_size > 0
        )
        dense = self.num_layers if moe is None else len(moe.dense_layers)
        matrices = 3 if self.gated else 2
        if moe is not None:
            inner = moe.num_experts * moe.intermediate_size + moe.shared_size
            total += (self.num_layers - dense) * hidden * (3 * inner + moe.num_experts)
        return total + dense * matrices * hidden * self.intermediate_size

    @property
    def longest_position(self) -> int:
        """Positions that a context may have at most, stretched where the model allows it."""
        return max(self.max_position, self.extended_position)


def read_config(directory: Path) -> Config:
    """config.json as it is. Raises Unsupported when there is none or it is no JSON object."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise Unsupported(
            f"{directory} has no config.json; give a directory with a model, or a .gguf file"
        ) from None
    except ValueError as error:
        raise Unsupported(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise Unsupported(f"{path} holds no JSON object")
    return config


def common(config: Config, **differences: Any) -> Architecture:
    """What families share, from a configuration with Llama's names for its fields; `differences`
    are fields of Architecture, and replace what would be read. Raises Unsupported, by name, for
    what is not built, and KeyError for a field that is missing."""
    heads = int(config["num_attention_heads"])
    layers = int(config["num_hidden_layers"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    fields: dict[str, Any] = {
        "model_type": config["model_type"],
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": int(config["hidden_size"]),
        "intermediate_size": int(config["intermediate_size"]),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "max_position": int(config["max_position_embeddings"]),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "windows": (None,) * layers,
    }
    if "norm_eps" not in differences:
        fields["norm_eps"] = float(config["rms_norm_eps"])
    if "rope" not in differences:
        fields["rope"] = read_rope(config, head_dim)
    arch = Architecture(**{**fields, "activation": activation_of(config), **differences})
    if arch.gated and arch.activation not in GATED:
        raise Unsupported(
            f"activation {config['hidden_act']!r} of {config['model_type']} is not supported behind a gate"
        )
    if arch.moe is not None and arch.activation != "silu":
        raise Unsupported(
            f"activation {config['hidden_act']!r} of {config['model_type']} is not supported in a mixture of experts"
        )
    if arch.rope.kind in ("linear", "dynamic", "yarn"):
        return replace(
            arch, extended_position=int(arch.rope.original_max_position * arch.rope.factor)
        )
    return arch


def gpt_like(config: Config, norm_eps: float, bias: bool, **differences: Any) -> Architecture:
    """What GPT-2 and its kin have in common: LayerNorm, an MLP without a gate, biases in all
    matrices or none."""
    biases = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), bias)
    return common(
        config,
        **{
            "norm": "layer",
            "norm_eps": norm_eps,
            "norm_bias": True,
            "gated": False,
            **biases,
            **differences,
        },
    )


def activation_of(config: Config) -> Activation:
    """From `hidden_act`, silu where there is none. Raises Unsupported for one that is not built."""
    named = config.get("hidden_act", "silu")
    if named not in ACTIVATIONS:
        raise Unsupported(
            f"activation {named!r} of {config['model_type']} is not supported; there are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[named]


def window_size(sliding_window: int | None) -> int | None:
    """How many tokens a layer with a window sees, itself included. None for all of them, for which
    some files have 0 or -1."""
    return None if sliding_window is None or sliding_window <= 0 else int(sliding_window)


def layer_windows(config: Config) -> tuple[int | None, ...]:
    """Sliding windows where only some layers have them: those that `layer_types` names, else those
    from `max_window_layers` on."""
    layers = int(config["num_hidden_layers"])
    window = window_size(config.get("sliding_window"))
    if not config.get("use_sliding_window") or window is None:
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(
            window if i >= config.get("max_window_layers", layers) else None for i in range(layers)
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
