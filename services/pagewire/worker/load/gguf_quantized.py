"""Blocks of GGUF's types taken apart into codes, scales and minima, without loss. Knows no files.

Layouts: ggml's ggml-common.h (block_q4_0 to block_q6_K). Types with lookup tables, and those of
less than 4 bits, are not among them.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from pagewire_kernels.quantized import Quantized

Bytes = np.ndarray
"""uint8 [blocks, bytes of a block]."""
Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Codes [blocks, values], uint8 of 4 bits or int8; scales and minima [blocks, groups] float32."""


def _halves(data: Bytes) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _nibbles(data: Bytes) -> np.ndarray:
    """All low halves, then all high ones."""
    return np.concatenate([data & 15, data >> 4], -1)


def _fifth_bits(data: Bytes) -> np.ndarray:
    """[blocks, 4] bytes to [blocks, 32] of 0 or 16."""
    return np.unpackbits(data, axis=-1, bitorder="little") << 4


def _q4_0(data: Bytes) -> Parts:
    scale = _halves(data[:, :2])
    return _nibbles(data[:, 2:]), scale, -8 * scale


def _q4_1(data: Bytes) -> Parts:
    return _nibbles(data[:, 4:]), _halves(data[:, :2]), _halves(data[:, 2:4])


def _q5_0(data: Bytes) -> Parts:
    codes = _nibbles(data[:, 6:]) | _fifth_bits(data[:, 2:6])
    return codes.view(np.int8) - np.int8(16), _halves(data[:, :2]), None


def _q5_1(data: Bytes) -> Parts:
    codes = _nibbles(data[:, 8:]) | _fifth_bits(data[:, 4:8])
    return codes.view(np.int8), _halves(data[:, :2]), _halves(data[:, 2:4])


def _q8_0(data: Bytes) -> Parts:
    return np.ascontiguousarray(data[:, 2:]).view(np.int8), _halves(data[:, :2]), None


def _k_scales(data: Bytes) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima [blocks, 8] float32 of a type with superblocks: two float16, times 6-bit
    numbers packed in 12 bytes."""
    packed = data[:, 4:16]
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], -1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], -1)
    return _halves(data[:, :2]) * scales, -(_halves(data[:, 2:4]) * minima)


def _k_nibbles(data: Bytes) -> np.ndarray:
    """128 bytes to 256 values: of each 32 bytes the low halves, then the high ones."""
    return _nibbles(data.reshape(len(data), 4, 32)).reshape(len(data), 256)


def _q4_k(data: Bytes) -> Parts:
    return _k_nibbles(data[:, 16:]), *_k_scales(data)


def _q5_k(data: Bytes) -> Parts:
    bits = data[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = _k_nibbles(data[:, 48:]) | bits.reshape(len(data), 256) << 4
    return codes.view(np.int8), *_k_scales(data)


def _q6_k(data: Bytes) -> Parts:
    low = _nibbles(data[:, :128].reshape(len(data), 2, 64))
    high = (
        data[:, 128:192].reshape(len(data), 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        & 3
    )
    codes = low | high.reshape(len(data), 2, 128) << 4
    scales = np.ascontiguousarray(data[:, 192:208]).view(np.int8)
    return (
        codes.reshape(len(data), 256).view(np.int8) - np.int8(32),
        _halves(data[:, 208:]) * scales,
        None,
    )


TYPES: Final[dict[str, Callable[[Bytes], Parts]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""By ggml's names."""


def take_apart(kind: str, rows: np.ndarray, block_bytes: int) -> Quantized:
    """rows [N, bytes] uint8 of a matrix of type `kind` -> [N, K]. Equal to the `gguf` library's
    dequantization, bit for bit."""
    count = len(rows)
    codes, scale, minimum = TYPES[kind](np.ascontiguousarray(rows).reshape(-1, block_bytes))

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values.reshape(count, -1)))

    return Quantized(tensor(codes), tensor(scale), None if minimum is None else tensor(minimum))
