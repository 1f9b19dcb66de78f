"""Which products with matrices of 4 bits go to the kernel for Hopper GPUs
(gemm_quantized_hopper.py), and how they are shared out among multiprocessors. The numbers were
measured on an H200 (docs/performance.md)."""

import functools
from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from .packed_matrix import PackedMatrix
from .quantized_decode import INT4

LEAST_ROWS: Final = 65
"""Of x, for which this kernel is faster than the one of gemm_quantized.py."""
MOST_ROWS: Final = 4096
"""Above, decoding once costs less, whatever the matrix is copied to."""
MINOR: Final = ("3.6",)
"""Releases of Triton whose Gluon this is written in."""
GROUP_ROWS: Final = 64
"""Weight rows of a group of warps."""
STEP_COLUMNS: Final = 64
"""Inputs of a step."""
NARROW_TILE: Final = (128, 4)
"""Rows of x of a tile, and groups of warps."""
WIDE_TILE: Final = (256, 2)
MOST_SPLITS: Final = 8
LEAST_STEPS: Final = 8
"""Of a split."""
SPLITTING: Final = 0.15
"""What it costs to cut each tile into splits, in the time of a tile."""
CUTTING: Final = 0.35
"""What it costs to cut the last tiles, in the time of a tile."""
NARROW: Final = 1.28
"""Time of a tile of 128 rows of x and 256 weight rows, in that of one of 256 and 128."""


def takes(x: Tensor, matrix: PackedMatrix) -> bool:
    """Whether this kernel has such a product, and is the fastest for it."""
    return matrix.form == INT4 and takes_inputs(x)


def takes_inputs(x: Tensor) -> bool:
    """Whether x [M, K] may be an input. Its rows must begin at multiples of 16 bytes, as the copy
    engine wants them."""
    rows, columns = x.shape
    return (
        LEAST_ROWS <= rows <= MOST_ROWS
        and x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16)
        and columns % STEP_COLUMNS == 0
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        and _is_built_for(x.device)
    )


@functools.cache
def _is_built_for(device: torch.device) -> bool:
    known = any(triton.__version__.startswith(f"{minor}.") for minor in MINOR)
    return known and torch.cuda.get_device_capability(device) == (9, 0)


@dataclass(frozen=True)
class HopperPlan:
    """How a product is shared out. rows: of x in a tile; groups: of warps, with 64 weight rows
    each; splits: of a tile, a power of two, or 1: the last tiles are cut into equal ranges, or 0:
    none is cut; span: steps of a split; whole: tiles that each program takes before the rest is
    cut; programs: at most one for each multiprocessor."""

    rows: int
    groups: int
    splits: int
    span: int
    whole: int
    programs: int

    @property
    def stages(self) -> int:
        """Steps of x in shared memory: 128 KiB."""
        return 1024 // self.rows


def plan(rows: int, padded: int, columns: int, multiprocessors: int) -> HopperPlan:
    """For `rows` rows of x and a matrix [padded, columns]."""
    narrow, narrow_time = _plan_tiles(rows, padded, columns, multiprocessors, *NARROW_TILE)
    if rows <= NARROW_TILE[0]:
        return narrow
    wide, time = _plan_tiles(rows, padded, columns, multiprocessors, *WIDE_TILE)
    return narrow if narrow_time * NARROW < time else wide


def _plan_tiles(
    rows: int, padded: int, columns: int, multiprocessors: int, block: int, groups: int
) -> tuple[HopperPlan, float]:
    """With tiles of `block` rows of x and 64 * groups weight rows; and its time, in that of a tile.
    Programs wait for each other, so all of them must have a multiprocessor at once."""
    tiles = _ceil(rows, block) * _ceil(padded, groups * GROUP_ROWS)
    steps = columns // STEP_COLUMNS
    if 2 * tiles <= multiprocessors and steps >= 2 * LEAST_STEPS:
        splits = (
            1 << min(multiprocessors // tiles, steps // LEAST_STEPS, MOST_SPLITS).bit_length() - 1
        )
        while (splits - 1) * _ceil(steps, splits) >= steps:
            splits //= 2
        if splits > 1:
            span = _ceil(steps, splits)
            return HopperPlan(
                block, groups, splits, span, 0, tiles * splits
            ), span / steps + SPLITTING
    rounds = _ceil(tiles, multiprocessors)
    if tiles > multiprocessors and rounds - tiles / multiprocessors > CUTTING:
        whole = tiles // multiprocessors - 1
        time = tiles / multiprocessors + CUTTING
        return HopperPlan(block, groups, 1, steps, whole, multiprocessors), time
    return HopperPlan(block, groups, 0, steps, 0, min(tiles, multiprocessors)), rounds


def _ceil(count: int, of: int) -> int:
    return -(-count // of)
