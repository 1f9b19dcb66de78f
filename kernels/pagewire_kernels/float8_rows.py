"""Rows of activations rounded to float8_e4m3fn, each row with a scale or each group of its inputs:
by a launch of its own here, and at the end of other kernels that have a row at hand.

Whichever kernel rounds, the codes and scales are the same bits: a value is rounded to the type of
the activations first, as if it had been written and read again.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .quantized_rows import ROW, QuantizedRows
from .workspace import overlap

LARGEST: Final = tl.constexpr(448.0)
"""Of float8_e4m3fn."""
COUNTED: Final = 4
"""Rows of groups are filled up to a multiple: cuBLAS reads their scales, which lie by group, 16
bytes at a time."""
WIDEST: Final = 1 << 14
"""The widest rows that a kernel with more than one row in its registers rounds as a whole."""
GROUPS_BLOCK: Final = 2048
"""Inputs of a program where groups have scales."""


@triton.jit
def _in_order(values):
    """values [BLOCK] by input -> [BLOCK / 64, 64] by place: quantized_decode.PERMUTED."""
    # 64 inputs are (chunk 4, half 2, column 4, pair 2), their places (column, chunk, pair, half)
    spans = tl.reshape(values, [values.shape[0] // 64, 4, 2, 4, 2])
    return tl.reshape(tl.permute(spans, [0, 3, 1, 4, 2]), [values.shape[0] // 64, 64])


@triton.jit
def store_rounded(value, codes, scales, row, first, K, scale_stride, BLOCK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Rounds value [BLOCK], inputs first to first + BLOCK of a row, in float32 and 0 from input K
    on. GROUP 0: they are the whole row and share a scale. scale_stride: from a group's scales to
    the next one's.

    Codes are stored as a matrix of spans: a pointer of the shape of `value` would have a say in how
    that is spread over threads, and so in the order of a norm's sums."""
    if GROUP == 0:
        most = tl.max(tl.abs(value), 0)
        scale = tl.where(most > 0, most / LARGEST, 1.0)
        tl.store(scales + row, scale)
        rounded = tl.clamp(value / scale, -LARGEST, LARGEST)
    else:
        groups = tl.reshape(value, [BLOCK // GROUP, GROUP])
        most = tl.max(tl.abs(groups), 1)
        scale = tl.where(most > 0, most / LARGEST, 1.0)
        group = first // GROUP + tl.arange(0, BLOCK // GROUP)
        tl.store(scales + group.to(tl.int64) * scale_stride + row, scale, mask=group < K // GROUP)
        rounded = tl.clamp(groups / scale[:, None], -LARGEST, LARGEST)
        rounded = tl.reshape(rounded, [BLOCK])
    place = first + tl.arange(0, BLOCK // 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    code = _in_order(rounded.to(codes.dtype.element_ty))
    tl.store(codes + row * K + place, code, mask=place < K)


@triton.jit(do_not_specialize=["scale_stride"])
def _quantize_rows(x, codes, scales, x_stride, K, scale_stride, BLOCK: tl.constexpr, GROUP: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    i = first + tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + i, mask=i < K, other=0.0).to(tl.float32)
    store_rounded(value, codes, scales, row, first, K, scale_stride, BLOCK, GROUP)


def empty_rows(
    rows: int, k: int, group: int, dtype: torch.dtype, device: torch.device
) -> QuantizedRows:
    """Memory for `rows` rows of k inputs of type `dtype`."""
    if group == ROW:
        padded = rows
        scales = torch.empty(rows, 1, dtype=torch.float32, device=device)
    else:
        padded = -(-rows // COUNTED) * COUNTED
        scales = torch.empty(k // group, padded, dtype=torch.float32, device=device).t()
    codes = torch.empty(padded, k, dtype=torch.float8_e4m3fn, device=device)
    return QuantizedRows(codes, scales, rows, group, dtype)


def quantize_rows(x: Tensor, group: int = ROW) -> QuantizedRows:
    """x [T, K], K a multiple of 64 and of `group`: its values over their group's scale, which
    brings the largest magnitude to float8's largest."""
    rows, k = x.shape
    out = empty_rows(rows, k, group, x.dtype, x.device)
    block = triton.next_power_of_2(k)
    if group != ROW:
        block = min(block, GROUPS_BLOCK)
    if rows:
        _quantize_rows[(rows, triton.cdiv(k, block))](
            x,
            out.codes,
            out.scales,
            x.stride(0),
            k,
            out.scales.stride(1),
            BLOCK=block,
            GROUP=group,
            num_warps=max(1, min(16, block // 512)),
            **overlap(x.device),
        )
    return out
