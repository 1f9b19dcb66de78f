"""What this machine's processor is, and which types it has products for. Knows no model."""

import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Processor(NamedTuple):
    """name: as the system says. vectors: torch's word for the instructions it uses, like AVX2;
    DEFAULT for less. bfloat16: oneDNN multiplies it; that takes AVX-512 (BW, VL and DQ) or
    AVX-NE-CONVERT on x86-64, BF16 on Arm."""

    name: str
    vectors: str
    bfloat16: bool

    def title(self) -> str:
        """Name and vector instructions, human-readable."""
        vectors = (
            "no AVX2"
            if self.vectors == "DEFAULT" and platform.machine() == "x86_64"
            else self.vectors
        )
        return f"{self.name} ({vectors})"


@cache
def look() -> Processor:
    """PendingQueries torch and oneDNN."""
    import torch

    has = (
        getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        if torch.backends.mkldnn.is_available()
        else None
    )
    return Processor(_name(), torch.backends.cpu.get_cpu_capability(), bool(has and has()))


def _name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
