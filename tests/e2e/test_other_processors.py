"""The CPU worker on x86-64 processors that this machine is not, emulated by qemu: without AVX-512,
and without AVX at all. The model is small and its weights are random: qemu needs minutes for one
step of the demo model.

Compiling takes minutes there too, so it is done here first, for the other processor: its directory
then has the code of both, and the emulated process must find its own and no other's, which would be
illegal instructions.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("greedy_on_processor.py")
ASK = "from llvmlite import binding as b; print(b.get_host_cpu_name(), b.get_host_cpu_features().flatten())"
CONFIG = {
    "model_type": "llama", "dtype": "bfloat16", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
}  # fmt: skip
PROMPTS = [[5, 9, 11, 7, 23], list(range(1, 41))]
"""One that goes through the machine code, and one so long that its products are torch's."""

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("qemu-x86_64"),
    reason="needs qemu-x86_64 (Debian: qemu-user) on x86-64",
)


def python(cache: Path, *arguments: str, on: str = "", **environment: str) -> str:
    """What a Python process prints, on this processor or on an emulated one."""
    emulated = ["qemu-x86_64", "-cpu", on] if on else []
    variables = {**os.environ, "PAGEWIRE_CACHE": str(cache), **environment}
    result = subprocess.run(
        [*emulated, sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=variables,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def greedy(model: Path, dtype: str, on: str = "", **environment: str) -> dict[str, Any]:
    arguments = (str(SCRIPT), str(model), dtype, "8", json.dumps(PROMPTS))
    return json.loads(python(model / "cache", *arguments, on=on, **environment))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("small")
    (place / "config.json").write_text(json.dumps(CONFIG))
    return place


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[list[int]]:
    tokens = greedy(model, "float32")["tokens"]
    assert len({tuple(one) for one in tokens}) == len(PROMPTS)
    return tokens


@pytest.mark.parametrize(
    ("processor", "title", "half"), [("Haswell", "AVX2", True), ("Nehalem", "no AVX2", False)]
)
def test_the_worker_runs_and_gives_the_same_tokens(
    model: Path, wanted: list[list[int]], processor: str, title: str, half: bool
) -> None:
    name, features = python(model, "-c", ASK, on=processor).split()
    greedy(model, "float32", NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)
    compiled = sorted(model.rglob("*.o"))
    found = greedy(model, "auto", on=processor)
    assert found["tokens"] == wanted
    assert sorted(model.rglob("*.o")) == compiled, "it found what was compiled for it"
    assert found["half"] == half
    (why,) = [line for line in found["lines"] if "using float32" in line]
    assert f"({title})" in why and "bfloat16" in why
    assert any("rounded to int4" in line for line in found["lines"]), "the weights stay quantized"
    assert (
        found["refusal"].startswith("--dtype bfloat16: this processor")
        and "\n" not in found["refusal"]
    )


def test_a_whole_environment_is_emulated_and_what_it_starts_too(tmp_path: Path) -> None:
    """scripts/emulated: on it a stack can be tried as a user of such a processor has it."""
    place = tmp_path / "environment"
    variables = {**os.environ, "VENV": sys.prefix}
    subprocess.run([ROOT / "scripts" / "emulated", place], check=True, env=variables)
    assert "pagewire" in subprocess.check_output(
        [place / "bin" / "pagewire", "--version"], text=True
    )
    ask = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ASK!r}], check=True)"
    result = subprocess.check_output([place / "bin" / "python", "-c", ask], text=True)
    name, features = result.split()
    assert name == "haswell"
    assert "+avx2" in features and "+avx512f" not in features
