"""What launches share: arrival counters for blocks that finish a common result, and the option to
start before the last kernel has ended.

Knows nothing of what is counted. Every kernel leaves the counters at zero, so they are cleared
once, when they are made. The kernels that share a purpose must run on one stream at a time.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Final

import torch

COUNTERS: Final = 1 << 18
_made: dict[tuple[torch.device, str], torch.Tensor] = {}
_rehearsals: list[None] = []


@contextlib.contextmanager
def rehearsing() -> Iterator[None]:
    """Within, a graph may be captured that is never replayed: it gets counters of its own where
    there are none yet."""
    _rehearsals.append(None)
    try:
        yield
    finally:
        _rehearsals.pop()


def counters(device: torch.device, purpose: str, needed: int) -> torch.Tensor:
    """int32 [COUNTERS] of zeros for one purpose on one device, always the same tensor.

    The first call for a purpose must come before a CUDA graph is captured: inside one, the clearing
    would become a part of that graph alone.
    """
    if needed > COUNTERS:
        raise ValueError(
            f"{purpose}: {needed} results in one launch, and there are counters for {COUNTERS}; use smaller batches"
        )
    key = (device, purpose)
    if key not in _made:
        if capturing(device):
            if _rehearsals:
                return torch.empty(COUNTERS, dtype=torch.int32, device=device)
            raise RuntimeError(
                f"{purpose}: the first call was made while capturing a CUDA graph; run it once before"
            )
        _made[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _made[key]


def capturing(device: torch.device) -> bool:
    """Whether what is launched on `device` goes into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def overlap(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that calls `gdc_wait` first and `gdc_launch_dependents` later,
    both `if PDL`.

    From compute capability 9.0 on, its blocks are then set up while the kernel before it ends, and
    wait for its results (programmatic dependent launch). All such kernels must wait in every block,
    so that waiting for one is waiting for all before it, and must not let the next one in before
    they have waited: so a kernel may read before its wait what was written before the one before
    it. Long kernels let the next one in near their end: blocks that come earlier fill the
    multiprocessors unevenly.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
