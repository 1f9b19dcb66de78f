"""Weights as small integers with a scale, and where need be a minimum, for each group of
consecutive inputs. Knows no file format and no layout of a back end.

    w[n, k] = scale[n, k // group] * codes[n, k] + minimum[n, k // group]

Every type of GGUF without a lookup table is exactly of this form in float32 (ggml's block_q4_0 to
block_q6_K). With a table of 16 values codes are places in it:

    w[n, k] = scale[n, k // group] * table[codes[n, k]], or table[n, codes[n, k]]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

GROUP = 32
"""Inputs that share a scale where weights are quantized here."""


class Stored(Protocol):
    """Codes [N, K] that stay in the blocks of a file until they are wanted."""

    shape: torch.Size
    dtype: torch.dtype

    def whole(self) -> Tensor:
        """All of them [N, K], on the CPU."""
        ...

    def columns(self, start: int, length: int) -> "Stored | None":
        """Inputs start to start + length of all rows; None where they are no whole blocks."""
        ...

    def by_place(self, first: int, last: int, lanes: int) -> np.ndarray:
        """Those of rows first to last, or as many as there are, by their place in a block: [values
        of a block, (last - first) / lanes, blocks of a row, lanes]. Lanes without a row hold
        anything."""
        ...

    def __getitem__(self, rows: Tensor) -> "Stored": ...


@dataclass(frozen=True)
class Quantized:
    """values [N, K]: codes, uint8 of 0 to 15 (4 bits), int8 or float8_e4m3fn; scale [N, K / group]
    float32; minimum like scale, None where it is zero. quantize_inputs: made for products whose
    other operand is rounded to the type of the codes as well, each row with a scale of its own.
    table: float32 [16], one for all, or [N, 16], one a row; only of 4 bits without a minimum."""

    values: Tensor | Stored
    scale: Tensor
    minimum: Tensor | None = None
    quantize_inputs: bool = False
    table: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        return self.values if isinstance(self.values, Tensor) else self.values.whole()

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def bits(self) -> int:
        return 4 if self.values.dtype == torch.uint8 else 8

    @property
    def group(self) -> int:
        return self.shape[1] // self.scale.shape[1]

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers of 8 bits."""
        return self.values.dtype == torch.float8_e4m3fn

    def to(self, device: torch.device | str) -> "Quantized":
        """On that device; codes that stay in a file's blocks are taken out of them for another than
        the CPU."""
        target = torch.device(device)
        if target.type == "cpu" and self.scale.device.type == "cpu":
            return self
        minimum = None if self.minimum is None else self.minimum.to(target)
        table = None if self.table is None else self.table.to(target)
        return replace(
            self,
            values=self.codes.to(target),
            scale=self.scale.to(target),
            minimum=minimum,
            table=table,
        )

    def by_place(self, first: int, last: int, lanes: int) -> np.ndarray:
        """Codes as Stored gives them; without blocks, each row is one."""
        if not isinstance(self.values, Tensor):
            return self.values.by_place(first, last, lanes)
        rows = pad_rows(self.values[first:last].numpy(), last - first)
        return np.ascontiguousarray(rows.reshape(-1, lanes, self.shape[1]).transpose(2, 0, 1))[
            :, :, None
        ]

    def __getitem__(self, rows: Tensor) -> "Quantized":
        return self.take(rows)

    @property
    def ndim(self) -> int:
        """2, as a matrix's."""
        return len(self.shape)

    def regrouped(self, group: int) -> "Quantized":
        """The same weights in smaller groups, of which the present ones are multiples; each gets
        the scale and the minimum of the one it is cut from."""
        times = self.group // group

        def repeated(values: Tensor) -> Tensor:
            return values if times == 1 else values.repeat_interleave(times, 1)

        minimum = None if self.minimum is None else repeated(self.minimum)
        return replace(self, scale=repeated(self.scale), minimum=minimum)

    def take(self, rows: Tensor | Sequence[int]) -> "Quantized":
        """The rows of these numbers, in their order."""
        index = torch.as_tensor(rows, device=self.scale.device)
        if isinstance(self.values, Tensor):  # noqa: SIM108
            # as bytes: torch takes no rows of 8-bit floats on every device
            values = self.values.view(torch.uint8)[index].view(self.values.dtype)
        else:
            values = self.values[index]
        minimum = None if self.minimum is None else self.minimum[index]
        by_row = self.table is not None and self.table.dim() == 2
        table = self.table[index] if self.table is not None and by_row else self.table
        return replace(self, values=values, scale=self.scale[index], minimum=minimum, table=table)

    def narrow(self, dim: int, start: int, length: int) -> "Quantized":
        """Rows (dim 0) or columns (dim 1) from `start` on, as Tensor.narrow. Where columns cut a
        group, all groups become smaller ones."""
        if dim == 0:
            return self.take(torch.arange(start, start + length))
        group = math.gcd(self.group, start, length)
        if group < self.group:
            return self.regrouped(group).narrow(dim, start, length)
        first = start // self.group
        count = length // self.group
        minimum = None if self.minimum is None else self.minimum.narrow(1, first, count)
        values = None
        if not isinstance(self.values, Tensor):
            values = self.values.columns(start, length)
        if values is None:
            values = self.codes.narrow(1, start, length)
        scale = self.scale.narrow(1, first, count)
        return replace(self, values=values, scale=scale, minimum=minimum)

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        grouped = self._unscaled().view(self.shape[0], -1, self.group).mul_(self.scale[:, :, None])
        if self.minimum is not None:
            grouped.add_(self.minimum[:, :, None])
        return grouped.view(self.shape)

    def _unscaled(self) -> Tensor:
        """What codes stand for, [N, K] float32, in memory of its own."""
        if self.table is None:
            return self.codes.float()
        if self.table.dim() == 1:
            return self.table[self.codes.int()]
        return self.table.gather(1, self.codes.long())


