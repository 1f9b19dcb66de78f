"""What a model's configuration says about its shape, in one frozen record whatever file it came from.

Reads config.json and generation_config.json directly: importing transformers would cost seconds of every start. The files under models/
turn a configuration into an Architecture and say only what differs between families.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Config = dict[str, Any]
ROPE_KINDS: Final = ("default", "linear", "llama3")


class Unsupported(ValueError):
    """The model asks for something that is not built; the message names it."""


@dataclass(frozen=True)
class Rope:
    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    divisors: tuple[float, ...] = ()
    """One for each frequency, from files that bring them ready-made; replaces `kind`."""


@dataclass(frozen=True)
class Architecture:
    """Sizes are counts, not bytes. windows: for each layer how many tokens it sees, itself included; None is all."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    tied: bool
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def parameters(self) -> int:
        """The weights' count, norms and biases left out; a tied head counts once."""
        heads = self.num_heads + self.num_kv_heads
        layer = self.hidden_size * (2 * heads * self.head_dim + 3 * self.intermediate_size)
        return self.num_layers * layer + self.vocab_size * self.hidden_size * (1 if self.tied else 2)


def read_config(directory: Path) -> Config:
    """config.json as it is. Raises Unsupported when there is none or it is no JSON object."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise Unsupported(f"{directory} has no config.json; give a directory with a model, or a .gguf file") from None
    except ValueError as error:
        raise Unsupported(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise Unsupported(f"{path} holds no JSON object")
    return config


def eos_token_ids(directory: Path, config: Config) -> tuple[int, ...]:
    """The end-of-sequence ids that config.json and generation_config.json name, in rising order."""
    path = directory / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    found: set[int] = set()
    for given in (config.get("eos_token_id"), generation.get("eos_token_id")):
        found.update(given if isinstance(given, list) else [] if given is None else [given])
    return tuple(sorted(found))


def common(config: Config, **differences: Any) -> Architecture:
    """What all Llama-like families share; `differences` are fields of Architecture. Raises Unsupported, by name, for what is not built."""
    _refuse(config)
    heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    fields: dict[str, Any] = {
        "model_type": config["model_type"],
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": int(config["hidden_size"]),
        "intermediate_size": int(config["intermediate_size"]),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
        "rms_norm_eps": float(config["rms_norm_eps"]),
        "max_position": int(config["max_position_embeddings"]),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "rope": _rope(config),
        "windows": (None,) * layers,
    }
    return Architecture(**{**fields, **differences})


def layer_windows(config: Config) -> tuple[int | None, ...]:
    """Sliding windows where only some layers have them: those that `layer_types` names, else those from `max_window_layers` on."""
    layers, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    if not config.get("use_sliding_window") or window is None:
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(window if i >= config.get("max_window_layers", layers) else None for i in range(layers))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _refuse(config: Config) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise Unsupported(f"activation {config['hidden_act']!r} of {config['model_type']} is not supported; silu is")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise Unsupported(f"weights quantized with {method!r} are not supported; give unquantized safetensors or a GGUF file")


def _rope(config: Config) -> Rope:
    """Newer files keep everything under `rope_parameters`, older ones have `rope_theta` and `rope_scaling`."""
    given = config.get("rope_parameters") or {}
    scaling = given or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise Unsupported(f"rope scaling {kind!r} of {config['model_type']} is not supported; there are {', '.join(ROPE_KINDS)}")
    if float(given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise Unsupported(f"rotating a part of each head (partial_rotary_factor) of {config['model_type']} is not supported")
    return Rope(
        theta=float(given.get("rope_theta", config.get("rope_theta", 10_000.0))),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_position=int(scaling.get("original_max_position_embeddings", config["max_position_embeddings"])),
        divisors=tuple(scaling.get("divisors", ())),
    )
