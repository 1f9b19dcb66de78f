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

import functools
from dataclasses import dataclass, replace
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .lookup_tables import ROW_TABLES
from .quantized_decode import (
    DECODERS,
    EIGHT_BITS,
    TILE,
    by_thread,
    decode,
    offsets,
    words_a_step,
)
from .shapes import Candidate, Choice
from .table_lookup import table_of, tables_of, unit_of
from .workspace import counters, overlap

MOST_FUSED_ROWS: Final = 512
"""Rows of x above which the matrix is dequantized first; measured on an H100
(docs/performance.md)."""


@dataclass(frozen=True)
class QuantizedConfig:
    """Launch shape. block_m: rows of x a program; block_n: weight rows, a multiple of TILE;
    block_k: inner elements a step; splits: programs sharing a result. late: scales are applied to
    sums where they can be, instead of to weights. registers: the most a thread may have."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int
    late: bool = True
    registers: int | None = None


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
    The scale has more digits than bfloat16: what that type leaves of it is multiplied by itself."""
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
    if tl.bfloat16 == DT:
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
    TABLE: tl.constexpr = FORM != "int4" and FORM != "int8" and FORM != "fp8"
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
    TABLE: tl.constexpr = FORM != "int4" and FORM != "int8" and FORM != "fp8"
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
    TABLE: tl.constexpr = FORM != "int4" and FORM != "int8" and FORM != "fp8"
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


