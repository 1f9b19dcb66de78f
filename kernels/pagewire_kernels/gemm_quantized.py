"""x @ weight^T with weights of 4 or 8 bits, which are decoded in registers on their way to the
tensor cores. Arithmetic: codes less their zero point are exact in x's type; times their scale they
are rounded to it once, as a weight that is stored in that type is; sums are float32.

As in gemm.py, weight rows fill the M side of a tile and the rows of x the other side, and the inner
dimension may be cut into splits, which the last one adds in a fixed order.

Tables of 16 values, whose scales are float32, are rounded to x's type and sums scaled where a group
is a step; where groups are smaller, values that 16 bits hold exactly are scaled one by one.

Codes are kept so that a thread reads what it hands to the tensor cores, 16 bytes at a time, and
nothing moves between threads: of 64 rows and 64 inputs in 4 bits, of a row and 64 inputs in 8 bits.
"""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .packed_matrix import PackedMatrix
from .quantized_decode import DECODERS, TILE, by_thread, decode, offsets, words_a_step
from .quantized_shapes import QuantizedConfig, block_k_of, choose, pick_config
from .table_lookup import table_of, tables_of, unit_of
from .workspace import counters, overlap

MOST_FUSED_ROWS: Final = 512
"""Rows of x above which the matrix is dequantized first; measured on an H100
(docs/performance.md)."""


