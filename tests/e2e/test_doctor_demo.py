"""`pagewire doctor` as a new user runs it: every check, and one token of the demo model."""

import subprocess
import sys


def test_everything_works_on_this_machine() -> None:
    command = [sys.executable, "-m", "pagewire", "doctor", "--device", "cpu", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, generation, _, verdict = done.stdout.splitlines()
    assert generation.startswith("ok      generation") and generation.endswith(
        "'The capital of France is' goes on with ' Paris'"
    )
    assert verdict == "everything works"
