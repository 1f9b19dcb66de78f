"""Ctrl-C in commands that start processes and measure or check something."""

import os
import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("words", "sign"),
    [
        (("bench", "path"), "ready in"),
        (("bench", "offline", "--device", "fake", "--skip-tokenizer-init"), "ready in"),
        (("doctor",), "versions"),
    ],
    ids=["path", "offline", "doctor"],
)
def test_ctrl_c_is_quiet(words: tuple[str, ...], sign: str) -> None:
    """It goes to all processes of the terminal: the command, its clients, its servers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pagewire", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or sign not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in rest, rest
