"""RMSNorm and LayerNorm, alone and fused with the residual addition before them and, RMSNorm, with
the rounding to float8 after them: one read and one write of each row.

Arithmetic is float32. The sum with the residual is rounded to the residual's dtype before it is
normalised, and the result to its dtype before it is rounded to float8, as the plain layers do.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .float8_rows import empty_rows, store_rounded
from .quantized_rows import QuantizedRows
from .workspace import overlap


@triton.jit
def normalized(value, w, i, inside, bias, eps, H: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """value, a row in float32 that is 0 where it is not `inside`, normed and times w; float32."""
    if CENTRE:
        value = tl.where(inside, value - tl.sum(value, 0) / H, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 0) / H + eps)
    result = value * scale * w
    if BIAS:
        result += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    return result


@triton.jit(do_not_specialize=["scale_stride"])
def _norm(x, residual, weight, bias, out, codes, scales, eps, x_stride, scale_stride, H: tl.constexpr, BLOCK: tl.constexpr,
          ADD: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr, FULL: tl.constexpr, ROUND: tl.constexpr,
          GROUP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """FULL: the result is stored in x's type; ROUND: its codes are, GROUP as in store_rounded."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < H
    value = tl.load(x + row * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * H + i, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row * H + i, rounded, mask=inside)
        value = rounded.to(tl.float32)
    result = normalized(value, w, i, inside, bias, eps, H, CENTRE, BIAS)
    result = result.to(x.dtype.element_ty)
    if FULL:
        tl.store(out + row * H + i, result, mask=inside)
    if ROUND:
        store_rounded(result.to(tl.float32), codes, scales, row, 0, H, scale_stride, BLOCK, GROUP)


def warps(block: int) -> int:
    """For rows of up to `block` inputs."""
    return max(1, min(16, block // 512))


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    centre: bool = False,
    bias: torch.Tensor | None = None,
    rounded: QuantizedRows | None = None,
    out: torch.Tensor | None = None,
) -> None:
    """Fills `out` and `rounded`, whichever are given."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    codes = scales = None
    if rounded is not None:
        codes, scales = rounded.codes, rounded.scales
    if rows:
        _norm[(rows,)](
            x,
            residual,
            weight,
            bias,
            out,
            codes,
            scales,
            eps,
            x.stride(0),
            1 if scales is None else scales.stride(1),
            H=width,
            BLOCK=block,
            ADD=residual is not None,
            CENTRE=centre,
            BIAS=bias is not None,
            FULL=out is not None,
            ROUND=rounded is not None,
            GROUP=0 if rounded is None else rounded.group,
            num_warps=warps(block),
            **overlap(x.device),
        )


def _normed(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    centre: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, residual, weight, eps, centre, bias, out=out)
    return out


def _quantized(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    group: int,
    keep: bool,
) -> QuantizedRows:
    full = torch.empty_like(x, memory_format=torch.contiguous_format) if keep else None
    rounded = empty_rows(*x.shape, group, x.dtype, x.device)
    _launch(x, residual, weight, eps, rounded=rounded, out=full)
    return replace(rounded, full=full)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] / rms(x) * weight [H], in x's dtype."""
    return _normed(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [T, H]. The sum is written into `residual`,
    which must be contiguous."""
    return _normed(x, residual, weight, eps), residual


def rms_norm_quantized(
    x: torch.Tensor, weight: torch.Tensor, eps: float, group: int, keep: bool
) -> QuantizedRows:
    """quantize_rows(rms_norm(x, weight, eps), group), bit for bit; x [T, H]. keep: with what was
    rounded."""
    return _quantized(x, None, weight, eps, group, keep)


def add_rms_norm_quantized(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: int,
    keep: bool,
) -> tuple[QuantizedRows, torch.Tensor]:
    """add_rms_norm with the first result rounded as in rms_norm_quantized."""
    return _quantized(x, residual, weight, eps, group, keep), residual


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """x [T, H] less its mean, over its standard deviation, times weight [H], plus bias [H], in x's
    dtype."""
    return _normed(x, None, weight, eps, True, bias)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(x + residual), x + residual), both [T, H]. The sum is written into `residual`,
    which must be contiguous."""
    return _normed(x, residual, weight, eps, True, bias), residual
