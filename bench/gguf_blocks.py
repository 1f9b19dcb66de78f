"""Random blocks of ggml's quantized types, for `gguf_model.py`: uniform codes, with scales such
that the weights have a mean of 0 and a standard deviation of 0.02. Layouts: ggml's ggml-common.h.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from byte_pool import Pool
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

DEVIATION: Final = 0.02
"""Standard deviation of the dequantized weights."""
POOL_BLOCKS: Final = {32: 999_983, 256: 199_999}
"""By the values of a block, how many blocks a pool has (18 to 42 MB). They are primes: rows are
multiples of other numbers of blocks, so no two of as many rows begin at the same one."""


def random_blocks(kind: Type, count: int, random: np.random.Generator) -> np.ndarray:
    """[count, bytes of a block] uint8: uniform codes, scales such that the weights have a mean of 0
    and DEVIATION."""
    _, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (count, size), np.uint8)
    _SET_SCALES[kind](blocks, random)
    return blocks


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def _put_half(blocks: np.ndarray, at: int, values: np.ndarray) -> None:
    """Writes [blocks] as float16 at a byte of each block."""
    blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _scales(count: int, rms_of_codes: float, random: np.random.Generator) -> np.ndarray:
    """[count] float64: blocks of a matrix differ a little."""
    return DEVIATION / rms_of_codes * random.uniform(0.8, 1.2, count)


def _signs(shape: int | tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """-1 or 1: codes go from -n to n - 1, and signs keep the mean of the weights at 0."""
    return random.choice(np.array([-1, 1], np.int8), size=shape)


def _set_scale(first_code: int) -> Callable[[np.ndarray, np.random.Generator], None]:
    """For types of one scale at the beginning, with codes from `first_code` to -first_code - 1."""

    def set_scales(blocks: np.ndarray, random: np.random.Generator) -> None:
        codes = np.arange(first_code, -first_code)
        count = len(blocks)
        _put_half(blocks, 0, _scales(count, _rms(codes), random) * _signs(count, random))

    return set_scales


def _set_k_scales(codes: int) -> Callable[[np.ndarray, np.random.Generator], None]:
    """For Q4_K and Q5_K, with `codes` codes from 0: each group's minimum is its scale times half of
    the highest code."""
    middle = (codes - 1) / 2

    def set_scales(blocks: np.ndarray, random: np.random.Generator) -> None:
        groups = random.integers(32, 64, (len(blocks), 8), np.uint8)
        scales = _scales(len(blocks), _rms(groups) * _rms(np.arange(codes) - middle), random)
        _put_half(blocks, 0, scales)
        _put_half(blocks, 2, scales * middle)
        # Twelve bytes hold 6 bits of each group's scale and of its minimum, here the same number.
        first = groups[:, :4]
        last = groups[:, 4:]
        blocks[:, 4:8] = blocks[:, 8:12] = first | last >> 4 << 6
        blocks[:, 12:16] = last & 15 | last << 4

    return set_scales


def _set_q6_k_scales(blocks: np.ndarray, random: np.random.Generator) -> None:
    shape = (len(blocks), 16)
    groups = random.integers(64, 128, shape, np.int8) * _signs(shape, random)
    blocks[:, 192:208] = groups.view(np.uint8)
    _put_half(blocks, 208, _scales(len(blocks), _rms(groups) * _rms(np.arange(-32, 32)), random))


_SET_SCALES: Final = {
    Type.Q4_0: _set_scale(-8),
    Type.Q8_0: _set_scale(-128),
    Type.Q4_K: _set_k_scales(16),
    Type.Q5_K: _set_k_scales(32),
    Type.Q6_K: _set_q6_k_scales,
}


def pool_of(kind: Type) -> Pool:
    """Random blocks of one type."""
    block, _ = GGML_QUANT_SIZES[kind]
    blocks = random_blocks(kind, POOL_BLOCKS[block], np.random.default_rng(int(kind)))
    return Pool(blocks.reshape(-1).data)
