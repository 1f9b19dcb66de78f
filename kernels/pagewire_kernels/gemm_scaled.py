"""x @ weight^T in float8: rows of x are rounded to float8_e4m3fn (float8_rows.py), with a scale each
or for each group of 128 inputs, and multiplied by cuBLAS's or CUTLASS's products with scaled rows or
blocks. For matrices that were made for that, and for as many rows as make a product bound by
arithmetic: rounding costs a pass over x where nothing before it has done it.
"""

# pyright: reportPrivateImportUsage=false

import functools
import logging
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from .gpu_quantized_size import BLOCK
from .packed_matrix import PackedMatrix
from .quantized_decode import FP8
from .quantized_rows import ROW, QuantizedRows

log = logging.getLogger("pagewire.kernels")
LEAST_ROWS: Final = 65
"""Rows of x from which these products are faster; measured on an H100 (docs/performance.md)."""
LEAST_ROWS_OF_BLOCKS: Final = 65
"""The same where weights have a scale for each block; not measured yet."""
LEAST_CAPABILITY: Final = (9, 0)
"""Of a GPU for which torch has products with scaled rows."""
MULTIPLE: Final = 16
"""Of rows of a weight."""
BLOCKS_MULTIPLE: Final = 4
"""Of blocks of inputs: scales of a row of blocks begin at multiples of 16 bytes, and versions of
torch differ in how others are to be filled up."""
MOST_TRIAL_ERROR: Final = 0.02
"""Of a product with results in bfloat16."""
HOPPER: Final = 9
"""The compute capability, before the point, of GPUs for which torch has products with blocks."""


def group_of(
    matrix: PackedMatrix, rows: int, dtype: torch.dtype, device: torch.device
) -> int | None:
    """How `rows` rows of type `dtype` are rounded for the product with this matrix: inputs that
    share a scale, or ROW; None where it is not to be taken here."""
    if matrix.form != FP8 or not matrix.quantize_inputs or dtype == torch.float32:
        return None
    if matrix.row_scale is not None:
        return ROW if rows >= LEAST_ROWS and _has_products(device) else None
    if matrix.block_scale is not None:
        return BLOCK if rows >= LEAST_ROWS_OF_BLOCKS else None
    return None


@functools.cache
def _has_products(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
        and torch.version.hip is None
    )


def block_scales(scale: Tensor) -> Tensor | None:
    """scale [N, K / BLOCK], of the groups of a matrix's rows -> [blocks of rows, K / BLOCK]; None
    where rows of a block differ, or torch does not take so many blocks of inputs."""
    rows, groups = scale.shape
    if groups % BLOCKS_MULTIPLE:
        return None
    # a copy even of one row: torch reads its strides
    by_block = scale[::BLOCK].clone(memory_format=torch.contiguous_format)
    same = torch.equal(by_block.repeat_interleave(BLOCK, 0)[:rows], scale)
    return by_block if same else None


@functools.cache
def has_block_products(device: torch.device) -> bool:
    """Whether torch multiplies blocks on this device, found by doing it once; a line says so where
    it refuses, or reads scales in another order. Not while a graph is captured."""
    if not _has_products(device) or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return False
    try:
        error = _trial_error(device)
        fault = f"its result is off by {error:.1%}" if error > MOST_TRIAL_ERROR else ""
    except (RuntimeError, ValueError) as refusal:
        fault = str(refusal).partition("\n")[0]
    if fault:
        log.warning(
            "float8 weights in blocks of %d x %d are multiplied in 16 bits: torch %s has no product in float8 for them here (%s)",
            BLOCK,
            BLOCK,
            torch.__version__,
            fault,
        )
    return not fault


def _trial_error(device: torch.device) -> float:
    """Of a small product of blocks, relative, against float32; no two scales are alike."""
    rows, weight_rows, columns = 68, 2 * BLOCK, 2 * BLOCKS_MULTIPLE * BLOCK
    groups = columns // BLOCK

    def pattern(count: int, modulus: int) -> Tensor:
        numbers = torch.arange(count * columns, device=device) % modulus
        return (numbers - modulus // 2).float().to(torch.float8_e4m3fn).view(count, columns)

    codes, weight = pattern(rows, 13), pattern(weight_rows, 11)
    scales = (1 + torch.arange(rows * groups, device=device) / 64).view(groups, rows).t()
    block_scale = (1 + torch.arange(2 * groups, device=device) / 2).view(2, groups)
    out = _by_blocks(codes, scales, weight, block_scale).float()
    by_row = block_scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    exact = (codes.float() * scales.repeat_interleave(BLOCK, 1)) @ (weight.float() * by_row).T
    return float((out - exact).norm() / exact.norm())


def _by_blocks(codes: Tensor, scales: Tensor, weight: Tensor, block_scale: Tensor) -> Tensor:
    """codes [M, K] with scales [M, K / BLOCK] by group, M a multiple of 4; weight [N, K], N a
    multiple of BLOCK, with block_scale [N / BLOCK, K / BLOCK] -> [M, N] bfloat16. Sums of a block
    are added in float32."""
    return scaled_mm(
        codes,
        weight.t(),
        scales,
        ScalingType.BlockWise1x128,
        block_scale.t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def _by_rows(codes: Tensor, scales: Tensor, weight: Tensor, row_scale: Tensor) -> Tensor:
    """codes [M, K] with scales [M, 1], weight [N, K] with row_scale [N] -> [M, N] bfloat16."""
    return torch._scaled_mm(
        codes,
        weight.t(),
        scales,
        row_scale[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _exact(x: QuantizedRows, weight: Tensor, matrix: PackedMatrix) -> Tensor:
    """On a CPU, for tests: everything is float32."""
    _, k = matrix.shape
    by_group = x.codes.float().view(len(x.codes), x.scales.shape[1], -1) * x.scales[:, :, None]
    if matrix.row_scale is not None:
        scale = matrix.row_scale[: len(weight), None]
    else:
        assert matrix.block_scale is not None
        by_row = matrix.block_scale.repeat_interleave(BLOCK, 0)[: len(weight)]
        scale = by_row.repeat_interleave(BLOCK, 1)
    return by_group.view(-1, k) @ (weight.float() * scale).T


def scaled_linear(x: QuantizedRows, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """x [M, K], rounded as `group_of` says, times the transpose of matrix [N, K], plus bias [N] ->
    [M, N] in x's type; sums are float32, rounded to bfloat16."""
    n, _ = matrix.shape
    weight = matrix.words.view(torch.float8_e4m3fn)
    # rows that fill up the matrix are left out but in blocks, which torch wants whole
    if n % MULTIPLE == 0 and matrix.row_scale is not None:
        weight = weight[:n]
    if x.codes.device.type == "cpu":
        whole = _exact(x, weight, matrix)
    elif matrix.row_scale is not None:
        whole = _by_rows(x.codes, x.scales, weight, matrix.row_scale[: len(weight)])
    else:
        assert matrix.block_scale is not None
        whole = _by_blocks(x.codes, x.scales, weight, matrix.block_scale)
    out = whole[: len(x), :n].to(x.dtype)
    return out if bias is None else out + bias
