"""What a GPU's compute capability decides. Knows neither torch nor Triton, so that anyone may ask
before loading them."""

from typing import Final

TRITON_TENSOR_CORES_FROM: Final = (8, 0)
"""Triton 3.3 and later compile products for older ones without tensor cores (triton-lang/triton,
pull request 5066): right, but ten times slower and more."""


def attends_by_torch(capability: tuple[int, int]) -> bool:
    """Whether attention is left to torch's libraries, which have tensor cores from 7.0 on; such
    steps are not captured in CUDA graphs."""
    return capability < TRITON_TENSOR_CORES_FROM
