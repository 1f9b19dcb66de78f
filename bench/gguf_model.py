"""A GGUF file of a real model's sizes with random weights, for benchmarks without the model's files.

    python bench/gguf_model.py bench/models/llama-3.1-8b FILE.gguf [--recipe Q4_K_M] [--layers N]

The tensors have the block types that llama.cpp's llama-quantize chooses for the recipe (without an
importance matrix), and weights with a standard deviation of 0.02. Blocks come from a pool that is
made once a type and is gone through again and again, so that writing takes no longer than the disk
does. The file has no tokenizer: serve it with --skip-tokenizer-init. Models are directories with
the config.json of a dense Llama or Qwen3.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from byte_pool import Pool
from gguf import GGML_QUANT_SIZES, GGUFWriter, LlamaFileType
from gguf import GGMLQuantizationType as Type
from gguf_blocks import pool_of

ARCHITECTURES: Final = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
"""general.architecture, by config.json's model_type."""
QUANTIZATION_VERSION: Final = 2
"""Of the layout of blocks, ggml's GGML_QNT_VERSION."""


class Refused(ValueError):
    """The model or its sizes cannot be written."""


@dataclass(frozen=True)
class Recipe:
    """Types of matrices. more_bits: attn_v and ffn_down of the layers that `use_more_bits` names.
    output: the matrix of the logits, and the embedding where there is only one for both."""

    usual: Type
    more_bits: Type
    output: Type
    file_type: LlamaFileType


RECIPES: Final = {
    "Q4_K_M": Recipe(Type.Q4_K, Type.Q6_K, Type.Q6_K, LlamaFileType.MOSTLY_Q4_K_M),
    "Q5_K_M": Recipe(Type.Q5_K, Type.Q6_K, Type.Q6_K, LlamaFileType.MOSTLY_Q5_K_M),
    "Q6_K": Recipe(Type.Q6_K, Type.Q6_K, Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "Q4_0": Recipe(Type.Q4_0, Type.Q4_0, Type.Q6_K, LlamaFileType.MOSTLY_Q4_0),
    "Q8_0": Recipe(Type.Q8_0, Type.Q8_0, Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


@dataclass(frozen=True)
class Model:
    """What a config.json says. divisors: of Llama 3's rotary frequencies, [head_dim / 2] float32.
    is_70b: what llama.cpp takes for Llama's 70B, however many layers are written. experts: in each
    layer, 0: it has an MLP; `used` of them for a token, each with `expert_inner` values inside."""

    name: str
    family: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    eps: float
    theta: float
    divisors: np.ndarray | None
    tied: bool
    is_70b: bool
    experts: int
    used: int
    expert_inner: int


@dataclass(frozen=True)
class Tensor:
    """shape: as in torch. values: those of a float32 tensor; None: random blocks of `kind`."""

    name: str
    shape: tuple[int, ...]
    kind: Type
    values: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


def read_model(directory: Path, layers: int | None) -> Model:
    """layers: in place of the configuration's. Raises Refused, OSError."""
    config = json.loads((directory / "config.json").read_text())
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise Refused(f"model_type {family!r} is not written; {', '.join(ARCHITECTURES)} are")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise Refused("mixtures with layers without experts are not written")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise Refused("models with biases are not written")
    try:
        return _model(directory.resolve().name, config, layers)
    except KeyError as error:
        raise Refused(f"{directory / 'config.json'} lacks {error}") from None


def _model(name: str, config: dict[str, Any], layers: int | None) -> Model:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    all_layers = config["num_hidden_layers"]
    return Model(
        name=name,
        family=config["model_type"],
        layers=layers or all_layers,
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
        divisors=_rope_divisors(config, head_dim),
        tied=config.get("tie_word_embeddings", False),
        is_70b=config["model_type"] == "llama" and all_layers == 80 and heads != kv_heads,
        experts=config.get("num_experts", 0),
        used=config.get("num_experts_per_tok", 0),
        expert_inner=config.get("moe_intermediate_size", 0),
    )


def _rope_divisors(config: dict[str, Any], head_dim: int) -> np.ndarray | None:
    """[head_dim / 2] float32: what GGUF files have instead of Llama 3's factors. None without
    scaling. Raises Refused for another kind."""
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    if scaling.get("rope_type") != "llama3":
        raise Refused(f"rope_type {scaling.get('rope_type')!r} is not written; llama3 is")
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    # Fast frequencies stay, slow ones are divided by the factor, those between are blended.
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / factor + blend)).astype(np.float32)


def use_more_bits(layer: int, layers: int) -> bool:
    """Whether llama.cpp gives attn_v and ffn_down of a layer more bits in the _M recipes: the first
    and the last eighth, and every third layer between."""
    first = layers // 8
    last = 7 * layers // 8
    return layer < first or layer >= last or (layer - first) % 3 == 2


def tensors(model: Model, recipe: Recipe) -> Iterator[Tensor]:
    """All tensors of the file, in its order."""
    embedding = recipe.output if model.tied else recipe.usual
    yield Tensor("token_embd.weight", (model.vocab, model.hidden), embedding)
    if model.divisors is not None:
        yield Tensor("rope_freqs.weight", model.divisors.shape, Type.F32, model.divisors)
    for layer in range(model.layers):
        yield from _layer(model, recipe, layer)
    yield _norm("output_norm", model.hidden)
    if not model.tied:
        yield Tensor("output.weight", (model.vocab, model.hidden), recipe.output)


def _layer(model: Model, recipe: Recipe, layer: int) -> Iterator[Tensor]:
    hidden, inner = model.hidden, model.inner
    rows = model.heads * model.head_dim
    kv_rows = model.kv_heads * model.head_dim
    down = value = recipe.more_bits if use_more_bits(layer, model.layers) else recipe.usual
    if model.is_70b and value == Type.Q4_K:  # eight heads share a value: it is small
        value = Type.Q5_K
    matrices: dict[str, tuple[tuple[int, ...], Type]] = {
        "attn_q": ((rows, hidden), recipe.usual),
        "attn_k": ((kv_rows, hidden), recipe.usual),
        "attn_v": ((kv_rows, hidden), value),
        "attn_output": ((hidden, rows), recipe.usual),
    }
    if model.experts:
        inner = model.expert_inner
        matrices |= {
            "ffn_gate_exps": ((model.experts, inner, hidden), recipe.usual),
            "ffn_up_exps": ((model.experts, inner, hidden), recipe.usual),
            "ffn_down_exps": ((model.experts, hidden, inner), down),
        }
        router = np.random.default_rng(layer).normal(0, 0.02, (model.experts, hidden))
        yield Tensor(
            f"blk.{layer}.ffn_gate_inp.weight", router.shape, Type.F32, router.astype(np.float32)
        )
    else:
        matrices |= {
            "ffn_gate": ((inner, hidden), recipe.usual),
            "ffn_up": ((inner, hidden), recipe.usual),
            "ffn_down": ((hidden, inner), down),
        }
    norms = {"attn_norm": hidden, "ffn_norm": hidden}
    if model.family != "llama":
        norms |= {"attn_q_norm": model.head_dim, "attn_k_norm": model.head_dim}
    for name, (shape, kind) in matrices.items():
        yield Tensor(f"blk.{layer}.{name}.weight", shape, kind)
    for name, size in norms.items():
        yield _norm(f"blk.{layer}.{name}", size)


def _norm(name: str, size: int) -> Tensor:
    return Tensor(f"{name}.weight", (size,), Type.F32, np.ones(size, np.float32))


def write(path: Path, model: Model, recipe: Recipe) -> None:
    """Writes the file over one that is there. Raises Refused before it writes, OSError."""
    entries = list(tensors(model, recipe))
    writer = GGUFWriter(path, ARCHITECTURES[model.family])
    for tensor in entries:
        block, _ = GGML_QUANT_SIZES[tensor.kind]
        if tensor.shape[-1] % block:
            shape = "x".join(map(str, tensor.shape))
            raise Refused(
                f"rows of {tensor.name} ({shape}) are no whole blocks of {tensor.kind.name}"
            )
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind
        )
    _add_metadata(writer, model, recipe)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    _write_data(writer, writer.fout[0], entries)
    writer.close()


