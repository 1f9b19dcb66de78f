"""Products of one row with their norm, activation and residual, against the oracles they
replace."""

from dataclasses import replace

import pytest
import torch
from ops.triton_cases import error
from pagewire.worker.models.rounding import ROUNDINGS
from pagewire_kernels import reference
from pagewire_kernels.cuda import OPS
from pagewire_kernels.cuda_quantized import CudaQuantized, QuantizedMatrices
from pagewire_kernels.gemm_row import RowConfig, linear_add, norm_gated, norm_linear
from pagewire_kernels.gemm_row_codes import CodesRowConfig
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


def codes(kind: str, n: int, k: int) -> Quantized:
    """Random codes of 8 bits [n, k], with scales as `kind` says."""
    weight = torch.randn(n, k)
    if kind in ROUNDINGS:
        rounded = ROUNDINGS[kind].values(weight)
        assert isinstance(rounded, Quantized)
        return rounded
    group = int(kind.split()[-1])
    if kind.startswith("fp8"):
        scale = torch.rand(n, k // group) + 0.5
        return Quantized(weight.to(torch.float8_e4m3fn), scale.half().float())
    rounded = quantize(weight, 8, group)
    if "minima" not in kind:
        return rounded
    minimum = torch.randn(rounded.scale.shape).mul(0.3).half().float()
    return replace(rounded, minimum=minimum)


def packed(*rounded: Quantized) -> QuantizedMatrices:
    matrices = CudaQuantized(KernelChoices()).pack(rounded, False)
    assert matrices is not None
    assert matrices.takes_row
    return matrices


KINDS = {
    "fp8": (64, 576),
    "bitsandbytes_8bit": (50, 192),
    "int8 in groups of 16": (30, 576),
    "int8 in groups of 32": (64, 1088),
    "int8 in groups of 64": (50, 192),
    "int8 in groups of 128": (30, 1280),
    "int8 and minima in groups of 32": (64, 576),
    "int8 and minima in groups of 128": (30, 256),
    "fp8 in groups of 128": (50, 640),
}
"""(rows, columns) of each kind of scales."""
CODES_CONFIGS = (None, CodesRowConfig(block_n=8, warps=1), CodesRowConfig(4, 2, early=False))


@pytest.mark.parametrize("config", CODES_CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_codes(kind: str, config: CodesRowConfig | None) -> None:
    if kind in ROUNDINGS and config is not None:
        pytest.skip("codes with a scale a row have launch shapes of another kind")
    n, k = KINDS[kind]
    rounded = codes(kind, 2 * n, k)
    matrix = packed(rounded).parts[0]
    full = rounded.dequantize()
    x, norm, bias, residual = (
        torch.randn(1, k),
        torch.randn(k),
        torch.randn(2 * n),
        torch.randn(1, 2 * n),
    )
    normed = reference.rms_norm(x, norm, 1e-5)
    # scales and zero points that are no whole numbers are rounded to float16
    most = 1e-3 if "minima" in kind else 1e-5
    assert error(norm_linear(x, norm, 1e-5, matrix, bias, config), normed @ full.T + bias) < most
    gated = reference.silu_mul(normed @ full.T)
    assert error(norm_gated(x, norm, 1e-5, matrix, config), gated) < most
    assert error(linear_add(x, matrix, None, residual, config), x @ full.T + residual) < most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes_times_a_row_of_16_bits(dtype: torch.dtype) -> None:
    rounded = codes("int8 in groups of 16", 64, 576)
    matrix = packed(rounded).parts[0]
    x, norm, residual = (
        torch.randn(1, 576).to(dtype),
        torch.randn(576).to(dtype),
        torch.randn(1, 64).to(dtype),
    )
    full = rounded.dequantize()
    normed = reference.rms_norm(x.float(), norm.float(), 1e-5)
    most = 1.5 * torch.finfo(dtype).eps
    assert error(norm_linear(x, norm, 1e-5, matrix), normed @ full.T) < most
    assert error(linear_add(x, matrix, None, residual), x.float() @ full.T + residual) < most


def test_parts_of_several_forms() -> None:
    """As queries, keys and values of a GGUF file are, in a layer whose values have more bits."""
    k = 256
    kinds = (quantize(torch.randn(96, k), 4), codes("int8 in groups of 16", 40, k))
    matrices = packed(*kinds)
    assert len(matrices.parts) == 2
    full = torch.cat([rounded.dequantize() for rounded in kinds])
    x, norm, bias, residual = (
        torch.randn(1, k),
        torch.randn(k),
        torch.randn(136),
        torch.randn(1, 136),
    )
    normed = reference.rms_norm(x, norm, 1e-5)
    found = OPS.norm_linear(x, norm, 1e-5, matrices, bias)
    assert error(found, normed @ full.T + bias) < 1e-3
    assert error(OPS.norm_linear(x, norm, 1e-5, matrices), normed @ full.T) < 1e-3
    gated = reference.silu_mul(normed @ full.T)
    assert error(OPS.norm_gated(x, norm, 1e-5, matrices), gated) < 1e-3
    added = OPS.linear_add(x, matrices, bias, residual)
    assert error(added, x @ full.T + bias + residual) < 1e-3


def test_codes_that_are_not_read_by_row() -> None:
    matrices = CudaQuantized(KernelChoices()).pack(
        [quantize(torch.randn(64, 128), 4).regrouped(16)], False
    )
    assert matrices is not None
    assert not matrices.takes_row


def test_more_than_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="takes one row of 64"):
        norm_linear(torch.randn(2, 64), torch.ones(64), 1e-5, torch.randn(8, 64))