@triton.jit
def _scale_of(pair, TABLE: tl.constexpr):
    """The scale of a pair of float16, int32 -> float32. TABLE: it is the bits of a float32."""
    if TABLE:
        return pair.to(tl.float32, bitcast=True)
    else:
        return (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _zero_of(pair):
    """The zero point above it."""
    return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scaled(
    c,
    scales,
    n,
    step,
    NP,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    REST: tl.constexpr,
    TABLE: tl.constexpr,
):
    """c [BN, BK], the values of decode, less OFFSET and their group's zero point, times its scale.
    The scale has more digits than bfloat16, and with a table than float16: what that type leaves of
    it is multiplied by itself."""
    DT: tl.constexpr = c.dtype
    GROUPS: tl.constexpr = BK // GROUP if GROUP < BK else 1
    first = step * BK // GROUP
    if GROUPS == 1:
        pair = tl.load(scales + first * NP + n)[:, None]
    else:
        pair = tl.load(scales + (first + tl.arange(0, GROUPS))[None, :] * NP + n[:, None])
        pair = tl.reshape(tl.broadcast_to(pair[:, :, None], [BN, GROUPS, GROUP]), [BN, BK])
    scale = _scale_of(pair, TABLE)
    high = scale.to(DT)
    low = (scale - high.to(tl.float32)).to(DT)
    zero = scale
    if not TABLE:
        zero = _zero_of(pair)
    if REST:
        whole = tl.minimum(tl.maximum(tl.floor(zero + 0.5), -120.0), 120.0)
        rest = tl.broadcast_to(((whole - zero) * scale).to(DT), c.shape)
        c = c - (whole + OFFSET).to(DT)
        if tl.bfloat16 == DT:
            rest = tl.fma(c, tl.broadcast_to(low, c.shape), rest)
        return tl.fma(c, tl.broadcast_to(high, c.shape), rest)
    if not TABLE:
        c = c - (zero + OFFSET).to(DT)
    if tl.bfloat16 == DT or (TABLE and tl.float16 == DT):
        return tl.fma(c, tl.broadcast_to(high, c.shape), c * low)
    return c * high


@triton.jit
def _settled(acc, ASM: tl.constexpr):
    """`acc` itself, in an instruction that no compiler looks into and that costs nothing."""
    if ASM == "":
        return acc
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def add_product(acc, w, rows, tables, scales, n, step, NP, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr,
                REST: tl.constexpr, LATE: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """acc [BN, BM] plus the product of one step: its words w, as `offsets` lays them out, and rows
    [BK, BM] of x. A scale a row and the matrix's factor are left to do. tables: see
    decode.

    Steps must not overlap: the codes of one would be decoded into registers that the product before
    still reads. So each sum is used at once, by an addition or by `_settled`."""
    OFFSET: tl.constexpr = (
        0.0 if ASM == "" or FORM != "int4" else (128.0 if tl.bfloat16 == DT else 1024.0)
    )
    TABLE: tl.constexpr = FORM != "int4" and FORM != "byte" and FORM != "fp8"
    c = decode(by_thread(w, FORM), tables, n, BN, BK, FORM, DT, ASM)
    if LATE:
        pair = tl.load(scales + step * BK // GROUP * NP + n)
        if not TABLE:
            c = c - (_zero_of(pair) + OFFSET).to(DT)[:, None]
        return acc + tl.dot(c, rows, input_precision="ieee") * _scale_of(pair, TABLE)[:, None]
    else:
        if GROUP > 0:
            c = _scaled(c, scales, n, step, NP, BN, BK, GROUP, OFFSET, REST, TABLE)
        return _settled(tl.dot(c, rows, acc, input_precision="ieee"), ASM)


@triton.jit
def _quantized(x, words, table, scales, row_scale, bias, out, part, arrived, x_stride, out_stride, M, N, NP, factor, span, K,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr, REST: tl.constexpr,
        LATE: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
        PDL: tl.constexpr):  # fmt: skip
    """Steps split * span to (split + 1) * span of BK inputs each. GROUP 0: one scale a row.
    LATE: sums of a step, or of each group of it, are scaled instead of its weights."""
    DT: tl.constexpr = tl.float32 if ASM == "" else x.dtype.element_ty
    TABLE: tl.constexpr = FORM != "int4" and FORM != "byte" and FORM != "fp8"
    PART: tl.constexpr = GROUP if LATE and GROUP < BK else BK
    tile = tl.program_id(1)
    split = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    pointers = words + offsets(tile, K, BN, PART, FORM)
    tables = table
    if TABLE:
        tables = tables_of(table, tile, BN, FORM, DT, ASM)
    acc = tl.zeros([BN, BM], tl.float32)
    by_row = tl.zeros([BN], tl.float32)
    if GROUP == 0:
        by_row = tl.load(row_scale + n) * factor
    if PDL:
        gdc_wait()
    for step in tl.range(split * span, tl.minimum(split * span + span, K // BK), num_stages=STAGES):
        for piece in tl.static_range(BK // PART):
            at = step * (BK // PART) + piece
            w = tl.load(pointers + at * words_a_step(PART, FORM))
            k = at * PART + tl.arange(0, PART)
            rows = tl.load(
                x + m[None, :] * x_stride + k[:, None], mask=(m < M)[None, :], other=0.0
            ).to(DT)
            acc = add_product(
                acc, w, rows, tables, scales, n, at, NP, BN, PART, GROUP, FORM, REST, LATE, DT, ASM
            )
    acc *= by_row[:, None] if GROUP == 0 else factor
    if PDL:
        gdc_launch_dependents()
    last = True
    if SPLITS > 1:
        to = m[None, :] * NP + n[:, None]
        each = tl.num_programs(0).to(tl.int64) * BM * NP
        counter = arrived + tile * tl.num_programs(0) + tl.program_id(0)
        tl.store(part + split * each + to, acc)
        tl.debug_barrier()
        last = tl.atomic_add(counter, 1) == SPLITS - 1
        if last:
            tl.store(counter, 0)
            acc = tl.zeros([BN, BM], tl.float32)
            for other in tl.static_range(SPLITS):
                acc += tl.load(part + other * each + to, cache_modifier=".cg")
    if last:
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(
            out + m[None, :] * out_stride + n[:, None],
            acc.to(out.dtype.element_ty),
            mask=(n < N)[:, None] & (m < M)[None, :],
        )


@triton.jit
def _dequantize(words, table, scales, row_scale, out, N, NP, factor, K, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
        FORM: tl.constexpr, REST: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out [N, K]: rounded as the product does where groups have scales, but values of tables once, as
    full weights are."""
    DT: tl.constexpr = tl.float32 if ASM == "" else out.dtype.element_ty
    OFFSET: tl.constexpr = (
        0.0 if ASM == "" or FORM != "int4" else (128.0 if tl.bfloat16 == DT else 1024.0)
    )
    tile = tl.program_id(0)
    step = tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    w = tl.load(words + offsets(tile, K, BN, BK, FORM) + step * words_a_step(BK, FORM))
    TABLE: tl.constexpr = FORM != "int4" and FORM != "byte" and FORM != "fp8"
    c = decode(by_thread(w, FORM), table, n, BN, BK, FORM, DT, ASM)
    if GROUP > 0:
        c = _scaled(c, scales, n, step, NP, BN, BK, GROUP, OFFSET, REST, TABLE)
        c = c.to(tl.float32) * factor
    else:
        c = c.to(tl.float32) * (tl.load(row_scale + n) * factor)[:, None]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    offsets_out = n.to(tl.int64)[:, None] * K + (step * BK + tl.arange(0, BK))[None, :]
    tl.store(out + offsets_out, c.to(out.dtype.element_ty), mask=(n < N)[:, None])


def asm_of(form: str, dtype: torch.dtype, device: torch.device) -> str:
    """The PTX that decodes. Empty: in Triton's own words, for its interpreter and for float32."""
    return DECODERS.get((form, dtype), "") if device.type == "cuda" else ""


def quantized_linear(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None = None,
    config: QuantizedConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [M, K] times the transpose of matrix [N, K], plus bias [N] -> [M, N] in x's dtype. `out`:
    where to, rows of which may be wider than N."""
    if out is None:
        out = torch.empty(x.shape[0], matrix.shape[0], dtype=x.dtype, device=x.device)
    if not len(x):
        return out
    if config is not None:
        _launch(x, matrix, bias, out, config)
    else:
        best = pick_config(x.shape[0], matrix, x.dtype)
        choose(best, matrix.form, x.element_size()).launch(
            x.device, lambda shape: _launch(x, matrix, bias, out, shape)
        )
    return out


def _launch(
    x: Tensor, matrix: PackedMatrix, bias: Tensor | None, out: Tensor, c: QuantizedConfig
) -> None:
    (rows, k), n = x.shape, matrix.shape[0]
    steps = k // c.block_k
    span = triton.cdiv(steps, c.splits)
    splits = triton.cdiv(steps, span)
    tiles = matrix.padded // c.block_n
    row_tiles = triton.cdiv(rows, c.block_m)
    asm = asm_of(matrix.form, x.dtype, x.device)
    factor = matrix.factor * unit_of(matrix.form, asm)
    table = table_of(matrix.table, matrix.form, asm, x.dtype)
    part = out
    if splits > 1:
        size = splits * row_tiles * c.block_m * matrix.padded
        part = torch.empty(size, dtype=torch.float32, device=x.device)
    _quantized[(row_tiles, tiles, splits)](
        x, matrix.words, table, matrix.scales, matrix.row_scale, bias, out, part, counters(x.device, "quantized gemm", tiles * row_tiles),
        x.stride(0), out.stride(0), rows, n, matrix.padded, factor, span, k, BM=c.block_m, BN=c.block_n, BK=c.block_k,
        GROUP=matrix.group, FORM=matrix.form, REST=matrix.rest, LATE=c.late and matrix.scales_late(c.block_k), SPLITS=splits,
        BIAS=bias is not None, ASM=asm, STAGES=c.stages, num_warps=c.warps,
        **({"maxnreg": c.registers} if c.registers else {}), **overlap(x.device))  # fmt: skip


def dequantize(matrix: PackedMatrix, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """[N, K] in `dtype`."""
    n, k = matrix.shape
    device = matrix.words.device
    if out is None:
        out = torch.empty(n, k, dtype=dtype, device=device)
    # values of tables are looked up in float32, and rounded as full weights are
    asm = "" if matrix.table is not None else asm_of(matrix.form, dtype, device)
    block_k = block_k_of(k)
    _dequantize[(matrix.padded // TILE, k // block_k)](
        matrix.words, matrix.table, matrix.scales, matrix.row_scale, out, n, matrix.padded, matrix.factor, k, BN=TILE,
        BK=block_k, GROUP=matrix.group, FORM=matrix.form, REST=matrix.rest, ASM=asm, num_warps=4,
        **overlap(device))  # fmt: skip
    return out