def _add_metadata(writer: GGUFWriter, model: Model, recipe: Recipe) -> None:
    writer.add_name(f"{model.name} with random weights")
    writer.add_file_type(recipe.file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.inner)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.eps)
    writer.add_rope_freq_base(model.theta)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_vocab_size(model.vocab)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(model.used)
        writer.add_expert_feed_forward_length(model.expert_inner)


def _write_data(writer: GGUFWriter, file: BinaryIO, entries: list[Tensor]) -> None:
    """One tensor after another, each at a multiple of the alignment. The writer's own method would
    need every tensor whole in memory."""
    pools: dict[Type, Pool] = {}
    writer.write_padding(file, file.tell())
    for tensor in entries:
        if tensor.values is not None:
            file.write(tensor.values.tobytes())
        else:
            if tensor.kind not in pools:
                pools[tensor.kind] = pool_of(tensor.kind)
            pools[tensor.kind].write(file, tensor.nbytes)
        writer.write_padding(file, tensor.nbytes)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="directory with a config.json")
    parser.add_argument("file", type=Path, help="the GGUF file to write")
    parser.add_argument("--recipe", choices=RECIPES, default="Q4_K_M", help="(default: Q4_K_M)")
    parser.add_argument("--layers", type=_positive, help="how many (default: the model's)")
    options = parser.parse_args()
    began = time.monotonic()
    try:
        model = read_model(options.model, options.layers)
        write(options.file, model, RECIPES[options.recipe])
    except (Refused, OSError, json.JSONDecodeError) as error:
        print(f"gguf_model.py: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - began
    size = options.file.stat().st_size
    print(
        f"{options.file}: {model.name}, {options.recipe}, {model.layers} layers, "
        f"{size / 1e9:.2f} GB, {seconds:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
