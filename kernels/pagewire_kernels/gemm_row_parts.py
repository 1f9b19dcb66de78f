"""The products of gemm_row.py with quantized matrices that lie side by side and read the same input:
a launch for each, since they differ in form. Such are the projections of queries, keys and values
in files whose types are chosen matrix by matrix, as GGUF's.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import gemm_row
from .activation import silu_mul
from .packed_matrix import PackedMatrix

Parts = Sequence[PackedMatrix]
"""In order; gemm_row.takes each of them."""


def _pieces(parts: Parts, values: Tensor | None, dim: int) -> Iterator[Tensor | None]:
    """What of `values` belongs to the rows of each part."""
    first = 0
    for matrix in parts:
        yield None if values is None else values.narrow(dim, first, matrix.shape[0])
        first += matrix.shape[0]


def _result(x: Tensor, parts: Parts) -> Tensor:
    rows = sum(matrix.shape[0] for matrix in parts)
    return torch.empty(1, rows, dtype=x.dtype, device=x.device)


def norm_linear(
    x: Tensor, norm: Tensor, eps: float, parts: Parts, bias: Tensor | None = None
) -> Tensor:
    """See gemm_row.norm_linear."""
    whole = _result(x, parts)
    pieces = zip(parts, _pieces(parts, bias, 0), _pieces(parts, whole, 1), strict=True)
    for matrix, piece, out in pieces:
        gemm_row.norm_linear(x, norm, eps, matrix, piece, out=out)
    return whole


def norm_gated(x: Tensor, norm: Tensor, eps: float, parts: Parts) -> Tensor:
    """See gemm_row.norm_gated."""
    if len(parts) == 1:
        return gemm_row.norm_gated(x, norm, eps, parts[0])
    return silu_mul(norm_linear(x, norm, eps, parts))


def linear_add(x: Tensor, parts: Parts, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """See gemm_row.linear_add."""
    whole = _result(x, parts)
    pieces = zip(
        parts,
        _pieces(parts, bias, 0),
        _pieces(parts, residual, 1),
        _pieces(parts, whole, 1),
        strict=True,
    )
    for matrix, piece, added, out in pieces:
        gemm_row.linear_add(x, matrix, piece, added, out=out)
    return whole
