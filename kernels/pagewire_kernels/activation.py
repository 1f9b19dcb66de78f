"""act(gate) * up over the joined output of the gate and up projections, act being SiLU or GELU, on
request rounded to float8; plain ones are torch's own kernels."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .float8_rows import GROUPS_BLOCK, WIDEST, empty_rows, quantize_rows, store_rounded
from .quantized_rows import ROW, QuantizedRows
from .workspace import overlap


@triton.jit
def _gelu_tanh(x):
    """x * (1 + tanh(y)) / 2 is x * sigmoid(2 y); the exponent is never positive, so nothing
    overflows."""
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    e = tl.exp(-tl.abs(z))
    return x * tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit(do_not_specialize=["scale_stride"])
def _gated(gate_up, out, codes, scales, WIDTH, in_stride, scale_stride, BLOCK: tl.constexpr, GELU: tl.constexpr,
           ROUND: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """ROUND: codes are stored instead of the result, GROUP as in store_rounded."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    i = first + tl.arange(0, BLOCK)
    inside = i < WIDTH
    gate = tl.load(gate_up + row * in_stride + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    activated = _gelu_tanh(gate) if GELU else gate / (1.0 + tl.exp(-gate))
    result = (activated * up).to(gate_up.dtype.element_ty)
    if ROUND:
        value = result.to(tl.float32)
        store_rounded(value, codes, scales, row, first, WIDTH, scale_stride, BLOCK, GROUP)
    else:
        tl.store(out + row * WIDTH + i, result, mask=inside)


def _launch(
    gate_up: torch.Tensor,
    gelu: bool,
    block: int,
    warps: int,
    out: torch.Tensor | None = None,
    rounded: QuantizedRows | None = None,
) -> None:
    """Fills `out` or `rounded`."""
    rows = gate_up.shape[0]
    width = gate_up.shape[1] // 2
    codes = scales = None
    if rounded is not None:
        codes, scales = rounded.codes, rounded.scales
    if rows:
        _gated[(rows, triton.cdiv(width, block))](
            gate_up,
            out,
            codes,
            scales,
            width,
            gate_up.stride(0),
            1 if scales is None else scales.stride(1),
            BLOCK=block,
            GELU=gelu,
            ROUND=rounded is not None,
            GROUP=0 if rounded is None else rounded.group,
            num_warps=warps,
            **overlap(gate_up.device),
        )


def _full(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    rows = gate_up.shape[0]
    out = torch.empty(rows, gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    _launch(gate_up, gelu, 1024 if rows < 64 else 2048, 4, out=out)
    return out


def _quantized(gate_up: torch.Tensor, gelu: bool, group: int) -> QuantizedRows:
    width = gate_up.shape[1] // 2
    if group == ROW and width > WIDEST:
        return quantize_rows(_full(gate_up, gelu), group)
    rounded = empty_rows(len(gate_up), width, group, gate_up.dtype, gate_up.device)
    block = triton.next_power_of_2(width)
    if group != ROW:
        block = min(block, GROUPS_BLOCK)
    # 16 inputs a thread: with 32, registers leave half of a multiprocessor's threads idle
    _launch(gate_up, gelu, block, max(1, block // 512), rounded=rounded)
    return rounded


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I] -> [T, I]: silu of the first half times the second, computed in float32."""
    return _full(gate_up, False)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I] -> [T, I]: GELU (by hyperbolic tangent) of the first half times the second, computed
    in float32."""
    return _full(gate_up, True)


def silu_mul_quantized(gate_up: torch.Tensor, group: int) -> QuantizedRows:
    """quantize_rows(silu_mul(gate_up), group), bit for bit."""
    return _quantized(gate_up, False, group)


def gelu_mul_quantized(gate_up: torch.Tensor, group: int) -> QuantizedRows:
    """quantize_rows(gelu_mul(gate_up), group), bit for bit."""
    return _quantized(gate_up, True, group)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x)
