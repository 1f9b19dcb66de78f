"""bench/h200.py on a machine without a GPU: all parts, in small; and what it does about parts that
fail or hang."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SCRIPT = Path(__file__).parents[2] / "bench" / "h200.py"
CONFIG = json.loads((SCRIPT.parent / "models/qwen3-0.6b/config.json").read_text())
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
}
VOCAB = 300


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("h200", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(
        [
            "time people way day man thing woman life child world school state family student group country"
        ]
        * 3,
        trainer,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | SMALL | {"vocab_size": 400}))
    return folder


def test_everything_in_one_run(
    script: ModuleType, model: Path, tokenizer: Path, tmp_path: Path
) -> None:
    file = tmp_path / "all.json"
    arguments = [
        "--device",
        "cpu",
        "--models",
        str(model),
        "--tokenizer",
        str(tokenizer),
        "--scale",
        "0.005",
        "--runs",
        "1",
    ]
    flags = [
        "--max-model-len",
        "1024",
        "--cpu-kv-cache-gb",
        "0.1",
        "--json",
        str(file),
        "--budget-s",
        "400",
    ]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, *flags],
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    parts: dict[str, Any] = json.loads(file.read_text())["parts"]
    assert list(parts) == ["http tiny", "start tiny", "offline tiny", "path tiny"]
    assert len(parts["path tiny"]["rows"]) == 6
    assert len(parts["http tiny"]["loads"]) == 5 and len(parts["offline tiny"]["workloads"]) == 6
    assert parts["start tiny"]["ready_s"] > 0 and parts["offline tiny"]["kv_tokens"] > 0
    tables = result.stdout.rpartition("\ntiny, over HTTP")[2]
    assert "tiny, offline" in tables and "first start" in tables and "HTTP / offline" in tables
    assert len(tables) < 6000, (
        "the tables of two models and the kernels must fit in 12,000 characters"
    )


def test_a_part_that_fails_leaves_a_line(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--device",
        "fake",
        "--models",
        str(model),
        "--parts",
        "start,offline",
        "--no-such-flag",
    ]
    result = subprocess.run(
        [*command, "--json", str(file), "--budget-s", "60"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert (
        "offline tiny: ended with exit code 2" in result.stdout
        and "start tiny: the server did not start" in result.stdout
    )
    assert (
        json.loads(file.read_text())["parts"]["offline tiny"]["error"] == "ended with exit code 2"
    )


def test_a_part_that_hangs_is_ended_with_its_children(script: ModuleType, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = f"import subprocess, time; c = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(c.pid)); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="stopped after 1 s"):
        script.bound_to([sys.executable, "-c", program], 1.0, dict(os.environ))
    assert time.monotonic() - began < 10
    child = Path(f"/proc/{pid.read_text()}/stat")
    end = time.monotonic() + 5
    while (
        child.exists()
        and child.read_text().rpartition(")")[2].split()[0] != "Z"
        and time.monotonic() < end
    ):
        time.sleep(0.05)
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_text_model_has_the_vocabulary_of_the_tokenizer(
    script: ModuleType, model: Path, tokenizer: Path, tmp_path: Path
) -> None:
    script.make_text_model(model, tokenizer, tmp_path / "made")
    config = json.loads((tmp_path / "made/config.json").read_text())
    assert config["vocab_size"] == VOCAB and config["hidden_size"] == SMALL["hidden_size"]
    assert (tmp_path / "made/tokenizer.json").exists()


def test_shares_of_the_time_are_for_all_parts(script: ModuleType) -> None:
    options = argparse.Namespace(
        parts=",".join(script.SECONDS), models="a,b", device="cuda", tokenizer="t"
    )
    plan = [(part, model and model.name) for part, model in script.plan_of(options)]
    assert plan[0] == ("kernels", None) and plan[1:4] == [
        ("http", "a"),
        ("start", "a"),
        ("offline", "a"),
    ]
    assert plan[-1] == ("path", "a") and len(plan) == 8
    with pytest.raises(SystemExit, match="only"):
        list(
            script.plan_of(
                argparse.Namespace(parts="http,none", models="a", device="cuda", tokenizer="")
            )
        )


def test_models_are_named_by_directory_or_as_the_bench_calls_them(script: ModuleType) -> None:
    everything = script.models_of("all")
    assert {"llama-3.1-8b-awq", "qwen3-30b-a3b", "mixtral-8x7b-awq"} <= {
        path.name for path in everything
    }
    assert script.models_of("qwen3-0.6b,/models/own") == [
        SCRIPT.parent / "models" / "qwen3-0.6b",
        Path("/models/own"),
    ]
