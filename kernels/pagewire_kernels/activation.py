"""SiLU(gate) * up over the joined output of the gate and up projections."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .workspace import overlap


@triton.jit
def _silu_mul(gate_up, out, WIDTH, in_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    gate = tl.load(gate_up + row * in_stride + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + i, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I] -> [T, I]: silu of the first half times the second, computed in float32."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = 1024 if rows < 64 else 2048
    if rows:
        _silu_mul[(rows, triton.cdiv(width, block))](
            gate_up, out, width, gate_up.stride(0), BLOCK=block, num_warps=4, **overlap(gate_up.device)
        )
    return out
