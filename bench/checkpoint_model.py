"""A safetensors checkpoint of a real model's sizes with random weights, for benchmarks without the
model's files.

    python bench/checkpoint_model.py bench/models/llama-3.1-8b DIRECTORY [--format awq] [--layers N]

Writes config.json, shards as the Hugging Face libraries save them, and their index. Weights have a
standard deviation of 0.02; norms are ones. Contents come from pools that are made once and are gone
through again and again, so that writing takes no longer than the disk does. There is no tokenizer:
serve it with --skip-tokenizer-init. Models are directories with the config.json of a Llama,
Mistral, Mixtral, Qwen3 or Qwen3-MoE; embeddings, routers and the head are full in all formats.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from checkpoint_files import Tensor, write_json, write_shards
from checkpoint_formats import FORMATS, FULL, Format

FAMILIES: Final = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe")


class Refused(ValueError):
    """The checkpoint cannot be written."""


@dataclass(frozen=True)
class Model:
    """What a config.json says. config: as it is written. experts: of a layer, 0 for none.
    dense_layers: those that have none all the same."""

    config: dict[str, Any]
    family: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int
    expert_inner: int
    dense_layers: frozenset[int]


@dataclass(frozen=True)
class Module:
    """A weight by the name that comes before `.weight`: [size] of a norm, or [out features, in
    features]. quantized: in formats other than bf16."""

    name: str
    shape: tuple[int, ...]
    quantized: bool = False


def read_model(directory: Path, layers: int | None) -> Model:
    """layers: in place of the configuration's. Raises Refused, OSError."""
    config = json.loads((directory / "config.json").read_text())
    family = config.get("model_type")
    if family not in FAMILIES:
        raise Refused(f"model_type {family!r} is not written; {', '.join(FAMILIES)} are")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise Refused("models with biases are not written")
    config.pop("quantization_config", None)
    try:
        return _model(_with_layers(config, layers))
    except KeyError as error:
        raise Refused(f"{directory / 'config.json'} lacks {error}") from None


def _with_layers(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    everything = config["num_hidden_layers"]
    if layers is None:
        return config
    if layers > everything:
        raise Refused(f"the model has {everything} layers, no {layers}")
    kinds = config.get("layer_types")
    fewer = {"layer_types": kinds[:layers]} if kinds else {}
    return config | fewer | {"num_hidden_layers": layers}


def _model(config: dict[str, Any]) -> Model:
    family = config["model_type"]
    heads = config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    inner = config["intermediate_size"]
    experts = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}.get(family)
    step = config.get("decoder_sparse_step", 1)
    plain = config.get("mlp_only_layers") or ()
    return Model(
        config=config,
        family=family,
        layers=layers,
        hidden=config["hidden_size"],
        inner=inner,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        experts=config[experts] if experts else 0,
        expert_inner=config["moe_intermediate_size"] if family == "qwen3_moe" else inner,
        dense_layers=frozenset(i for i in range(layers) if i in plain or (i + 1) % step),
    )


def modules(model: Model) -> Iterator[Module]:
    """All weights, in the order of the model's."""
    yield Module("model.embed_tokens", (model.vocab, model.hidden))
    for layer in range(model.layers):
        yield from _layer(model, layer)
    yield Module("model.norm", (model.hidden,))
    if not model.tied:
        yield Module("lm_head", (model.vocab, model.hidden))


