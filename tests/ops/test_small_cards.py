"""The kernels in the launch shapes of cards with less shared memory, in Triton's interpreter."""

import pytest
import torch
from ops.shape_cases import BOUNDS, BY_HEAD_SIZE, KERNELS, SMALL, Place
from pagewire_kernels import shapes
from pagewire_kernels.shapes import KIB_99, KIB_163

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16)
"""The interpreter multiplies no bfloat16; gpu_shapes.py does."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kernel", BY_HEAD_SIZE)
def test_attention(kernel: str, dim: int, dtype: torch.dtype) -> None:
    with shapes.pretend(KIB_99):
        shape, wrong = KERNELS[kernel](Place(CPU, dtype, dim, SMALL))
    assert wrong < BOUNDS[dtype], shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [KIB_99, KIB_163])
@pytest.mark.parametrize("kernel", ["skinny", "search"])
def test_gemm_choice_and_the_search(kernel: str, limit: int, dtype: torch.dtype) -> None:
    with shapes.pretend(limit):
        shape, wrong = KERNELS[kernel](Place(CPU, dtype, 64, SMALL))
    assert wrong < BOUNDS[dtype], shape
