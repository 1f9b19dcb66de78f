"""x @ weight^T in float8: rows of x are rounded to float8_e4m3fn, each with a scale of its own, and
multiplied by cuBLAS's or CUTLASS's products with scaled rows. For matrices that were made for that,
and for as many rows as make a product bound by arithmetic: rounding costs a pass over x.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# pyright: reportPrivateImportUsage=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .packed_matrix import PackedMatrix
from .quantized_decode import FP8, input_at
from .workspace import overlap

LEAST_ROWS: Final = 65
"""Rows of x from which these products are faster; measured on an H100 (docs/performance.md)."""
LEAST_CAPABILITY: Final = (9, 0)
"""Of a GPU for which torch has products with scaled rows."""
LARGEST: Final = tl.constexpr(448.0)
"""Of float8_e4m3fn."""
MULTIPLE: Final = 16
"""Of rows of a weight."""


@triton.jit
def _quantize_rows(
    x, out, scales, x_stride, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < K
    value = tl.load(x + row * x_stride + input_at(place), mask=inside, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(value), 0)
    scale = tl.where(most > 0, most / LARGEST, 1.0)
    tl.store(scales + row, scale)
    rounded = tl.clamp(value / scale, -LARGEST, LARGEST)
    tl.store(out + row * K + place, rounded.to(out.dtype.element_ty), mask=inside)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K], K a multiple of 64 -> (float8_e4m3fn [M, K], float32 [M, 1]): its values over their
    row's scale, which brings the largest magnitude to float8's largest. The inputs are in the order
    of a weight's (quantized_decode.PERMUTED)."""
    rows, k = x.shape
    out = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    if rows:
        _quantize_rows[(rows,)](
            x,
            out,
            scales,
            x.stride(0),
            K=k,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
            **overlap(x.device),
        )
    return out, scales


def takes(matrix: PackedMatrix, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the product of `rows` rows of `dtype` with this matrix is to be taken here."""
    return (
        matrix.form == FP8
        and matrix.quantize_inputs
        and matrix.row_scale is not None
        and rows >= LEAST_ROWS
        and dtype != torch.float32
        and _has_products(device)
    )


@functools.cache
def _has_products(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
        and torch.version.hip is None
    )


def scaled_linear(
    x8: Tensor, scales: Tensor, matrix: PackedMatrix, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """(x8 [M, K] * scales [M, 1]) times the transpose of matrix [N, K], plus bias [N] -> [M, N] in
    `dtype`; sums are float32, rounded to bfloat16. On a CPU, for tests, everything is float32."""
    n, _ = matrix.shape
    assert matrix.row_scale is not None
    weight = matrix.words.view(torch.float8_e4m3fn)
    row_scale = matrix.row_scale
    if n % MULTIPLE == 0:
        weight = weight[:n]
        row_scale = row_scale[:n]
    if x8.device.type == "cpu":
        whole = x8.float() * scales @ (weight.float() * row_scale[:, None]).T
    else:
        whole = torch._scaled_mm(
            x8,
            weight.t(),
            scales,
            row_scale[None, :],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    out = whole[:, :n].to(dtype)
    return out if bias is None else out + bias
