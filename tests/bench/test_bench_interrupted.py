"""Ctrl-C in a benchmark."""

import os
import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "words", [("path",), ("offline", "--device", "fake", "--skip-tokenizer-init")], ids=str
)
def test_ctrl_c_is_quiet(words: tuple[str, ...]) -> None:
    """It goes to all processes of the terminal: the benchmark, its clients, its servers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pagewire", "bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or "ready in" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in rest, rest
