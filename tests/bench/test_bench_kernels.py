"""The kernels' benchmark: its checks hold in the interpreter, its tables say what is known, and
without a GPU it says so."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pagewire.bench import kernels

CASES = Path(__file__).with_name("kernel_cases.py")


def test_every_kind_of_case_agrees_with_its_oracle() -> None:
    result = subprocess.run(
        [sys.executable, str(CASES)], capture_output=True, text=True, timeout=600, check=True
    )
    errors: dict[str, float] = json.loads(result.stdout)
    assert len(errors) == 15
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pagewire", "bench", "kernels"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (
        result.returncode == 1
        and "run on a GPU only" in result.stderr
        and len(result.stderr.splitlines()) == 1
    )


def row(name: str, shape: str, **given: Any) -> kernels.Row:
    return {
        "name": name,
        "shape": shape,
        "target": None,
        "unit": "TB/s",
        "peer": "",
        "us": 10.0,
        "rate": 2.5,
        "error": 0.003,
        **given,
    }


def test_the_short_table_has_what_can_be_compared_and_what_is_wrong() -> None:
    text = kernels.short_table(
        [
            row("decode", "256x1024 32q d128", target=290, us=244.0),
            row("gemm", "o 4096x4096 M1", peer="cuBLAS", peer_us=19.6),
            row("silu*mul", "1x28672"),
            row("rope", "bad", error=0.5),
            {
                "name": "prefill",
                "shape": "x",
                "target": None,
                "unit": "TFLOP/s",
                "peer": "",
                "failed": "out of memory",
            },
        ]
    )
    lines = text.splitlines()
    assert lines[2].split() == [
        "decode",
        "256x1024",
        "32q",
        "d128",
        "244",
        "290",
        "276",
        "FA3",
        "2.50",
        "TB/s",
    ]
    assert (
        "19.6  cuBLAS" in lines[3]
        and "error 0.5" in lines[4]
        and "out of memory" in lines[5]
        and len(lines) == 6
    )


def test_the_full_table_has_everything() -> None:
    rows = [
        row("silu*mul", "1x28672"),
        {"name": "a", "shape": "b", "target": None, "unit": "", "peer": "", "failed": "why"},
    ]
    text = kernels.full_table(rows)
    assert "silu*mul" in text and "3.0e-03" in text and "why" in text
