"""Blocks of GGUF's types taken apart into codes, scales and minima, without loss. Knows no files.

Codes stay in their blocks until they are packed: a model's are too many to be held twice, or to be
moved more often than once. For a GPU blocks are moved there, and taken apart by it, scales too:
mixtures have thousands of matrices, and NumPy would take most of their start. Layouts:
ggml's ggml-common.h (block_q4_0 to block_q6_K, block_iq4_nl and block_iq4_xs). Other types with
lookup tables, and those of less than 4 bits, are not among them.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from pagewire_kernels.lookup_tables import IQ4
from pagewire_kernels.quantized import Quantized, pad_rows
from torch import Tensor

Fields = Any
"""uint8, of NumPy or a Tensor: what takes blocks apart is written for both. Codes are made from
[bytes of a block, ...], scales from [blocks, bytes of a block]."""
Scales = tuple[Fields, Fields | None]
"""Scales and minima [blocks, groups] float32."""


def _half(data: Fields, at: int) -> Fields:
    """[blocks, 1] float32: the float16 at a byte of each block. All blocks have an even number of
    bytes."""
    if isinstance(data, Tensor):
        return data[:, at : at + 2].contiguous().view(torch.float16).float()
    found = data.view(np.float16)[:, at // 2, None]
    # torch's conversion is several times as fast as NumPy's
    return torch.from_numpy(np.ascontiguousarray(found)).float().numpy()


def _joined(parts: tuple[Fields, ...], axis: int = 0) -> Fields:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, axis)
    return np.concatenate(parts, axis)


def _signed(codes: Fields) -> Fields:
    """The same bytes as int8; scales times them are float32."""
    return codes.view(torch.int8 if isinstance(codes, Tensor) else np.int8)


def _nibbles(data: Fields) -> Fields:
    """All low halves, then all high ones."""
    return _joined((data & 15, data >> 4))


def _bits(data: Fields, step: int, mask: int) -> Fields:
    """[n, ...] to [8 / step, n, ...]: the lowest `step` bits of all bytes, then the next."""
    return _joined(tuple((data >> shift & mask)[None] for shift in range(0, 8, step)))


def _fifth_bits(data: Fields) -> Fields:
    """[4, ...] bytes to [32, ...] of 0 or 16."""
    return _bits(data, 1, 1).swapaxes(0, 1).reshape(32, *data.shape[1:]) << 4


def _k_nibbles(data: Fields) -> Fields:
    """128 bytes to 256 values: of each 32 bytes the low halves, then the high ones."""
    parts = data.reshape(4, 1, 32, *data.shape[1:])
    return _joined((parts & 15, parts >> 4), 1).reshape(256, *data.shape[1:])


def _q5_k(data: Fields) -> Fields:
    codes = _k_nibbles(data[48:])
    codes |= _bits(data[16:48], 1, 1).reshape(codes.shape) << 4
    return _signed(codes)


def _q6_k(data: Fields) -> Fields:
    low = data[:128].reshape(2, 64, *data.shape[1:])
    rest = data.shape[1:]
    codes = _joined((low & 15, low >> 4), 1).reshape(256, *rest)
    high = _bits(data[128:192].reshape(2, 32, *rest), 2, 3).swapaxes(0, 1)
    codes |= high.reshape(256, *rest) << 4
    return _signed(codes) - 32


def _one_scale(data: Fields) -> Scales:
    return _half(data, 0), None


def _scale_and_minimum(data: Fields) -> Scales:
    return _half(data, 0), _half(data, 2)


def _scale_from_8(data: Fields) -> Scales:
    scale = _half(data, 0)
    return scale, -8 * scale


def _k_scales(data: Fields) -> Scales:
    """Of a type with superblocks: two float16, times 6-bit numbers packed in 12 bytes."""
    low = data[:, 4:8]
    middle = data[:, 8:12]
    high = data[:, 12:16]
    scales = _joined((low & 63, (high & 15) | (low >> 6 << 4)), -1)
    minima = _joined((middle & 63, (high >> 4) | (middle >> 6 << 4)), -1)
    return _half(data, 0) * scales, -(_half(data, 2) * minima)


def _q6_k_scales(data: Fields) -> Scales:
    return _half(data, 208) * _signed(data[:, 192:208]), None


def _iq4_xs(data: Fields) -> Fields:
    """Eight groups of 16 bytes, of each the low halves, then the high ones."""
    parts = data[8:].reshape(8, 1, 16, *data.shape[1:])
    return _joined((parts & 15, parts >> 4), 1).reshape(256, *data.shape[1:])


def _iq4_xs_scales(data: Fields) -> Scales:
    """A float16 times numbers of 6 bits less 32: 4 bits in bytes, 2 more in the two bytes before
    them."""
    low = _interleaved(data[:, 4:8] & 15, data[:, 4:8] >> 4)
    high = _interleaved(*(data[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)))
    return _half(data, 0) * (_signed(low | high << 4) - 32), None


def _interleaved(*parts: Fields) -> Fields:
    """The first column of each, then the second of each."""
    rows = len(parts[0])
    return _joined(tuple(part[:, :, None] for part in parts), 2).reshape(rows, -1)


class Layout(NamedTuple):
    """values: of a block. codes: uint8 of 4 bits or int8, [values, ...]. table: what codes stand
    for, None: themselves."""

    values: int
    dtype: torch.dtype
    codes: Callable[[Fields], Fields]
    scales: Callable[[Fields], Scales]
    table: tuple[int, ...] | None = None


TYPES: Final[dict[str, Layout]] = {
    "Q4_0": Layout(32, torch.uint8, lambda data: _nibbles(data[2:]), _scale_from_8),
    "Q4_1": Layout(32, torch.uint8, lambda data: _nibbles(data[4:]), _scale_and_minimum),
    "Q5_0": Layout(
        32,
        torch.int8,
        lambda data: _signed(_nibbles(data[6:]) | _fifth_bits(data[2:6])) - 16,
        _one_scale,
    ),
    "Q5_1": Layout(
        32,
        torch.int8,
        lambda data: _signed(_nibbles(data[8:]) | _fifth_bits(data[4:8])),
        _scale_and_minimum,
    ),
    "Q8_0": Layout(32, torch.int8, lambda data: _signed(data[2:]), _one_scale),
    "Q4_K": Layout(256, torch.uint8, lambda data: _k_nibbles(data[16:]), _k_scales),
    "Q5_K": Layout(256, torch.int8, _q5_k, _k_scales),
    "Q6_K": Layout(256, torch.int8, _q6_k, _q6_k_scales),
    "IQ4_NL": Layout(32, torch.uint8, lambda data: _nibbles(data[2:]), _one_scale, IQ4),
    "IQ4_XS": Layout(256, torch.uint8, _iq4_xs, _iq4_xs_scales, IQ4),
}
"""By ggml's names."""


