"""What a figure was measured on: software, cores, accelerator and its memory in use."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from typing import Any

from ..version import __version__

PACKAGES = ("torch", "triton", "transformers")


def describe() -> dict[str, Any]:
    facts = {
        "pagewire": __version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _query("name"),
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts | {"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}


def gpu_memory_gib() -> float | None:
    """Memory in use on the first GPU, by all processes; None without one."""
    used = _query("memory.used")
    return float(used) / 1024 if used and used.replace(".", "").isdecimal() else None


def _query(field: str) -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None
