"""Blocks of GGUF's types taken apart into codes, scales and minima, without loss. Knows no files.

Codes stay in their blocks until they are packed: a model's are too many to be held twice, or to be
moved more often than once. For a GPU blocks are moved there, and taken apart by it. Layouts:
ggml's ggml-common.h (block_q4_0 to block_q6_K, block_iq4_nl and block_iq4_xs). Other types with
lookup tables, and those of less than 4 bits, are not among them.
"""

import warnings
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from pagewire_kernels.lookup_tables import IQ4
from pagewire_kernels.quantized import Quantized, pad_rows
from torch import Tensor

Bytes = np.ndarray
"""uint8 [blocks, bytes of a block]."""
Fields = Any
"""uint8 [bytes of a block, ...], of NumPy or a Tensor: what takes them apart is written for both."""
Scales = tuple[np.ndarray, np.ndarray | None]
"""Scales and minima [blocks, groups] float32."""


def _half(data: Bytes, at: int) -> np.ndarray:
    """[blocks, 1] float32: the float16 at a byte of each block. All blocks have an even number of
    bytes."""
    found = data.view(np.float16)[:, at // 2, None]
    return torch.from_numpy(np.ascontiguousarray(found)).float().numpy()


def _joined(parts: tuple[Fields, ...], axis: int = 0) -> Fields:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, axis)
    return np.concatenate(parts, axis)


def _signed(codes: Fields) -> Fields:
    """The same bytes as int8."""
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


def _one_scale(data: Bytes) -> Scales:
    return _half(data, 0), None


def _scale_and_minimum(data: Bytes) -> Scales:
    return _half(data, 0), _half(data, 2)


def _scale_from_8(data: Bytes) -> Scales:
    scale = _half(data, 0)
    return scale, -8 * scale


def _k_scales(data: Bytes) -> Scales:
    """Of a type with superblocks: two float16, times 6-bit numbers packed in 12 bytes."""
    packed = data[:, 4:16]
    low = packed[:, :4]
    middle = packed[:, 4:8]
    high = packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], -1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], -1)
    return _half(data, 0) * scales, -(_half(data, 2) * minima)


def _q6_k_scales(data: Bytes) -> Scales:
    return _half(data, 208) * np.ascontiguousarray(data[:, 192:208]).view(np.int8), None


def _iq4_xs(data: Fields) -> Fields:
    """Eight groups of 16 bytes, of each the low halves, then the high ones."""
    parts = data[8:].reshape(8, 1, 16, *data.shape[1:])
    return _joined((parts & 15, parts >> 4), 1).reshape(256, *data.shape[1:])


def _iq4_xs_scales(data: Bytes) -> Scales:
    """A float16 times numbers of 6 bits less 32: 4 bits in bytes, 2 more in a word before them."""
    high = np.ascontiguousarray(data[:, 2:4]).view(np.uint16)
    high = high >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack((data[:, 4:8] & 15, data[:, 4:8] >> 4), -1).reshape(-1, 8)
    scales = (low | high.astype(np.uint8) << 4).astype(np.int8) - np.int8(32)
    return _half(data, 0) * scales, None


class Layout(NamedTuple):
    """values: of a block. codes: uint8 of 4 bits or int8, [values, ...]. table: what codes stand
    for, None: themselves."""

    values: int
    dtype: torch.dtype
    codes: Callable[[Fields], Fields]
    scales: Callable[[Bytes], Scales]
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

    def on(self, device: torch.device | str) -> Tensor:
        """See pagewire_kernels.quantized.Stored."""
        with warnings.catch_warnings():
            # the file is mapped for reading, and only read
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            data = torch.from_numpy(self._data).to(device)
        codes = self._layout.codes(data.movedim(2, 0))
        return codes.movedim(0, 2).reshape(self.shape)

    def columns(self, start: int, length: int) -> "Blocks | None":
        """See pagewire_kernels.quantized.Stored."""
        values = self._layout.values
        if start % values or length % values:
            return None
        blocks = slice(start // values, (start + length) // values)
        return Blocks(self._layout, self._data[:, blocks])

    def __getitem__(self, rows: Tensor) -> "Blocks":
        return Blocks(self._layout, self._data[rows.numpy()])


def take_apart(type_name: str, rows: np.ndarray, block_bytes: int) -> Quantized:
    """rows [N, bytes] uint8 of a matrix of this type -> [N, K]. Equal to the `gguf` library's
    dequantization, bit for bit."""
    layout = TYPES[type_name]
    count = len(rows)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values.reshape(count, -1)))

    scale, minimum = layout.scales(rows.reshape(-1, block_bytes))
    blocks = Blocks(layout, rows.reshape(count, -1, block_bytes))
    table = None if layout.table is None else torch.tensor(layout.table, dtype=torch.float32)
    return Quantized(
        blocks, tensor(scale), None if minimum is None else tensor(minimum), table=table
    )
