"""What follows the sums of a product of one row: norm factor, bias, SiLU times up, residual."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# Values inside a kernel have types that only Triton's compiler knows.

import triton
import triton.language as tl


@triton.jit
def finish(result, result_up, scale, bias, residual, out, n, N, NORM: tl.constexpr, GATED: tl.constexpr,
           BIAS: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """Stores the results n below N of sums in float32. result_up: read where GATED. scale: the norm's
    factor, read where NORM."""
    if NORM:
        result = result * scale
        result_up = result_up * scale
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * result_up
    if ADD:
        result += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < N)
