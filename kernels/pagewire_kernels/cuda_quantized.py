"""Quantized matrices on a GPU: brought into the form that gemm_quantized.py reads, and multiplied
by its kernels or, for many rows, by cuBLAS: in float8 where matrices were made for it, else after
they were dequantized.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

import torch
from torch import Tensor

from . import (
    activation,
    float8_rows,
    gemm,
    gemm_row,
    gemm_row_parts,
    gemm_scaled,
    hopper_plan,
    norm,
)
from .gemm_quantized import MOST_FUSED_ROWS, dequantize, quantized_linear
from .gpu_quantized_size import BLOCK, FOUR_BITS, LARGEST_DENSE, PADDING, fits, fitting_group
from .kernel_choices import KernelChoices
from .lookup_tables import ROW_TABLES, form_of, named
from .packed_matrix import PackedExperts, PackedMatrix, cut, pack_scales, stack
from .quantized import Quantized
from .quantized_decode import FP8, INT4, INT8, pack_words
from .quantized_rows import QuantizedRows
from .table_lookup import planes

MOST_SCALE: Final = 16.0
"""Scales are brought below by a power of two, so that a scale times a code stays in float16's range
and small ones keep their digits."""
WHOLE_ZEROS: Final = 120
"""Zero points up to which a code less its zero point is exact in bfloat16."""
MOST_TOGETHER: Final = 1 << 27
"""Weights of experts that are packed together; their codes take some six bytes each meanwhile."""
_rooms: dict[torch.device, Tensor] = {}
"""Memory that all dequantized matrices share, one after the other: as large as the largest needs,
before any graph is captured."""


class QuantizedMatrices:
    """Matrices that read the same input, side by side: W [N, K]. Neighbours of the same form are
    one matrix, others follow each other."""

    def __init__(self, parts: Sequence[PackedMatrix], choices: KernelChoices) -> None:
        self._parts = parts
        self._choices = choices
        self._rows = sum(matrix.shape[0] for matrix in parts)
        self._columns = parts[0].shape[1]

    @property
    def machine_code(self) -> bool:
        """See backend.PackedQuantized."""
        return False

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return torch.Size((self._rows, self._columns))

    @property
    def nbytes(self) -> int:
        """Bytes of the GPU's memory."""
        return sum(matrix.nbytes for matrix in self._parts)

    @property
    def takes_row(self) -> bool:
        """Whether the kernels for one row (gemm_row.py) read all of it."""
        return all(map(gemm_row.takes, self._parts))

    @property
    def parts(self) -> Sequence[PackedMatrix]:
        """In order."""
        return self._parts

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N] in x's type."""
        if len(x) == 1 and self.takes_row:
            return gemm_row_parts.linear_add(x, self._parts, bias, None)
        group = self.input_group(len(x), x.dtype)
        if group is not None:
            return self.in_float8(float8_rows.quantize_rows(x, group), bias)
        on_hopper = [self._goes_to_hopper(x, matrix) for matrix in self._parts]
        if (
            len(x) > MOST_FUSED_ROWS
            and not all(on_hopper)
            and self._rows * self._columns <= LARGEST_DENSE
        ):
            return gemm.linear(x, self.dense(x.dtype), bias, self._choices.gemm)
        out = torch.empty(len(x), self._rows, dtype=x.dtype, device=x.device)
        first = 0
        for matrix, hopper in zip(self._parts, on_hopper, strict=True):
            rows = slice(first, first + matrix.shape[0])
            part_bias = None if bias is None else bias[rows]
            multiply = _hopper_linear if hopper else quantized_linear
            multiply(x, matrix, part_bias, out=out[:, rows])
            first += matrix.shape[0]
        return out

    def _goes_to_hopper(self, x: Tensor, matrix: PackedMatrix) -> bool:
        return self._choices.hopper_quantized and hopper_plan.takes(x, matrix)

    def input_group(self, rows: int, dtype: torch.dtype) -> int | None:
        """See backend.QuantizingOps.group_of."""
        device = self._parts[0].words.device
        groups = {gemm_scaled.group_of(matrix, rows, dtype, device) for matrix in self._parts}
        return groups.pop() if len(groups) == 1 else None

    def in_float8(self, x: QuantizedRows, bias: Tensor | None = None) -> Tensor:
        """The product with rows rounded to float8 (gemm_scaled.py), as `input_group` says."""
        biases = [None] * len(self._parts)
        if bias is not None:
            biases = bias.split([matrix.shape[0] for matrix in self._parts])
        outs = [
            gemm_scaled.scaled_linear(x, matrix, part_bias)
            for matrix, part_bias in zip(self._parts, biases, strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K], valid until the next call for any matrix."""
        memory = _room(self._parts[0].words.device, self._rows * self._columns, dtype)
        whole = memory.view(self._rows, self._columns)
        first = 0
        for matrix in self._parts:
            dequantize(matrix, dtype, whole[first : first + matrix.shape[0]])
            first += matrix.shape[0]
        return whole

    def embed(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] int64, [T, K] float32. Dequantizes everything: where a table is read
        often, it is kept dense."""
        return self.dense(torch.float32)[ids]


def _hopper_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None, out: Tensor) -> None:
    """Imported by its first use: other releases of Triton may not have what it imports."""
    from .gemm_quantized_hopper import hopper_linear

    hopper_linear(x, matrix, bias, out)


