"""NVIDIA's driver as this machine shows it, and why torch uses no GPU where it might. Imports no
torch: what torch says is handed in."""

import contextlib
import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

LEAST_DRIVER: Final = {11: 450, 12: 525, 13: 580}
"""Of each CUDA release (its first number) the oldest driver that runs it, by NVIDIA's table of
minor version compatibility."""
HIDDEN: Final = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES that leave no GPU."""
DRIVER_FILE: Final = Path("/proc/driver/nvidia/version")
DEVICES: Final = Path("/dev")
SMI_S: Final = 20
LIBRARY: Final = "libcuda.so.1"
ON_WSL: Final = "/usr/lib/wsl/lib/nvidia-smi"
"""Where WSL2 has the program, which not every process finds on its path."""


def driver_version() -> str:
    """Of NVIDIA's kernel module; on WSL2, which has none, of the driver on Windows. Empty when
    there is none, `unknown` when only its number cannot be had."""
    with contextlib.suppress(OSError):
        match = re.search(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", DRIVER_FILE.read_text())
        return match[1] if match else "unknown"
    if not on_wsl() or not has_library():
        return ""
    lines = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split()
    return lines[0] if lines and re.fullmatch(r"[\d.]+", lines[0]) else "unknown"


def nvidia_smi(*arguments: str) -> str:
    """What it prints; empty where it is missing or fails."""
    program = shutil.which("nvidia-smi") or ON_WSL
    try:
        return subprocess.run(
            (program, *arguments), capture_output=True, text=True, timeout=SMI_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def on_wsl() -> bool:
    """WSL2 shows GPUs of every vendor through this one device."""
    return (DEVICES / "dxg").exists()


def has_library() -> bool:
    """Whether NVIDIA's driver brought its library. Loading it starts nothing."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def has_device() -> bool:
    """Whether this process is given any of NVIDIA's devices (a container may not be)."""
    return any(DEVICES.glob("nvidia[0-9]*")) or (on_wsl() and has_library())


def has_amd_device() -> bool:
    """Whether this process is given AMD's compute device."""
    return (DEVICES / "kfd").exists()


def why_no_rocm(release: str, driver: str, device: bool, amd: bool) -> str:
    """Why torch, built for ROCm `release`, uses no GPU here; empty when there is simply none.
    driver, device: NVIDIA's."""
    if device:
        return f"{_here(driver)}, but this torch was built for AMD GPUs (ROCm {release}); install a CUDA build of torch"
    return (
        f"AMD GPUs are not supported (this torch was built for ROCm {release}); --device cpu runs without one"
        if amd
        else ""
    )


def why_none(cuda: str, driver: str, device: bool, warning: str, visible: str | None) -> str:
    """Why torch, built for CUDA release `cuda` ("" for none), uses no GPU; empty when there is
    simply none. warning: torch's own words."""
    if not driver and not device:
        return ""
    here = _here(driver)
    if not device:
        return f"{here}, but no GPU is given to this process; start a container with --gpus all"
    if not cuda:
        return f"{here}, but this torch was built without CUDA; install a CUDA build of torch"
    if visible is not None and visible.strip() in HIDDEN:
        return f"{here}, but CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
    least = LEAST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    number = driver.partition(".")[0]
    if number.isdecimal() and int(number) < least:
        return (
            f"the NVIDIA driver {driver} is too old for this torch, built for CUDA {cuda}: install driver {least} or newer, "
            f"or a torch built for an older CUDA"
        )
    reason = warning.removeprefix("CUDA initialization: ").partition("(Triggered")[0].strip()
    return f"{here}, but torch, built for CUDA {cuda}, cannot use the GPU" + (
        f": {reason}" if reason else "; `nvidia-smi` may say why"
    )


def _here(driver: str) -> str:
    return f"there is an NVIDIA driver {'' if driver == 'unknown' else driver}".rstrip()
