"""bench/gguf_model.py: the types and the weights of its files, and that they are loaded and run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from gguf.quants import dequantize
from pagewire.worker.load.gguf_file import Gguf
from pagewire.worker.models import describe
from pagewire.worker.models.rotary import frequencies
from pagewire_protocol.sampling import Sampling
from worker.conftest import Driver

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gguf_model.py"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 600,
    "max_position_embeddings": 256,
    "rms_norm_eps": 2**-17,  # the same number in float32, which files have
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "tie_word_embeddings": False,
}
QWEN3 = LLAMA | {
    "model_type": "qwen3",
    "head_dim": 128,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
MORE_BITS = {0, 3, 6, 7}
"""Of 8 layers: the first and the last one, and every third between them."""
TYPES = {
    # recipe: (most matrices, attn_v and ffn_down of MORE_BITS, output)
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
    "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"),
    "Q6_K": ("Q6_K", "Q6_K", "Q6_K"),
    "Q4_0": ("Q4_0", "Q4_0", "Q6_K"),
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0"),
}


def run(model: Path, file: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), str(model), str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def written(folder: Path, config: dict[str, Any], *arguments: str) -> Path:
    """The file of a model with this config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    done = run(folder, folder / "model.gguf", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "model.gguf"


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def expected_types(recipe: str) -> dict[str, str]:
    """Of LLAMA's tensors."""
    usual, more_bits, output = TYPES[recipe]
    names = {"token_embd": usual, "output": output, "output_norm": "F32", "rope_freqs": "F32"}
    for layer in range(LLAMA["num_hidden_layers"]):
        block = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
            names[block + name] = usual
        for name in ("attn_v", "ffn_down"):
            names[block + name] = more_bits if layer in MORE_BITS else usual
        for name in ("attn_norm", "ffn_norm"):
            names[block + name] = "F32"
    return {f"{name}.weight": kind for name, kind in names.items()}


def all_weights(path: Path, kind: str) -> np.ndarray:
    """Every dequantized weight of one type, in one row."""
    wanted = GGMLQuantizationType[kind]
    tensors = [tensor for tensor in GGUFReader(path).tensors if tensor.tensor_type == wanted]
    return np.concatenate([dequantize(tensor.data, wanted).reshape(-1) for tensor in tensors])


@pytest.mark.parametrize("recipe", TYPES)
def test_types_and_weights_of_a_recipe(recipe: str, tmp_path: Path) -> None:
    path = written(tmp_path, LLAMA, "--recipe", recipe)
    assert types_of(path) == expected_types(recipe)
    for kind in set(TYPES[recipe]):
        weights = all_weights(path, kind)
        assert np.isfinite(weights).all()
        assert 0.015 < weights.std() < 0.025
        assert abs(weights.mean()) < 0.0005
    metadata = Gguf(path).metadata
    assert metadata["general.file_type"] == LlamaFileType[f"MOSTLY_{recipe}"]
    assert metadata["llama.vocab_size"] == LLAMA["vocab_size"]


def test_rows_differ(tmp_path: Path) -> None:
    """With 200,000 blocks in a pool, every 25,000th of these rows of 8 would be the same."""
    sizes = {"hidden_size": 2048, "head_dim": 64, "vocab_size": 26_000}
    path = written(tmp_path, LLAMA | sizes, "--layers", "1")
    embedding = next(t for t in GGUFReader(path).tensors if t.name == "token_embd.weight")
    assert len({row.tobytes() for row in embedding.data}) == len(embedding.data) == 26_000


def test_values_of_70b_have_five_bits(tmp_path: Path) -> None:
    path = written(tmp_path, LLAMA | {"num_hidden_layers": 80}, "--layers", "8")
    types = types_of(path)
    values = [types[f"blk.{layer}.attn_v.weight"] for layer in range(8)]
    assert values == ["Q6_K" if layer in MORE_BITS else "Q5_K" for layer in range(8)]
    assert "blk.8.attn_v.weight" not in types
    assert types["blk.1.ffn_down.weight"] == "Q4_K"


def test_a_shared_embedding_has_the_type_of_the_output(tmp_path: Path) -> None:
    types = types_of(written(tmp_path, QWEN3))
    assert types["token_embd.weight"] == "Q6_K"
    assert "output.weight" not in types
    assert types["blk.0.attn_q_norm.weight"] == "F32"


def test_types_of_experts(tmp_path: Path) -> None:
    types = types_of(written(tmp_path, QWEN3_MOE))
    assert types["blk.1.ffn_gate_exps.weight"] == types["blk.1.ffn_up_exps.weight"] == "Q4_K"
    assert types["blk.1.ffn_down_exps.weight"] == "Q6_K"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert "blk.0.ffn_gate.weight" not in types


@pytest.mark.parametrize("config", [LLAMA, QWEN3, QWEN3_MOE], ids=["llama", "qwen3", "qwen3_moe"])
def test_the_loader_reads_the_same_architecture_and_runs_it(
    config: dict[str, Any], tmp_path: Path
) -> None:
    path = written(tmp_path, config, "--recipe", "Q4_K_M")
    ours, wanted = describe(Gguf(path).config()), describe(config)
    assert replace(ours, rope=wanted.rope) == wanted
    positions = config["max_position_embeddings"]
    assert torch.allclose(
        frequencies(ours.rope, positions), frequencies(wanted.rope, positions), rtol=1e-5, atol=0
    )
    prompts = [[5, 77, 300, 42], [9, 599]]
    greedy = Sampling(1, 6, temperature=0.0, ignore_eos=True)
    tokens = Driver(path).generate(prompts, [greedy, greedy], 6)
    assert [len(output) for output in tokens] == [6, 6]
    assert all(0 <= token < config["vocab_size"] for output in tokens for token in output)
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model_type": "mixtral"},
            "model_type 'mixtral' is not written; llama, qwen3, qwen3_moe are",
        ),
        ({"mlp_only_layers": [1]}, "mixtures with layers without experts are not written"),
        ({"attention_bias": True}, "models with biases are not written"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' is not written; llama3 is"),
        (
            {"hidden_size": 320},
            "rows of token_embd.weight (600x320) are no whole blocks of Q4_K",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    done = run(tmp_path, tmp_path / "model.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"gguf_model.py: {reason}\n"
    assert not (tmp_path / "model.gguf").exists()
