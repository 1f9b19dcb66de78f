"""What the assembler that comes with Triton says of a kernel for Hopper."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def assembled(ptx: str) -> str:
    """Its messages, registers and spills among them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(PTXAS), "-v", "-arch=sm_90a", str(source), "-o", str(Path(folder) / "out")]
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return finished.stdout + finished.stderr


def spilled_bytes(messages: str) -> int:
    """Of registers, as `messages` of `assembled` say."""
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", messages)))
