"""weight @ x for one row x, with what surrounds it in a decode step of one request: RMSNorm before;
SiLU * up or the residual after.

A launch costs a small model as much as its work, so a layer of one row has five kernels instead of
nine. The norm's factor is a number for the whole row: it multiplies the sums at the end, and each
program adds up the squares beside its products. Arithmetic is float32. Weights may be codes of 8
bits with a scale a row, which multiplies the sums as well; those with more scales go to
gemm_row_codes.py, those of 4 bits to gemm_row_int4.py.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import gemm_row_codes, gemm_row_int4
from .activation import silu_mul
from .gemm_row_codes import CodesRowConfig
from .gemm_row_int4 import Int4RowConfig
from .packed_matrix import PackedMatrix
from .quantized_decode import EIGHT_BITS, FP8, INT4, TILE, input_at
from .row_epilogue import finish
from .workspace import overlap


@dataclass(frozen=True)
class RowConfig:
    """Launch shape. block_n: results a program; block_k: inner elements a step. early: the next
    kernel's programs are let in at once."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    early: bool = False


LEAST_FLOAT8_CAPABILITY: Final = (8, 9)
Weight = torch.Tensor | PackedMatrix
"""[N, K]: in full, or one that `takes` takes."""
Config = RowConfig | CodesRowConfig | Int4RowConfig
"""For full weights and codes with a scale a row, for other codes of 8 bits, and for those of 4."""


@triton.jit
def _weights(weight, n, k, N, K: tl.constexpr, EVEN: tl.constexpr):
    pointers = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _values(w, FORM: tl.constexpr):
    """Of weights as they are loaded: float32."""
    if FORM == "byte":
        return w.to(tl.float32) - 128.0
    else:
        return w.to(tl.float32)


