"""bench/single_layer.py on a machine without a GPU: its layers, in small."""

import math
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "single_layer.py"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300
    )


def test_each_model_in_small() -> None:
    done = run("--dry-run", "--without", "attention,down")
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"^(\S+)( without \w+)?: ok, \|x\| (\S+)$", done.stdout, re.M)
    assert len(found) == 5 * 3
    assert all(math.isfinite(float(norm)) and float(norm) > 0 for *_, norm in found)


def test_a_kernel_that_there_is_not() -> None:
    done = run("--dry-run", "--without", "softmax")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "softmax is none of qkv, attention, output, up, down"
    )
