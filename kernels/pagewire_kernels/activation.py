"""act(gate) * up over the joined output of the gate and up projections, act being SiLU or GELU;
plain ones are torch's own kernels."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .workspace import overlap


@triton.jit
def _gelu_tanh(x):
    """x * (1 + tanh(y)) / 2 is x * sigmoid(2 y); the exponent is never positive, so nothing
    overflows."""
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    e = tl.exp(-tl.abs(z))
    return x * tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _gated(
    gate_up, out, WIDTH, in_stride, BLOCK: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    gate = tl.load(gate_up + row * in_stride + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    activated = _gelu_tanh(gate) if GELU else gate / (1.0 + tl.exp(-gate))
    tl.store(out + row * WIDTH + i, (activated * up).to(out.dtype.element_ty), mask=inside)


def _launch(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    rows = gate_up.shape[0]
    width = gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = 1024 if rows < 64 else 2048
    if rows:
        _gated[(rows, triton.cdiv(width, block))](
            gate_up,
            out,
            width,
            gate_up.stride(0),
            BLOCK=block,
            GELU=gelu,
            num_warps=4,
            **overlap(gate_up.device),
        )
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I] -> [T, I]: silu of the first half times the second, computed in float32."""
    return _launch(gate_up, False)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I] -> [T, I]: GELU (by hyperbolic tangent) of the first half times the second, computed
    in float32."""
    return _launch(gate_up, True)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x)