class Blocks:
    """The codes of a matrix as a file has them: data [N, blocks of a row, bytes of a block] uint8.
    A pagewire_kernels.quantized.Stored."""

    def __init__(self, layout: Layout, data: np.ndarray) -> None:
        self._layout, self._data = layout, data
        self.dtype = layout.dtype
        self.shape = torch.Size((len(data), data.shape[1] * layout.values))

    def by_place(self, first: int, last: int, lanes: int) -> np.ndarray:
        """See pagewire_kernels.quantized.Stored."""
        rows = pad_rows(self._data[first:last], last - first)
        return self._layout.codes(
            np.ascontiguousarray(rows.reshape(-1, lanes, *rows.shape[1:]).transpose(3, 0, 2, 1))
        )

    def whole(self) -> Tensor:
        """See pagewire_kernels.quantized.Stored."""
        return _codes(self._layout, _tensor(self._data))

    def columns(self, start: int, length: int) -> "Blocks | None":
        """See pagewire_kernels.quantized.Stored."""
        blocks = _whole_blocks(self._layout, start, length)
        return None if blocks is None else Blocks(self._layout, self._data[:, blocks])

    def __getitem__(self, rows: Tensor) -> "Blocks":
        return Blocks(self._layout, self._data[rows.numpy()])


class InFile:
    """A matrix in the blocks of a file: data [N, blocks of a row, bytes of a block] uint8. A
    pagewire_kernels.quantized.StoredMatrix."""

    ndim = 2

    def __init__(self, layout: Layout, data: np.ndarray) -> None:
        self._layout, self._data = layout, data
        self.shape = torch.Size((len(data), data.shape[1] * layout.values))

    def take(self, rows: Tensor | Sequence[int]) -> "InFile":
        """See pagewire_kernels.quantized.StoredMatrix."""
        return InFile(self._layout, self._data[np.asarray(rows)])

    def narrow(self, dim: int, start: int, length: int) -> "InFile | Quantized":
        """See pagewire_kernels.quantized.StoredMatrix."""
        if dim == 0:
            return InFile(self._layout, self._data[start : start + length])
        blocks = _whole_blocks(self._layout, start, length)
        if blocks is None:
            return self.to("cpu").narrow(dim, start, length)
        return InFile(self._layout, self._data[:, blocks])

    def to(self, device: torch.device | str) -> Quantized:
        """See pagewire_kernels.quantized.StoredMatrix."""
        target = torch.device(device)
        if target.type != "cpu":
            return taken_apart(self._layout, _tensor(self._data).to(target))
        scale, minimum = self._layout.scales(
            np.ascontiguousarray(self._data).reshape(-1, self._data.shape[2])
        )
        return Quantized(
            Blocks(self._layout, self._data),
            self._by_row(scale),
            None if minimum is None else self._by_row(minimum),
            table=_table(self._layout, target),
        )

    def _by_row(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values.reshape(len(self._data), -1)))

    def dequantize(self) -> Tensor:
        """See pagewire_kernels.quantized.StoredMatrix."""
        return self.to("cpu").dequantize()


def taken_apart(layout: Layout, data: Tensor) -> Quantized:
    """data [N, blocks of a row, bytes of a block] uint8 -> [N, K], on its device."""
    rows = len(data)
    scale, minimum = layout.scales(data.view(-1, data.shape[2]))
    return Quantized(
        _codes(layout, data),
        scale.view(rows, -1),
        None if minimum is None else minimum.view(rows, -1),
        table=_table(layout, data.device),
    )


def _table(layout: Layout, device: torch.device) -> Tensor | None:
    if layout.table is None:
        return None
    return torch.tensor(layout.table, dtype=torch.float32, device=device)


def _codes(layout: Layout, data: Tensor) -> Tensor:
    """Blocks [N, blocks of a row, bytes of a block] -> [N, K], on their device."""
    return layout.codes(data.movedim(2, 0)).movedim(0, 2).reshape(len(data), -1)


def _tensor(data: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # the file is mapped for reading, and only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(data))


def _whole_blocks(layout: Layout, start: int, length: int) -> slice | None:
    """The blocks of these inputs; None where they are no whole ones."""
    values = layout.values
    if start % values or length % values:
        return None
    return slice(start // values, (start + length) // values)


def in_file(type_name: str, rows: np.ndarray, block_bytes: int) -> InFile:
    """rows [N, bytes] uint8 of a matrix of this type [N, K]. What it is taken apart into is equal to
    the `gguf` library's dequantization, bit for bit."""
    return InFile(TYPES[type_name], rows.reshape(len(rows), -1, block_bytes))
