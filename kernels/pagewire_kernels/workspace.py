"""Memory that kernels keep between launches: arrival counters for blocks that finish a common result.

Knows nothing of what is counted. Every kernel leaves the counters at zero, so they are cleared once, when they are made. The kernels
that share a purpose must run on one stream at a time.
"""

from typing import Final

import torch

COUNTERS: Final = 1 << 18
_made: dict[tuple[torch.device, str], torch.Tensor] = {}


def counters(device: torch.device, purpose: str, needed: int) -> torch.Tensor:
    """int32 [COUNTERS] of zeros for one purpose on one device, always the same tensor.

    The first call for a purpose must come before a CUDA graph is captured: inside one, the clearing would become a part of that graph
    alone.
    """
    if needed > COUNTERS:
        raise ValueError(f"{purpose}: {needed} results in one launch, and there are counters for {COUNTERS}; use smaller batches")
    key = (device, purpose)
    if key not in _made:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{purpose}: the first call was made while capturing a CUDA graph; run it once before")
        _made[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _made[key]
