"""Where torch's grouped product, of rows sorted by expert with each expert's matrix, never waits
for the device. Imports no kernel: a worker asks before it knows whether it will need any.
"""

import torch

from .capability import captures_experts


def stays_on_device(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether moe.experts can be captured in a CUDA graph: elsewhere the product in bfloat16 copies
    the rows' counts to the CPU."""
    return dtype != torch.bfloat16 or captures_experts(capability)
