"""GGUF files of mixtures of experts, written as convert_hf_to_gguf.py writes them, against
transformers with the weights that the file holds."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from pagewire.checkpoint import model_types
from pagewire.worker.load import gguf_architectures
from pagewire.worker.load.gguf_architectures import EXPERTS, LAYER_NAMES, TOP_NAMES
from pagewire.worker.load.gguf_file import Gguf
from rank_threads import run_ranks
from safetensors.torch import load_file, save_file
from worker.gguf_sizes import add_sizes
from worker.test_checkpoints import permute

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MANY = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


class Kind(NamedTuple):
    """architecture: general.architecture of the file. family: transformers' classes."""

    architecture: str
    family: str
    settings: dict[str, Any]


KINDS = {
    "qwen3moe": Kind("qwen3moe", "Qwen3Moe", {**MANY, "head_dim": 32, "norm_topk_prob": True}),
    "qwen2moe": Kind("qwen2moe", "Qwen2Moe", {**MANY, "shared_expert_intermediate_size": 64}),
    "mixtral": Kind("llama", "Mixtral", {"num_local_experts": 4}),
}
PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
IN_FILES = {
    **{ours: theirs for theirs, ours in (LAYER_NAMES | TOP_NAMES).items()},
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERT = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight"
)


def saved(kind: Kind, path: Path) -> dict[str, torch.Tensor]:
    """A random model in `path`; its tensors."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind.family}Config")(**{**SIZES, **kind.settings})
    model = getattr(transformers, f"{kind.family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                # large enough for the choice of experts to count
                parameter.normal_(0, 0.2)
    model.save_pretrained(path)
    return load_file(path / "model.safetensors")


def metadata(writer: gguf.GGUFWriter, kind: Kind, config: Any) -> None:
    add_sizes(writer, config)
    if head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    mixtral = kind.family == "Mixtral"
    writer.add_expert_count(config.num_local_experts if mixtral else config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if not mixtral:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind.family == "Qwen2Moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])


def in_the_file(
    tensors: dict[str, torch.Tensor], kind: Kind, together: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values there. together: experts of a layer are one tensor, as files have them since
    2024."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    parts = {ours: theirs for theirs, ours in EXPERTS.items()}
    for name, tensor in tensors.items():
        value = tensor.numpy()
        if found := EXPERT.fullmatch(name):
            layer, expert, part = found.groups()
            stem = f"blk.{layer}.{parts[PROJECTIONS.get(part, part)]}"
            stacks.setdefault(stem, {})[int(expert)] = value
            continue
        stem, suffix = name.rsplit(".", 1)
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        target = f"blk.{layer}.{IN_FILES[part]}" if part in IN_FILES else IN_FILES[stem]
        if kind.architecture == "llama" and target.endswith(("attn_q", "attn_k")):
            heads = SIZES["num_attention_heads" if target.endswith("q") else "num_key_value_heads"]
            value = permute(value, heads)
        yield f"{target}.{suffix}", value[0] if target.endswith("inp_shexp") else value
    for stem, matrices in stacks.items():
        if together:
            yield f"{stem}.weight", np.stack([matrices[i] for i in range(len(matrices))])
        else:
            for expert, value in matrices.items():
                yield f"{stem.removesuffix('_exps')}.{expert}.weight", value


def write(path: Path, kind: Kind, source: Path, rounding: Type | None, together: bool) -> None:
    """The model in `source` as a file, and `source` with the weights that the file has."""
    tensors = load_file(source / "model.safetensors")
    if rounding is not None:
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and not name.endswith(("gate.weight", "_gate.weight")):
                codes = gguf.quants.quantize(tensor.numpy(), rounding)
                tensors[name] = torch.from_numpy(gguf.quants.dequantize(codes, rounding).copy())
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    writer = gguf.GGUFWriter(path, kind.architecture)
    metadata(writer, kind, transformers.AutoConfig.from_pretrained(source))
    for name, value in in_the_file(tensors, kind, together):
        quantized = rounding is not None and value.ndim > 1 and "gate_inp" not in name
        if quantized:
            writer.add_tensor(name, gguf.quants.quantize(value, rounding), raw_dtype=rounding)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("rounding", [None, Type.Q8_0, Type.Q4_1], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_experts_of_a_file(name, rounding, harness, numbers, tmp_path):
    kind, path, source = KINDS[name], tmp_path / "moe.gguf", tmp_path / "source"
    saved(kind, source)
    write(path, kind, source, rounding, together=True)
    tokens = numbers(40)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0]
    ours = harness(path).logits(tokens, 40)
    most = 1e-5 * max(1.0, float(wanted.abs().max()))
    assert (ours - wanted).abs().max() < most
    for halves in run_ranks(2, lambda ranks: harness(path, None, ranks).logits(tokens, 40)):
        assert (halves - wanted).abs().max() < 2 * most


def test_experts_each_with_a_tensor(harness, numbers, tmp_path):
    kind, path, source = KINDS["mixtral"], tmp_path / "moe.gguf", tmp_path / "source"
    saved(kind, source)
    write(path, kind, source, None, together=False)
    old = harness(path).logits(numbers(20), 20)
    write(path, kind, source, None, together=True)
    assert torch.equal(harness(path).logits(numbers(20), 20), old)


def test_experts_are_counted(tmp_path):
    """In what is said of the weights, and in the plan of memory."""
    kind, path, source = KINDS["qwen3moe"], tmp_path / "moe.gguf", tmp_path / "source"
    saved(kind, source)
    write(path, kind, source, Type.Q8_0, together=True)
    file = Gguf(path)
    experts = 2 * 6 * 3
    assert file.type_counts()["Q8_0"] == experts + 2 * 4 + 2
    full, kept = file.count_bytes({}, 2), file.count_bytes({"Q8_0": 1.0625}, 2)
    assert full - kept > experts * 64 * 32 * 0.9


def test_architectures_are_those_that_are_accepted() -> None:
    assert tuple(gguf_architectures.ARCHITECTURES) == model_types.GGUF_ARCHITECTURES