class StoredMatrix(Protocol):
    """A quantized matrix [N, K] that stays in a file until it is known which part is wanted where.
    Not a Tensor; what reads both asks that first."""

    shape: torch.Size
    ndim: int

    def to(self, device: torch.device | str) -> Quantized:
        """Taken apart on that device; on the CPU codes may stay in the blocks of the file."""
        ...

    def take(self, rows: Tensor | Sequence[int]) -> "StoredMatrix":
        """See Quantized."""
        ...

    def narrow(self, dim: int, start: int, length: int) -> "StoredMatrix | Quantized":
        """See Quantized."""
        ...

    def dequantize(self) -> Tensor:
        """See Quantized."""
        ...


def pad_rows(values: np.ndarray, count: int) -> np.ndarray:
    """`count` rows: values [N, ...], and behind them zeros."""
    missing = count - len(values)
    return (
        np.concatenate((values, np.zeros((missing, *values.shape[1:]), values.dtype)))
        if missing
        else values
    )


def quantize(weight: Tensor, bits: int, group: int = GROUP, whole_zeros: bool = False) -> Quantized:
    """weight [N, K], K a multiple of `group`, rounded to the nearest code. 8 bits: symmetric, -127
    to 127 (as Q8_0). 4 bits: from the group's least value to its largest (as Q4_1), or where
    `whole_zeros` with a code that means zero (as AWQ). Scales are rounded to float16 first, so that
    codes are chosen for the scales they meet."""
    grouped = weight.float().unflatten(1, (-1, group))
    if bits == 8:
        scale = (grouped.abs().amax(-1) / 127).half().float()
        codes = _codes(grouped, scale, -127, 127).to(torch.int8)
        return Quantized(codes.flatten(1), scale)
    low = grouped.amin(-1)
    high = grouped.amax(-1)
    if whole_zeros:
        low = low.clamp(max=0)
        high = high.clamp(min=0)
    scale = ((high - low) / 15).half().float()
    minimum = low.half().float()
    if whole_zeros:
        minimum = torch.nan_to_num(low / scale).round() * scale
    codes = _codes(grouped - minimum[:, :, None], scale, 0, 15).to(torch.uint8)
    return Quantized(codes.flatten(1), scale, minimum)


def _codes(values: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    """A scale of zero has codes of zero."""
    return (
        torch.nan_to_num(values / scale[:, :, None], posinf=0, neginf=0)
        .round_()
        .clamp_(least, most)
    )
