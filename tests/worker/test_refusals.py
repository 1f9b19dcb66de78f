"""What cannot be served ends its process with exit code 1 and one line that says why, whatever
service finds it out."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

DIRECTORY = "{directory}"


@pytest.fixture
def run_dir():
    """A short path: those of sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="pw-") as path:
        yield Path(path)


def end_of(service: str, run_dir: Path, *flags: str) -> str:
    """Run one service until it gives up; the last line of what it wrote."""
    command = [sys.executable, "-m", "pagewire", service, f"--run-dir={run_dir}", *flags]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(run_dir / "hf"),
        "PAGEWIRE_CACHE": str(run_dir / "cache"),
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def model(tiny, tmp_path):
    """model(config changes): a copy of a tiny checkpoint."""

    def make(**changes) -> Path:
        path = tmp_path / "model"
        path.mkdir()
        for file in tiny("llama").path.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        return path

    return make


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("changes", "damage", "line"),
    [
        (
            {"model_type": "nonsense"},
            None,
            "model_type 'nonsense' is known neither here nor to transformers",
        ),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "c.C"}},
            None,
            "model_type 'own' needs code from its repository, which --trust",
        ),
        (
            {"model_type": "t5", "architectures": ["T5Model"], "is_encoder_decoder": True},
            None,
            "T5Model is an encoder with a decoder",
        ),
        (
            {"vocab_size": 300},
            None,
            "tensor model.embed_tokens.weight has shape [257, 64] where the configuration asks for [300, 64]",
        ),
        ({"num_hidden_layers": 4}, None, "the checkpoint lacks 9 of"),
        ({}, truncate, f"{DIRECTORY}/model.safetensors ("),
        ({}, drop_weights, f"{DIRECTORY} has no .safetensors file; convert the checkpoint"),
    ],
)
def test_worker(changes, damage, line, model, run_dir):
    path = model(**changes)
    if damage:
        damage(path)
    last = end_of(
        "worker", run_dir, f"--model={path}", "--device=cpu", "--num-kv-blocks=40", "--threads=1"
    )
    assert last.startswith(f"pagewire worker: {line.replace(DIRECTORY, str(path))}"), last


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            (),
            "has no tokenizer.json; name a tokenizer with --tokenizer, or serve token ids with --skip-tokenizer-init",
        ),
        (("--tokenizer=nobody/nothing",), "nobody/nothing is not in the cache"),
        (("--tokenizer=/nowhere",), "/nowhere does not exist; give a directory"),
    ],
)
def test_tokenizer(flags, line, model, run_dir):
    last = end_of("tokenizer", run_dir, f"--model={model()}", *flags)
    assert last.startswith("pagewire tokenizer: ") and line in last, last


@pytest.mark.parametrize("service", ["tokenizer", "worker"])
def test_chat_template_that_is_none(service, model, run_dir):
    from tokenizers import Tokenizer, models

    path = model()
    Tokenizer(models.BPE()).save(str(path / "tokenizer.json"))
    last = end_of(service, run_dir, f"--model={path}", "--chat-template=vikuna")
    assert last.startswith(
        f"pagewire {service}: --chat-template: vikuna is neither a file nor a jinja template nor a built-in one (alpaca,"
    )
