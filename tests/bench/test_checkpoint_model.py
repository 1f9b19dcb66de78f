"""bench/checkpoint_model.py: the tensors of its checkpoints, and that they are loaded and run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pagewire.worker.load import formats
from pagewire.worker.load.formats.base import Assembler
from pagewire_kernels.quantized import Quantized
from pagewire_protocol.sampling import Sampling
from safetensors.torch import load_file, save
from worker.conftest import Driver

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "checkpoint_model.py"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "vocab_size": 600,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN3 = LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "tie_word_embeddings": True,
}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE}
PARTS: dict[str, dict[str, tuple[torch.dtype, list[int]]]] = {
    # of up_proj, [384, 256]
    "bf16": {"weight": (torch.bfloat16, [384, 256])},
    "awq": {
        "qweight": (torch.int32, [256, 48]),
        "qzeros": (torch.int32, [2, 48]),
        "scales": (torch.float16, [2, 384]),
    },
    "gptq": {
        "qweight": (torch.int32, [32, 384]),
        "qzeros": (torch.int32, [2, 48]),
        "scales": (torch.float16, [2, 384]),
        "g_idx": (torch.int32, [256]),
    },
    "fp8": {"weight": (torch.float8_e4m3fn, [384, 256]), "weight_scale": (torch.float32, [])},
    "fp8-blocks": {
        "weight": (torch.float8_e4m3fn, [384, 256]),
        "weight_scale_inv": (torch.float32, [3, 2]),
    },
    "bitsandbytes": {
        "weight": (torch.uint8, [49_152, 1]),
        "weight.absmax": (torch.float32, [1536]),
        "weight.quant_map": (torch.float32, [16]),
        "weight.quant_state.bitsandbytes__nf4": (torch.uint8, [80]),
    },
}
UP = "model.layers.1.mlp.up_proj"
Written = Callable[..., Path]


def run(model: Path, directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), str(model), str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """written(family, format, arguments) -> the directory of a checkpoint, written once."""
    made: dict[tuple[str, ...], Path] = {}

    def write(family: str, form: str, *arguments: str) -> Path:
        key = (family, form, *arguments)
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
            done = run(folder, folder / "made", "--format", form, *arguments)
            assert done.returncode == 0, done.stderr[-2000:]
            made[key] = folder / "made"
        return made[key]

    return write


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    files = directory.glob("*.safetensors")
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def matrices(directory: Path) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint, dequantized by the loader's own formats: float32 by name."""
    config = json.loads((directory / "config.json").read_text())
    tensors = tensors_of(directory)
    values: Any = tensors.items()
    if "quantization_config" in config:
        form = formats.read(config["quantization_config"])
        values = Assembler(form, tensors).assembled(tensors.items(), "cpu")
    return {
        name: value.dequantize() if isinstance(value, Quantized) else value.float()
        for name, value in values
    }


def library_shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Of the weights that transformers saves, by their names."""
    import transformers

    kinds = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
    described = kinds[config["model_type"]](**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(described)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return shapes


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_names_and_shapes_are_the_library_s(family: str, written: Written) -> None:
    tensors = tensors_of(written(family, "bf16"))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes == library_shapes(CONFIGS[family])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("form", PARTS)
def test_tensors_and_weights_of_a_format(form: str, written: Written) -> None:
    directory = written("llama", form)
    tensors = tensors_of(directory)
    for ending, (dtype, shape) in PARTS[form].items():
        tensor = tensors[f"{UP}.{ending}"]
        assert (tensor.dtype, list(tensor.shape)) == (dtype, shape)
    assert sum(name.startswith(f"{UP}.") for name in tensors) == len(PARTS[form])
    weights = matrices(directory)
    assert {name: weight.shape for name, weight in weights.items()} == library_shapes(LLAMA)
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones(256)), name
            continue
        assert 0.015 < weight.std() < 0.025, name
        assert abs(weight.mean()) < 0.002, name
    assert tensors["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("llama", form) for form in PARTS),
        ("qwen3", "awq"),
        ("mixtral", "awq"),
        ("qwen3_moe", "fp8-blocks"),
    ],
)
def test_the_loader_reads_it_and_runs_it(family: str, form: str, written: Written) -> None:
    greedy = Sampling(1, 6, temperature=0.0, ignore_eos=True)
    prompts = [[5, 77, 300, 42], [9, 599]]
    tokens = Driver(written(family, form)).generate(prompts, [greedy, greedy], 6)
    assert [len(output) for output in tokens] == [6, 6]
    assert all(0 <= token < 600 for output in tokens for token in output)
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize("form", ["bf16", "gptq"])
def test_shards_and_index_agree(form: str, written: Written) -> None:
    directory = written("llama", form, "--shard-gb", "0.0003")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    total = len(files)
    assert total > 3
    assert files == [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    held = {}
    size = 0
    for name in files:
        tensors = load_file(directory / name)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert nbytes <= 300_000 or len(tensors) == 1
        assert (directory / name).read_bytes() == save(tensors, metadata={"format": "pt"})
        size += nbytes
        held |= dict.fromkeys(tensors, name)
    assert index == {"metadata": {"total_size": size}, "weight_map": held}
    whole, parts = tensors_of(written("llama", form)), tensors_of(directory)
    assert {name: tensor.shape for name, tensor in parts.items()} == {
        name: tensor.shape for name, tensor in whole.items()
    }


def test_the_rest_of_the_configuration_stays(tmp_path: Path) -> None:
    """Another quantization's settings go, and `layer_types` are as many as layers."""
    kinds = ["sliding_attention", "full_attention"]
    config = QWEN3 | {"layer_types": kinds, "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run(tmp_path, tmp_path / "made", "--layers", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert made == QWEN3 | {"layer_types": kinds[:1], "num_hidden_layers": 1}
    assert "model.layers.1.input_layernorm.weight" not in tensors_of(tmp_path / "made")


def test_routers_stay_full(written: Written) -> None:
    directory = written("qwen3_moe", "fp8-blocks")
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.gate"]
    tensors = tensors_of(directory)
    router = tensors["model.layers.0.mlp.gate.weight"]
    assert (router.dtype, list(router.shape)) == (torch.bfloat16, [4, 256])
    assert tensors["model.layers.0.mlp.experts.3.down_proj.weight"].shape == (256, 128)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (256, 384)


def test_rows_differ(tmp_path: Path) -> None:
    """With 10,000,000 elements in a pool, every 625th of these rows of 16,000 would be the same."""
    config = LLAMA | {"hidden_size": 16_000, "vocab_size": 1000, "intermediate_size": 16}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run(tmp_path, tmp_path / "made", "--layers", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    embedding = tensors_of(tmp_path / "made")["model.embed_tokens.weight"].view(torch.int16)
    assert len({row.numpy().tobytes() for row in embedding}) == 1000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model_type": "gemma2"},
            "model_type 'gemma2' is not written; llama, mistral, mixtral, qwen3, qwen3_moe are",
        ),
        ({"attention_bias": True}, "models with biases are not written"),
        ({"num_hidden_layers": 1}, "the model has 1 layers, no 2"),
        (
            {"intermediate_size": 320},
            "model.layers.0.mlp.down_proj (256x320) is no multiple of 8x128",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    done = run(tmp_path, tmp_path / "made", "--format", "awq", "--layers", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"checkpoint_model.py: {reason}\n"
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_is_not_written_over(written: Written) -> None:
    directory = written("llama", "bf16")
    done = run(directory, directory)
    assert done.returncode == 1
    assert done.stderr == f"checkpoint_model.py: {directory} has a checkpoint already\n"
