"""Products of one row with codes of 4 bits: in Triton's own words, and by the instructions of a GPU,
which NumPy computes here (ptx_numpy.py)."""

from typing import Any

import pytest
import torch
from ops.ptx_numpy import inline_asm
from ops.triton_cases import error
from pagewire_kernels import gemm_row_int4, reference
from pagewire_kernels.cuda_quantized import CudaQuantized
from pagewire_kernels.gemm_row import linear_add, norm_gated, norm_linear
from pagewire_kernels.gemm_row_int4 import Int4RowConfig
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.packed_matrix import PackedMatrix
from pagewire_kernels.quantized import quantize
from torch import Tensor
from triton.runtime import interpreter

CASES = {
    "groups of 128": (128, 512, 128, True),
    "groups of 64, an odd number of chunks": (128, 576, 64, True),
    "groups of 32, zeros that are no whole numbers": (128, 192, 32, False),
    "groups of 32, whole zeros": (256, 256, 32, True),
    "rows that fill no strip": (150, 256, 128, False),
    "three strips": (192, 320, 64, False),
}
CONFIGS = (
    None,
    Int4RowConfig(strips=1, chunks=2, splits=1),
    Int4RowConfig(strips=2, chunks=2, splits=3, early=True),
    Int4RowConfig(strips=2, chunks=1, splits=2),
)


def packed(n: int, k: int, group: int, whole: bool) -> tuple[PackedMatrix, Tensor]:
    """A matrix, and what its codes stand for, float32."""
    rounded = quantize(torch.randn(n, k), 4, group, whole_zeros=whole)
    matrices = CudaQuantized(KernelChoices()).pack([rounded], False)
    assert matrices is not None
    assert matrices.takes_row
    matrix = matrices.parts[0]
    return matrix, matrices.dense(torch.float32).clone()


def worst(matrix: PackedMatrix, full: Tensor, dtype: torch.dtype, config: Any) -> float:
    """The largest error of all three products."""
    n, k = full.shape
    x, norm, bias, residual = (
        torch.randn(1, k).to(dtype),
        torch.randn(k).to(dtype),
        torch.randn(n).to(dtype),
        torch.randn(1, n).to(dtype),
    )
    sums = reference.rms_norm(x.float(), norm.float(), 1e-5) @ full.T
    gated = reference.silu_mul(sums)
    added = x.float() @ full.T + bias.float() + residual.float()
    return max(
        error(norm_linear(x, norm, 1e-5, matrix, bias, config), sums + bias.float()),
        error(norm_gated(x, norm, 1e-5, matrix, config), gated),
        error(linear_add(x, matrix, bias, residual, config), added),
    )


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_in_float32(case: str, config: Int4RowConfig | None) -> None:
    torch.manual_seed(1)
    matrix, full = packed(*CASES[case])
    assert worst(matrix, full, torch.float32, config) < 1e-5


@pytest.mark.parametrize("config", CONFIGS[:3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_by_instructions(
    dtype: torch.dtype, case: str, config: Int4RowConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", inline_asm)
    monkeypatch.setattr(gemm_row_int4, "has_instructions", lambda device: True)
    matrix, full = packed(*CASES[case])
    # results are rounded, and x times the norm's weights
    assert worst(matrix, full, dtype, config) < 1.5 * torch.finfo(dtype).eps


def test_threads_in_another_order_give_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is spread otherwise than products need it must not be taken for results."""

    def turned(builder: Any, ptx: str, constraints: str, values: list[Any], *others: Any) -> Any:
        if "%laneid" in ptx:
            ptx = ptx.replace("setp.ne.u32 p, t0", "setp.ne.u32 p, 5")
        return inline_asm(builder, ptx, constraints, values, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", turned)
    monkeypatch.setattr(gemm_row_int4, "has_instructions", lambda device: True)
    matrix, full = packed(128, 256, 128, True)
    x = torch.randn(1, 256).bfloat16()
    assert linear_add(x, matrix, None, torch.zeros(1, 128).bfloat16()).isnan().all()
    assert not (x.float() @ full.T).isnan().any()
