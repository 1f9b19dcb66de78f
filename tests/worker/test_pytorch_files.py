"""Checkpoints in PyTorch's own files, for models that were never saved as safetensors."""

import json
import pathlib

import pytest
import torch
from pagewire.config import ModelConfig
from pagewire.worker.models.architecture import Unsupported


@pytest.fixture
def saved(tiny, tmp_path):
    """saved(**state): a directory with the tiny OPT-like checkpoint as one pytorch_model.bin, and
    more tensors or other objects."""

    def make(old: bool = False, **more) -> pathlib.Path:
        reference = tiny("llama-biases")
        (tmp_path / "config.json").write_text((reference.path / "config.json").read_text())
        state = {**reference.model.state_dict(), **more}
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        return tmp_path

    return make


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("load_format", ["auto", "pt"])
def test_one_file(old, load_format, saved, tiny, harness, numbers):
    tokens = numbers(20)
    ours = harness(saved(old), ModelConfig(load_format=load_format)).logits(tokens, 20)
    assert torch.allclose(ours, tiny("llama-biases").logits(tokens), atol=1e-4)


def test_shards(saved, tiny, harness, numbers):
    path, tokens = saved(), numbers(20)
    state = torch.load(path / "pytorch_model.bin", weights_only=True)
    (path / "pytorch_model.bin").unlink()
    names = sorted(state)
    parts = {f"pytorch_model-0000{n}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, path / file)
    index = {name: file for file, part in parts.items() for name in part}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.allclose(
        harness(path).logits(tokens, 20), tiny("llama-biases").logits(tokens), atol=1e-4
    )
    (path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(
        Unsupported,
        match=r"lacks 1 of the 2 files of its weights, among them pytorch_model-00001-of-00002\.bin: the download",
    ):
        harness(path)


def test_safetensors_come_first_unless_pt_is_asked_for(saved, tiny, harness, numbers):
    path, tokens = saved(), numbers(10)
    (path / "pytorch_model.bin").write_bytes(b"nothing to load")
    (path / "model.safetensors").write_bytes(
        (tiny("llama-biases").path / "model.safetensors").read_bytes()
    )
    assert torch.allclose(
        harness(path).logits(tokens, 10), tiny("llama-biases").logits(tokens), atol=1e-4
    )
    with pytest.raises(
        Unsupported, match=r"pytorch_model\.bin \(15 bytes\) is broken or its download incomplete"
    ):
        harness(path, ModelConfig(load_format="pt"))
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(Unsupported, match=r"has no \.safetensors and no pytorch_model\.bin file"):
        harness(path, ModelConfig(load_format="pt"))


@pytest.mark.parametrize("old", [False, True])
def test_truncated(old, saved, harness):
    path = saved(old)
    whole = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Unsupported, match="is broken or its download incomplete; fetch it again"):
        harness(path)


def test_a_file_that_could_run_code_is_not_loaded(saved, harness):
    with pytest.raises(
        Unsupported, match="holds more than tensors, which could run code: it is not loaded"
    ):
        harness(saved(surprise=pathlib.Path("x")))


def test_something_else_than_named_tensors(saved, harness):
    with pytest.raises(Unsupported, match="holds something else than named tensors"):
        harness(saved(optimizer={"step": 1}))