@dataclass(frozen=True)
class PackedMatrix:
    """A weight [N, K] as these kernels read it. N is filled up to NP, a multiple of TILE, with
    zeros.

    words: codes, int32 [NP / 64, K / 64, 128, 4], in 8 bits [NP, K / 4]. form: int4, int8, fp8
    (e4m3) or one of lookup_tables. scales: int32 [K / group, NP], the bits of a scale and above
    them those of a zero point, both float16, or with a table those of a float32; rest: some zero
    points are no whole numbers. row_scale: float32 [NP], where there are no groups (group 0).
    factor: times all; scales were divided by it to fit into float16. quantize_inputs: see
    quantized.Quantized. table: float32 [16], one for all, or [NP, 16].
    """

    words: Tensor
    scales: Tensor | None
    row_scale: Tensor | None
    shape: torch.Size
    form: str
    group: int
    rest: bool
    factor: float
    quantize_inputs: bool = False
    table: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, but those of a table that others share."""
        table = self.table if self.form == ROW_TABLES else None
        tensors = (self.words, self.scales, self.row_scale, table)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def scales_late(self, block_k: int) -> bool:
        """Whether `block_k` inputs share a scale and a zero point that is a whole number, so that
        their sum may be scaled; or, of a table that is rounded, groups do."""
        if self.table is not None:
            return self.group % TILE == 0 and self.group > 0
        return bool(self.group) and self.group % block_k == 0 and not self.rest

    @property
    def padded(self) -> int:
        """NP."""
        return self.words.shape[0] * (1 if self.form in EIGHT_BITS else TILE)


def pack_scales(scale: Tensor, zero: Tensor) -> Tensor:
    """scale and zero [N, groups] float16 -> int32 [groups, N]."""
    low = scale.view(torch.int16).int() & 0xFFFF
    return (low | zero.view(torch.int16).int() << 16).t().contiguous()


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
    block_k = _block_k(k)
    _dequantize[(matrix.padded // TILE, k // block_k)](
        matrix.words, matrix.table, matrix.scales, matrix.row_scale, out, n, matrix.padded, matrix.factor, k, BN=TILE,
        BK=block_k, GROUP=matrix.group, FORM=matrix.form, REST=matrix.rest, ASM=asm, num_warps=4,
        **overlap(device))  # fmt: skip
    return out


def _block_k(k: int) -> int:
    return 128 if k % 128 == 0 else 64


def pick_config(rows: int, matrix: PackedMatrix, dtype: torch.dtype) -> QuantizedConfig:
    """The launch shape; measured on an H100 (docs/performance.md). Splits give small matrices
    enough programs, some two for each multiprocessor."""
    n = matrix.padded
    k = matrix.shape[1]
    block_k = _block_k(k)
    if dtype == torch.float32:
        return QuantizedConfig(16, 64, 64, _splits(256, n, 64, k), 4, 2)
    four_bits = matrix.form not in EIGHT_BITS
    late = four_bits and matrix.scales_late(block_k)
    if rows > 64:
        if late and matrix.table is not None:
            return _many_rows_late(rows, n, k)
        return _many_rows(rows, n, k, block_k)
    if late or matrix.form == ROW_TABLES:
        # which are read once a program: so there are few of them
        return _few_rows_late(rows, n, k, block_k, matrix.table is not None)
    return _few_rows(rows, n, k, block_k, four_bits)


def _few_rows_late(rows: int, n: int, k: int, block_k: int, tables: bool) -> QuantizedConfig:
    """4 bits with whole zero points, or tables, whose registers leave larger tiles none: sums are
    scaled while rows are few."""
    if rows <= 32:
        block_n = 128 if n > 4096 or k > 8192 else 64
        stages = 4 if rows <= 16 else 3
        return QuantizedConfig(
            16 if rows <= 16 else 32, block_n, block_k, _splits(256, n, block_n, k), 4, stages
        )
    block_n = 64 if tables else 128
    programs = 256 if k > 8192 or tables else 160
    return QuantizedConfig(64, block_n, block_k, _splits(programs, n, block_n, k), 4, 3)


def _few_rows(rows: int, n: int, k: int, block_k: int, four_bits: bool) -> QuantizedConfig:
    """8 bits, and 4 bits whose weights are scaled one by one."""
    large = n >= 16384
    if rows <= 16 and not four_bits and k % 256 == 0:
        return QuantizedConfig(16, 64, 256, _splits(256, n, 64, k), 4, 3)
    if rows <= 32:
        programs = 800 if four_bits else 256
        stages = 3 if large or four_bits or rows > 16 else 4
        return QuantizedConfig(
            16 if rows <= 16 else 32, 64, block_k, _splits(programs, n, 64, k), 4, stages
        )
    block_n = 128 if large else 64
    return QuantizedConfig(64, block_n, block_k, _splits(400, n, block_n, k), 4, 3)


def _many_rows(rows: int, n: int, k: int, block_k: int) -> QuantizedConfig:
    """Some hundreds. Sums stay in one set of registers, so that several programs of a small tile,
    or two of a large one, share a multiprocessor: one decodes while another multiplies."""
    row_tiles = triton.cdiv(rows, 128)
    if n >= 16384:
        return QuantizedConfig(128, 128, 64, 1, 8, 3, late=False)
    if row_tiles == 1:
        return QuantizedConfig(128, 64, block_k, _splits(256, n, 64, k), 4, 3, late=False)
    if k > 8192 and row_tiles > 2:
        return QuantizedConfig(128, 128, 64, _splits(256 // row_tiles, n, 128, k), 8, 3, late=False)
    return QuantizedConfig(128, 64, 64, _splits(384 // row_tiles, n, 64, k), 4, 4, late=False)


def _many_rows_late(rows: int, n: int, k: int) -> QuantizedConfig:
    """Some hundreds, with tables that are rounded: sums are scaled at any number of rows, in a
    second set of registers."""
    row_tiles = triton.cdiv(rows, 128)
    return QuantizedConfig(128, 64, 64, _splits(256 // row_tiles, n, 64, k), 4, 3)


def _splits(programs: int, n: int, block_n: int, k: int) -> int:
    """A power of two that gives no more than so many programs, each of which has four steps at
    least."""
    most = max(1, min(programs * block_n // n, k // 512))
    return 1 << (most.bit_length() - 1)


def shared_bytes(config: QuantizedConfig, form: str, itemsize: int) -> int:
    """Of shared memory: codes, rows of x and scales of the steps under way."""
    codes = config.block_n * config.block_k // (1 if form in EIGHT_BITS else 2)
    return config.stages * (codes + config.block_m * config.block_k * itemsize + 8 * config.block_n)


@functools.cache
def choose(best: QuantizedConfig, form: str, itemsize: int) -> Choice[QuantizedConfig]:
    """`best`, then with fewer steps under way, and last with the least tile."""
    shapes = [replace(best, stages=stages) for stages in range(best.stages, 1, -1)]
    shapes.append(replace(best, block_m=16, block_n=64, block_k=64, warps=4, stages=2))
    candidates = tuple(
        Candidate(shape, shared_bytes(shape, form, itemsize)) for shape in dict.fromkeys(shapes)
    )
    return Choice(f"quantized product ({form}, {itemsize} bytes an element of x)", candidates)