def _room(device: torch.device, elements: int, dtype: torch.dtype) -> Tensor:
    """Memory [elements], the same for all who ask."""
    needed = elements * dtype.itemsize
    room = _rooms.get(device)
    if room is None or room.numel() < needed:
        room = _rooms[device] = torch.empty(needed, dtype=torch.uint8, device=device)
    return room[:needed].view(dtype)


def compiled_for(weights: Iterable[Tensor | QuantizedMatrices | PackedExperts]) -> list[str]:
    """What the kernels that read `weights` are compiled for, each once, sorted: the same sizes in
    another form want other kernels."""
    return sorted({repr(form) for weight in weights for form in _forms(weight)})


def _forms(weight: Tensor | QuantizedMatrices | PackedExperts) -> Iterator[object]:
    if isinstance(weight, Tensor):
        yield weight.shape, weight.dtype
    elif isinstance(weight, PackedExperts):
        yield len(weight), weight.halves, weight.shape, weight.form, weight.group, weight.rest
    else:
        for part in weight.parts:
            in_blocks = part.block_scale is not None
            yield part.shape, part.form, part.group, part.rest, part.quantize_inputs, in_blocks


class CudaQuantizing:
    """See backend.QuantizingOps."""

    rms_norm = staticmethod(norm.rms_norm_quantized)
    add_rms_norm = staticmethod(norm.add_rms_norm_quantized)
    silu_mul = staticmethod(activation.silu_mul_quantized)
    gelu_mul = staticmethod(activation.gelu_mul_quantized)

    def group_of(
        self, weight: Tensor | QuantizedMatrices, rows: int, dtype: torch.dtype
    ) -> int | None:
        """See backend.QuantizingOps."""
        return None if isinstance(weight, Tensor) else weight.input_group(rows, dtype)

    def linear(
        self, x: QuantizedRows, weight: QuantizedMatrices, bias: Tensor | None = None
    ) -> Tensor:
        """See backend.QuantizingOps."""
        return weight.in_float8(x, bias)


class CudaQuantized:
    """See backend.QuantizedOps."""

    quantizing = CudaQuantizing()

    def __init__(self, choices: KernelChoices) -> None:
        self._choices = choices

    @property
    def experts(self) -> "CudaQuantized":
        """See backend.QuantizedOps."""
        return self

    def pack_experts(self, experts: Sequence[Sequence[Quantized]]) -> PackedExperts | None:
        """See backend.QuantizedExpertOps."""
        matrices = [matrix for each in experts for matrix in each]
        if not all(map(_fits, matrices)):
            return None
        ready = [_regrouped(matrix) for matrix in matrices]
        if len({(_form(matrix), matrix.group, matrix.shape) for matrix in ready}) > 1:
            return None
        packed = list(_packed_alike(ready))
        halves = len(experts[0])
        return stack([packed[i : i + halves] for i in range(0, len(packed), halves)])

    def pack(self, parts: Sequence[Quantized], float32_output: bool) -> QuantizedMatrices | None:
        """None where there is no kernel for the number of columns or the groups. Results are in the
        input's type whatever is allowed."""
        if not all(_fits(matrix) for matrix in parts):
            return None
        ready = [_regrouped(matrix) for matrix in parts]
        alike = groupby(
            ready,
            key=lambda matrix: (_form(matrix), matrix.group, matrix.quantize_inputs),
        )
        packed = [_with_blocks(list(same)) for _, same in alike]
        matrices = QuantizedMatrices(packed, self._choices)
        self._choices.int4_groups.update((m.group, m.rest) for m in packed if m.form == INT4)
        elements = matrices.shape.numel()
        if elements <= LARGEST_DENSE:
            _room(packed[0].words.device, elements, torch.float16)
        return matrices


def _form(matrix: Quantized) -> str:
    """Of a PackedMatrix; empty for a table that no kernel knows."""
    if matrix.table is not None:
        return form_of(matrix.table)
    return {torch.uint8: INT4, torch.int8: INT8, torch.float8_e4m3fn: FP8}[matrix.values.dtype]


def _table_name(matrix: Quantized) -> str:
    """As gpu_quantized_size has it."""
    return "" if matrix.table is None else _form(matrix)


def _fits(matrix: Quantized) -> bool:
    return bool(_form(matrix)) and fits(matrix.shape[1], matrix.group, _table_name(matrix))


def _regrouped(matrix: Quantized) -> Quantized:
    """In groups for which there are kernels, or one a row where rows have tables, or codes of 8 bits
    no minimum."""
    table = _table_name(matrix)
    whole = matrix.bits > FOUR_BITS and matrix.minimum is None
    if table == ROW_TABLES or (whole and matrix.group == matrix.shape[1]):
        return matrix
    return matrix.regrouped(fitting_group(matrix.group, table))


