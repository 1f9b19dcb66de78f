"""Quantized matrices as the kernels of a GPU read them: one, and those of all experts together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .lookup_tables import ROW_TABLES
from .quantized_decode import EIGHT_BITS, TILE


@dataclass(frozen=True)
class PackedMatrix:
    """A weight [N, K] as these kernels read it. N is filled up to NP, a multiple of TILE, with
    zeros.

    words: codes, int32 [NP / 64, K / 64, 128, 4], in 8 bits [NP, K / 4]. form: int4, byte, fp8
    (e4m3) or one of lookup_tables. scales: int32 [K / group, NP], the bits of a scale and above
    them those of a zero point, both float16, or with a table those of a float32; rest: some zero
    points are no whole numbers. row_scale: float32 [NP], where there are no groups (group 0).
    factor: times all; scales were divided by it to fit into float16. quantize_inputs: see
    quantized.Quantized. table: float32 [16], one for all, or [NP, 16]. block_scale: float32
    [NP / 128, K / 128], where groups have the same scales in 128 rows each, and products in float8
    may use that (gemm_scaled.py).
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
    block_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, but those of a table that others share."""
        table = self.table if self.form == ROW_TABLES else None
        tensors = (self.words, self.scales, self.row_scale, table, self.block_scale)
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


@dataclass(frozen=True)
class PackedExperts:
    """The matrices of all experts: of each `halves` of [N, K], each filled up to NP rows.

    words: as of PackedMatrix, [E, halves, ...]. scales: int32 [E, halves, K / group,
    NP], or row_scale: float32 [E, halves, NP]. factors: float32 [E, halves]. form, group, rest: as
    of PackedMatrix. table: float32 [16], one for all, or [E, halves, NP, 16].
    """

    words: Tensor
    scales: Tensor | None
    row_scale: Tensor | None
    factors: Tensor
    shape: torch.Size
    padded: int
    form: str
    group: int
    rest: bool
    table: Tensor | None = None

    def __len__(self) -> int:
        return len(self.words)

    @property
    def halves(self) -> int:
        """Matrices of each expert: gate and up, or one."""
        return self.words.shape[1]

    @property
    def rounds_table(self) -> bool:
        """Whether values of a table are rounded, so that sums of a group are scaled, however many
        rows there are."""
        return self.table is not None and self.group == TILE

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, but those of a table that others share."""
        table = self.table if self.form == ROW_TABLES else None
        tensors = (self.words, self.scales, self.row_scale, self.factors, table)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def cut(matrix: PackedMatrix, count: int) -> list[PackedMatrix]:
    """`matrix` as `count` equal ones below each other, without a copy; their rows are a multiple of
    the largest tile."""
    rows = matrix.shape[0] // count
    shape = torch.Size((rows, matrix.shape[1]))

    def piece(values: Tensor | None, dim: int, i: int) -> Tensor | None:
        if values is None:
            return None
        each = values.shape[dim] // count
        return values.narrow(dim, i * each, each)

    def part(i: int) -> PackedMatrix:
        words = piece(matrix.words, 0, i)
        assert words is not None
        table = piece(matrix.table, 0, i) if matrix.form == ROW_TABLES else matrix.table
        return replace(
            matrix,
            words=words,
            scales=piece(matrix.scales, 1, i),
            row_scale=piece(matrix.row_scale, 0, i),
            shape=shape,
            table=table,
        )

    return [part(i) for i in range(count)]


def stack(experts: Sequence[Sequence[PackedMatrix]]) -> PackedExperts | None:
    """The matrices of each expert together; None where they are not of one form."""
    matrices = [matrix for halves in experts for matrix in halves]
    first = matrices[0]
    kinds = {(m.form, m.group, m.shape, m.scales is None) for m in matrices}
    if len(kinds) > 1:
        return None

    def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
        whole = [tensor for tensor in tensors if tensor is not None]
        if not whole:
            return None
        return torch.stack(whole).unflatten(0, (len(experts), len(experts[0])))

    words = stacked([matrix.words for matrix in matrices])
    assert words is not None
    factors = torch.tensor([matrix.factor for matrix in matrices], device=words.device)
    return PackedExperts(
        words,
        stacked([matrix.scales for matrix in matrices]),
        stacked([matrix.row_scale for matrix in matrices]),
        factors.float().view(words.shape[:2]),
        first.shape,
        first.padded,
        first.form,
        first.group,
        any(matrix.rest for matrix in matrices),
        stacked([matrix.table for matrix in matrices]) if first.form == ROW_TABLES else first.table,
    )
