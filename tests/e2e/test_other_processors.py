"""The CPU worker on x86-64 processors that this machine is not, emulated by qemu: without AVX-512,
and without AVX at all. The runner alone computes with a small model of random weights; a whole stack
does with the demo model, on one of them, since that takes a minute or two.

For the runner, functions are compiled here first, for the other processor: its directory then has the
code of both, and the emulated process must find its own and no other's, which would be illegal
instructions.
"""

import json
import os
import platform
import re
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


def emulated_check(*arguments: str, **environment: str) -> tuple[int, str]:
    """(exit code, lines) of scripts/emulated_check.py, which uses scripts/emulated."""
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "emulated_check.py", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "VENV": sys.prefix, **environment},
    )
    return result.returncode, result.stdout


@pytest.mark.skipif(
    os.environ.get("PAGEWIRE_TEST_EMULATED_STACK") != "1",
    reason="takes minutes: PAGEWIRE_TEST_EMULATED_STACK=1 runs it",
)
def test_a_whole_stack_is_emulated_and_answers_the_same() -> None:
    """As a user of such a processor has it: every service, and the demo model."""
    code, said = emulated_check("Haswell")
    assert code == 0, said
    here, there = said.splitlines()
    assert here.startswith("this machine: torch.") and "8 tokens in" in here
    assert there.startswith("Haswell: torch.float32 on ") and "(AVX2)" in there
    assert there.endswith("'The capital of France is Paris.'")


def test_a_processor_without_what_numpy_needs_is_refused_in_a_line(tmp_path: Path) -> None:
    variables = {**os.environ, "VENV": sys.prefix}
    subprocess.run([ROOT / "scripts" / "emulated", tmp_path, "qemu64"], check=True, env=variables)
    # of `serve`, whichever is the first of its processes to import numpy or torch
    for *command, line in (
        ("serve", "--port", "0", "pagewire serve: (?:worker|scheduler)-0 "),
        ("doctor", "BROKEN  device         the process that imports torch "),
    ):
        result = subprocess.run(
            [tmp_path / "bin" / "pagewire", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        wanted = f"{line}was killed by SIGILL: an instruction that this processor does not have"
        assert re.search(f"^{wanted}", result.stdout, re.MULTILINE), result.stdout


STAND_IN = """
import http.server, json, os, signal, sys
THERE = os.environ["PAGEWIRE_CACHE"].split("/cache")[0] + "/venv" in sys.executable

class Answers(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        choice = {{"token_ids": [int(THERE)], "message": {{"content": "x"}}}}
        self.wfile.write(json.dumps({{"choices": [choice]}}).encode())

if THERE:
    {there}
print("llama with 1 M parameters as torch.float32 on a stand-in")
server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
print(f"Pagewire serves it at http://127.0.0.1:{{server.server_port}}/v1", flush=True)
server.serve_forever()
"""
REFUSE = 'sys.exit("pagewire: this processor is too old")'
GIVE_UP = 'sys.exit("pagewire serve: worker-0 died 5 times, giving up")'
CRASH = "os.kill(os.getpid(), signal.SIGILL)"


@pytest.mark.parametrize(
    ("there", "code", "said"),
    [
        ("pass", 1, "Haswell: other tokens: [1], not [0]"),
        (REFUSE, 0, "Haswell: refused: pagewire: this processor is too old"),
        (GIVE_UP, 1, "Haswell: ended with 1"),
        (CRASH, 1, "Haswell: ended with -4"),
    ],
)
def test_the_check_of_a_whole_stack_says_what_was_not_as_promised(
    tmp_path: Path, there: str, code: int, said: str
) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "lib").symlink_to(Path(sys.prefix, "lib"))
    shutil.copy(Path(sys.prefix, "pyvenv.cfg"), tmp_path)
    pagewire = tmp_path / "bin" / "pagewire"
    pagewire.write_text(f"#!{python}\n" + STAND_IN.format(there=there))
    pagewire.chmod(0o755)
    found, lines = emulated_check("Haswell", VENV=str(tmp_path))
    assert (found, lines.splitlines()[-1]) == (code, said)
