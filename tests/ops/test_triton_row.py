"""Products of one row with their norm, activation and residual, against the oracles they
replace."""

import pytest
import torch
from ops.triton_cases import error
from pagewire.worker.models.rounding import ROUNDINGS
from pagewire_kernels import reference
from pagewire_kernels.cuda_quantized import CudaQuantized
from pagewire_kernels.gemm_row import RowConfig, linear_add, norm_gated, norm_linear
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.quantized import Quantized, quantize

CONFIGS = [
    None,
    RowConfig(block_n=4, block_k=64, warps=1, stages=2),
    RowConfig(block_n=8, block_k=256, warps=2, stages=2, early=True),
]
SHAPES = [(64, 256), (50, 200), (30, 576)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rows(n: int, k: int, config: RowConfig | None) -> None:
    x, norm, weight, bias, residual = (
        torch.randn(1, k),
        torch.randn(k),
        torch.randn(2 * n, k),
        torch.randn(2 * n),
        torch.randn(1, 2 * n),
    )
    normed = reference.rms_norm(x, norm, 1e-5)
    assert error(norm_linear(x, norm, 1e-5, weight, None, config), normed @ weight.T) < 1e-5
    assert error(norm_linear(x, norm, 1e-5, weight, bias, config), normed @ weight.T + bias) < 1e-5
    assert (
        error(norm_gated(x, norm, 1e-5, weight, config), reference.silu_mul(normed @ weight.T))
        < 1e-5
    )
    assert error(linear_add(x, weight, None, residual, config), x @ weight.T + residual) < 1e-5
    assert (
        error(linear_add(x, weight, bias, residual, config), x @ weight.T + bias + residual) < 1e-5
    )


@pytest.mark.parametrize("rounding", ["fp8", "bitsandbytes_8bit"])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (50, 192), (30, 576)])
def test_rows_of_codes_with_a_scale_a_row(n: int, k: int, rounding: str) -> None:
    rounded = ROUNDINGS[rounding].values(torch.randn(2 * n, k))
    assert isinstance(rounded, Quantized)
    matrices = CudaQuantized(KernelChoices()).pack([rounded], False)
    assert matrices is not None
    matrix = matrices.row_weight
    assert matrix is not None
    full = rounded.dequantize()
    x, norm, bias, residual = (
        torch.randn(1, k),
        torch.randn(k),
        torch.randn(2 * n),
        torch.randn(1, 2 * n),
    )
    normed = reference.rms_norm(x, norm, 1e-5)
    assert error(norm_linear(x, norm, 1e-5, matrix, bias), normed @ full.T + bias) < 1e-5
    gated = reference.silu_mul(normed @ full.T)
    assert error(norm_gated(x, norm, 1e-5, matrix), gated) < 1e-5
    assert error(linear_add(x, matrix, None, residual), x @ full.T + residual) < 1e-5


def test_codes_that_are_not_read_by_row() -> None:
    ops = CudaQuantized(KernelChoices())
    for rounded in (
        quantize(torch.randn(64, 128), 4).regrouped(16),
        quantize(torch.randn(64, 128), 8),
    ):
        matrices = ops.pack([rounded], False)
        assert matrices is not None
        assert matrices.row_weight is None


def test_more_than_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="takes one row of 64"):
        norm_linear(torch.randn(2, 64), torch.ones(64), 1e-5, torch.randn(8, 64))
