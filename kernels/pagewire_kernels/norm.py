"""RMSNorm and LayerNorm, alone and fused with the residual addition before them: one read and one
write of each row.

Arithmetic is float32. The sum with the residual is rounded to the residual's dtype before it is
normalised, as the plain layers do.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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


@triton.jit
def _norm(x, residual, weight, bias, out, eps, x_stride, H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CENTRE: tl.constexpr,
          BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
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
    tl.store(out + row * H + i, result.to(out.dtype.element_ty), mask=inside)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    centre: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    if rows:
        _norm[(rows,)](
            x,
            residual,
            weight,
            bias,
            out,
            eps,
            x.stride(0),
            H=width,
            BLOCK=block,
            ADD=residual is not None,
            CENTRE=centre,
            BIAS=bias is not None,
            num_warps=max(1, min(16, block // 512)),
            **overlap(x.device),
        )
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] / rms(x) * weight [H], in x's dtype."""
    return _launch(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [T, H]. The sum is written into `residual`,
    which must be contiguous."""
    return _launch(x, residual, weight, eps), residual


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """x [T, H] less its mean, over its standard deviation, times weight [H], plus bias [H], in x's
    dtype."""
    return _launch(x, None, weight, eps, True, bias)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(x + residual), x + residual), both [T, H]. The sum is written into `residual`,
    which must be contiguous."""
    return _launch(x, residual, weight, eps, True, bias), residual