def _with_blocks(matrices: Sequence[Quantized]) -> PackedMatrix:
    """pack_matrix, with the scales of blocks where products in float8 are to read them."""
    packed = pack_matrix(matrices)
    first = matrices[0]
    if packed.form != FP8 or packed.group != BLOCK or not first.quantize_inputs:
        return packed
    if not gemm_scaled.has_block_products(packed.words.device):
        return packed
    block_scale = gemm_scaled.block_scales(torch.cat([matrix.scale for matrix in matrices]).float())
    return replace(packed, quantize_inputs=block_scale is not None, block_scale=block_scale)


def pack_matrix(matrices: Sequence[Quantized]) -> PackedMatrix:
    """`matrices` of one form and group, on one device, below each other."""
    raw = torch.cat([matrix.codes.view(torch.uint8) for matrix in matrices])
    scale = torch.cat([matrix.scale for matrix in matrices]).float()
    rows, columns = raw.shape
    group = matrices[0].group
    form = _form(matrices[0])
    missing = (0, 0, 0, -rows % PADDING)

    def padded(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, missing)

    if matrices[0].table is not None:
        tables = [matrix.table for matrix in matrices if matrix.table is not None]
        return _pack_tables(padded(raw), padded(scale), tables, torch.Size((rows, columns)))
    if form == INT8:
        raw = raw ^ 0x80
    if group == columns and form != INT4 and all(matrix.minimum is None for matrix in matrices):
        words = pack_words(padded(raw), form)
        shape = torch.Size((rows, columns))
        by_row = padded(scale)[:, 0].contiguous()
        return PackedMatrix(
            words, None, by_row, shape, form, 0, False, 1, matrices[0].quantize_inputs
        )
    minimum = _minima(matrices, scale)
    zero = torch.zeros_like(scale)
    if minimum is not None:
        constant = (scale == 0) & (minimum != 0)
        if bool(constant.any()):
            # A group of one value: a code of zero, and a scale and a zero point that give it.
            raw = raw.masked_fill(constant.repeat_interleave(group, 1), 0x80 if form == INT8 else 0)
            scale = torch.where(constant, minimum, scale)
        zero = torch.where(constant, -1.0, -minimum / torch.where(scale == 0, 1.0, scale))
    factor = _factor(scale)
    whole = zero.round()
    exact = minimum is None or bool(
        ((whole.abs() <= WHOLE_ZEROS) & (-whole * scale == minimum) | (scale == 0)).all()
    )
    zero = (whole if exact else zero).clamp(-60000, 60000)
    scales = pack_scales(padded((scale / factor).half()), padded(zero.half()))
    shape = torch.Size((rows, columns))
    words = pack_words(padded(raw), form)
    return PackedMatrix(words, scales, None, shape, form, group, not exact, factor)


def _packed_alike(matrices: Sequence[Quantized]) -> Iterator[PackedMatrix]:
    """Each of `matrices`, which are of one form, group and shape. Many are packed together: that is
    some forty operations, however large they are, and mixtures have thousands of small ones."""
    rows = matrices[0].shape[0]
    together = 1 if rows % PADDING else max(1, MOST_TOGETHER // matrices[0].shape.numel())
    for first in range(0, len(matrices), together):
        some = matrices[first : first + together]
        yield from cut(pack_matrix(some), len(some))


def _pack_tables(
    codes: Tensor, scale: Tensor, tables: Sequence[Tensor], shape: torch.Size
) -> PackedMatrix:
    """codes [NP, K] and scale [NP, K / group] float32 of a matrix with a table, or one a row."""
    form = form_of(tables[0])
    words = pack_words(codes, form)
    if form == ROW_TABLES:
        table = torch.cat(list(tables)).float()
        table = torch.nn.functional.pad(table, (0, 0, 0, len(codes) - shape[0]))
        by_row = scale[:, 0].contiguous()
        return PackedMatrix(words, None, by_row, shape, form, 0, False, 1.0, table=table)
    group = shape[1] // scale.shape[1]
    factor = _factor(scale)
    bits = (scale / factor).view(torch.int32).t().contiguous()
    table = named(form, codes.device)
    for dtype in (torch.bfloat16, torch.float16):
        planes(form, dtype, codes.device)  # before any graph is captured
    return PackedMatrix(words, bits, None, shape, form, group, False, factor, table=table)


def _minima(matrices: Sequence[Quantized], scale: Tensor) -> Tensor | None:
    if all(matrix.minimum is None for matrix in matrices):
        return None
    minima = [
        torch.zeros_like(matrix.scale) if matrix.minimum is None else matrix.minimum
        for matrix in matrices
    ]
    return torch.cat(minima).float()


def _factor(scale: Tensor) -> float:
    """A power of two by which scales come below MOST_SCALE."""
    most = float(scale.abs().max())
    if most == 0:
        return 1.0
    return 2.0 ** torch.tensor(most / MOST_SCALE).log2().ceil().item()
