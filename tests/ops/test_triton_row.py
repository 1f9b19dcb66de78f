"""Products of one row with their norm, activation and residual, against the oracles they
replace."""

import pytest
import torch
from ops.triton_cases import error
from pagewire_kernels import reference
from pagewire_kernels.gemm_row import RowConfig, linear_add, norm_gated, norm_linear

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


def test_more_than_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="takes one row of 64"):
        norm_linear(torch.randn(2, 64), torch.ones(64), 1e-5, torch.randn(8, 64))
