"""Where torch's grouped product, of rows sorted by expert with each expert's matrix, never waits for the device. Imports no kernel: a
worker asks before it knows whether it will need any.
"""

from typing import Final

import torch

ON_DEVICE: Final = (9, 10)
"""Compute capabilities, their first numbers. Source: _grouped_mm_cuda in torch's aten/src/ATen/native/cuda/GroupedBlas.cpp."""


def stays_on_device(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether moe.experts can be captured in a CUDA graph: elsewhere the product in bfloat16 copies the rows' counts to the CPU."""
    return dtype != torch.bfloat16 or capability[0] in ON_DEVICE