def _layer(model: Model, layer: int) -> Iterator[Module]:
    hidden = model.hidden
    rows = model.heads * model.head_dim
    kv_rows = model.kv_heads * model.head_dim
    prefix = f"model.layers.{layer}"
    yield Module(f"{prefix}.self_attn.q_proj", (rows, hidden), True)
    yield Module(f"{prefix}.self_attn.k_proj", (kv_rows, hidden), True)
    yield Module(f"{prefix}.self_attn.v_proj", (kv_rows, hidden), True)
    yield Module(f"{prefix}.self_attn.o_proj", (hidden, rows), True)
    if model.family.startswith("qwen3"):
        yield Module(f"{prefix}.self_attn.q_norm", (model.head_dim,))
        yield Module(f"{prefix}.self_attn.k_norm", (model.head_dim,))
    if model.experts and layer not in model.dense_layers:
        yield from _experts(model, prefix)
    else:
        names = ("gate_proj", "up_proj", "down_proj")
        yield from _mlp(f"{prefix}.mlp", names, hidden, model.inner)
    yield Module(f"{prefix}.input_layernorm", (hidden,))
    yield Module(f"{prefix}.post_attention_layernorm", (hidden,))


def _experts(model: Model, prefix: str) -> Iterator[Module]:
    block, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    if model.family == "mixtral":
        block, names = "block_sparse_moe", ("w1", "w3", "w2")
    yield Module(f"{prefix}.{block}.gate", (model.experts, model.hidden))
    for expert in range(model.experts):
        expert_prefix = f"{prefix}.{block}.experts.{expert}"
        yield from _mlp(expert_prefix, names, model.hidden, model.expert_inner)


def _mlp(prefix: str, names: tuple[str, str, str], hidden: int, inner: int) -> Iterator[Module]:
    """names: of the gate's, the upward and the downward matrix."""
    gate, up, down = names
    yield Module(f"{prefix}.{gate}", (inner, hidden), True)
    yield Module(f"{prefix}.{up}", (inner, hidden), True)
    yield Module(f"{prefix}.{down}", (hidden, inner), True)


def tensors(model: Model, form: Format) -> Iterator[Tensor]:
    """All tensors of the checkpoint. Raises Refused for a matrix that the format does not take."""
    for module in modules(model):
        if len(module.shape) == 1:
            ones = torch.ones(module.shape, dtype=torch.bfloat16)
            yield Tensor(f"{module.name}.weight", module.shape, ones)
            continue
        rows, columns = module.shape
        module_form = form if module.quantized else FULL
        if rows % module_form.multiples[0] or columns % module_form.multiples[1]:
            multiples = "x".join(map(str, module_form.multiples))
            raise Refused(f"{module.name} ({rows}x{columns}) is no multiple of {multiples}")
        for ending, (shape, contents) in module_form.parts(rows, columns).items():
            yield Tensor(f"{module.name}.{ending}", shape, contents)


def write(directory: Path, model: Model, form: Format, shard_bytes: float) -> int:
    """Writes the checkpoint: bytes of its tensors. Raises Refused before it writes, OSError."""
    if any(directory.glob("*.safetensors")):
        raise Refused(f"{directory} has a checkpoint already")
    entries = list(tensors(model, form))
    directory.mkdir(parents=True, exist_ok=True)
    size = write_shards(directory, entries, shard_bytes)
    write_json(directory / "config.json", _config(model, form))
    return size


def _config(model: Model, form: Format) -> dict[str, Any]:
    if form is FULL:
        return model.config
    routers = [module.name for module in modules(model) if module.name.endswith(".gate")]
    return model.config | {"quantization_config": form.quantization_config(["lm_head", *routers])}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", type=Path, help="directory with a config.json")
    parser.add_argument("directory", type=Path, help="where to write the checkpoint")
    parser.add_argument("--format", choices=FORMATS, default="bf16", help="(default: bf16)")
    parser.add_argument("--layers", type=_positive, help="how many (default: the model's)")
    parser.add_argument("--shard-gb", type=float, default=5, help="most of a file (default: 5)")
    options = parser.parse_args()
    began = time.monotonic()
    try:
        model = read_model(options.model, options.layers)
        size = write(options.directory, model, FORMATS[options.format], options.shard_gb * 1e9)
    except (Refused, OSError, json.JSONDecodeError) as error:
        print(f"checkpoint_model.py: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - began
    print(
        f"{options.directory}: {options.model.resolve().name}, {options.format}, "
        f"{model.layers} layers, {size / 1e9:.2f} GB, {seconds:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