@triton.jit
def _vector(x, k, K: tl.constexpr, EVEN: tl.constexpr, FORM: tl.constexpr):
    """The inputs whose weights lie at k."""
    columns = k
    if FORM != "":
        columns = input_at(k)
    if EVEN:
        return tl.load(x + columns).to(tl.float32)
    return tl.load(x + columns, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _row(x, norm, weight, row_scale, bias, residual, out, N, eps, factor, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
        FORM: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr,
        STAGES: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The first weights, which no other kernel writes, are asked for before the wait for x. FORM
    empty: weights are no codes."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    w = _values(_weights(weight, n, k, N, K, EVEN), FORM)
    up = w
    if GATED:
        up = _values(_weights(weight + N.to(tl.int64) * K, n, k, N, K, EVEN), FORM)
    gain = k.to(tl.float32)
    if NORM:
        gain = _vector(norm, k, K, EVEN, FORM)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    h = _vector(x, k, K, EVEN, FORM)
    squares = h * h
    if NORM:
        h = h * gain
    acc = w * h[None, :]
    acc_up = up * h[None, :]
    for start in tl.range(BK, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        h = _vector(x, k, K, EVEN, FORM)
        if NORM:
            squares += h * h
            h = h * _vector(norm, k, K, EVEN, FORM)
        acc += _values(_weights(weight, n, k, N, K, EVEN), FORM) * h[None, :]
        if GATED:
            codes = _weights(weight + N.to(tl.int64) * K, n, k, N, K, EVEN)
            acc_up += _values(codes, FORM) * h[None, :]
    if PDL and not EARLY:
        gdc_launch_dependents()
    result = tl.sum(acc, 1)
    result_up = result
    if GATED:
        result_up = tl.sum(acc_up, 1)
    if FORM != "":
        result *= tl.load(row_scale + n, mask=n < N, other=0.0) * factor
        if GATED:
            result_up *= tl.load(row_scale + N + n, mask=n < N, other=0.0) * factor
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    finish(result, result_up, scale, bias, residual, out, n, N, NORM, GATED, BIAS, ADD)


def pick_config(n: int, k: int, gated: bool) -> RowConfig:
    """The launch shape for n results of inner size k; measured on an H200 (docs/performance.md)."""
    if k > 8192:
        return RowConfig(8, 512, 2, 3)
    if gated:
        return RowConfig(2, 512, 1, 3, early=True) if k <= 2048 else RowConfig(4, 1024, 4, 3)
    if k <= 1024:
        return RowConfig(4, 1024, 1, 3, early=True)
    if k <= 3072:
        if n > 4096:
            return RowConfig(4, 512, 2, 3)
        if n <= 2048 and k <= 2048:
            return RowConfig(2, 2048, 4, 1, early=True)
        return RowConfig(2, 1024, 4, 3, early=True)
    if n <= 2048:
        return RowConfig(2, 1024, 4, 1, early=True)
    return RowConfig(2, 1024, 1, 3, early=True) if n <= 4096 else RowConfig(8, 512, 2, 3)


def pick_config_of_codes(n: int, k: int, gated: bool) -> RowConfig:
    """pick_config for codes of 8 bits; measured on an H100 (docs/performance.md)."""
    if gated:
        return RowConfig(8, 512, 2, 3)
    if n > 4096:
        return RowConfig(4, 512, 1, 3, early=True)
    return RowConfig(4, 1024, 1, 3, early=True)


def takes(matrix: PackedMatrix) -> bool:
    """Whether a quantized matrix can be the weight of these products."""
    if matrix.form == INT4:
        return gemm_row_int4.takes(matrix)
    if matrix.form not in EIGHT_BITS or matrix.group not in (0, *gemm_row_codes.GROUPS):
        return False
    return matrix.form != FP8 or _reads_float8(matrix.words.device)


@functools.cache
def _reads_float8(device: torch.device) -> bool:
    """Whether Triton knows float8 there."""
    return (
        device.type != "cuda" or torch.cuda.get_device_capability(device) >= LEAST_FLOAT8_CAPABILITY
    )


def _launch(x: torch.Tensor, weight: Weight, gated: bool, norm: torch.Tensor | None, eps: float, bias: torch.Tensor | None,
            residual: torch.Tensor | None, config: Config | None, out: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    rows, k = weight.shape
    n = rows // 2 if gated else rows
    if x.shape != (1, k):
        raise ValueError(f"x is {list(x.shape)}, and this product takes one row of {k}")
    if out is None:
        out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    if isinstance(weight, PackedMatrix) and weight.form == INT4:
        assert config is None or isinstance(config, Int4RowConfig)
        gemm_row_int4.launch(x, weight, gated, norm, eps, bias, residual, out, config)
        return out
    if isinstance(weight, PackedMatrix) and weight.group:
        assert config is None or isinstance(config, CodesRowConfig)
        gemm_row_codes.launch(x, weight, gated, norm, eps, bias, residual, out, config)
        return out
    assert config is None or isinstance(config, RowConfig)
    values = weight
    row_scale = None
    form = ""
    factor = 1.0
    if isinstance(weight, PackedMatrix):
        kind = torch.float8_e4m3fn if weight.form == FP8 else torch.uint8
        values = weight.words.view(kind)
        row_scale = weight.row_scale
        form = weight.form
        factor = weight.factor
    c = config or (pick_config_of_codes(n, k, gated) if form else pick_config(n, k, gated))
    _row[(triton.cdiv(n, c.block_n),)](
        x, norm, values, row_scale, bias, residual, out, n, eps, factor, K=k, BN=c.block_n, BK=c.block_k, FORM=form,
        NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=residual is not None,
        EVEN=k % c.block_k == 0 and n % c.block_n == 0, STAGES=c.stages, EARLY=c.early, num_warps=c.warps,
        **overlap(x.device))  # fmt: skip
    return out


def norm_linear(
    x: torch.Tensor, norm: torch.Tensor, eps: float, weight: Weight, bias: torch.Tensor | None = None,
    config: Config | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """weight [N, K] @ rms_norm(x) + bias -> [1, N], into `out` where it is given; x [1, K], norm
    [K]."""
    return _launch(x, weight, False, norm, eps, bias, None, config, out)


def norm_gated(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: Weight,
    config: Config | None = None,
) -> torch.Tensor:
    """silu_mul(weight [2I, K] @ rms_norm(x)) -> [1, I]; x [1, K], norm [K]."""
    four_bits = isinstance(weight, PackedMatrix) and weight.form == INT4
    if four_bits and weight.shape[0] % (2 * TILE):
        # up begins inside a strip of rows
        return silu_mul(_launch(x, weight, False, norm, eps, None, None, config))
    return _launch(x, weight, True, norm, eps, None, None, config)


def linear_add(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    config: Config | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight [N, K] @ x + bias + residual -> [1, N], into `out` where it is given; x [1, K],
    residual [1, N]."""
    return _launch(x, weight, False, None, 0.0, bias, residual, config, out)
