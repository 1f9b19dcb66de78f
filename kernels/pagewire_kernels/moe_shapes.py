"""Launch shapes of a mixture of experts, by the number of rows and the kind of card. Everything
that is tuned by measurement is in the tables here (docs/performance.md has the measurements).

Grouped products are chosen by how many rows an expert has on average, so that models with many
small experts and with a few large ones share a table.
"""

import functools
from dataclasses import dataclass, replace
from typing import Final

import torch

from .capability import TRITON_TENSOR_CORES_FROM
from .shapes import Candidate, Choice

MAX_ROWS: Final = 8
"""Tokens up to which each pair of token and expert is a row by itself."""
MAX_SHARED: Final = 2
"""Beyond so many pairs for each expert, rows are grouped however few they are."""
LEAST_BLOCK: Final = 16


@dataclass(frozen=True)
class PairConfig:
    """Launch shape of a product of single rows. block_n: results a program; block_k: inner elements
    a step. early: the next kernel's programs are let in at once."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    early: bool = False


@dataclass(frozen=True)
class GroupedConfig:
    """Launch shape of a grouped product. block_m: rows of one expert a tile; block_n: results of
    each (with a gate: of either); block_k: inner elements a step. swap: results are the first
    dimension of the tensor cores' product, which has 64 at least."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool


@dataclass(frozen=True)
class GroupedPair:
    """Of the first product, gate and up, and of the second, whose block_m must be the same."""

    up: GroupedConfig
    down: GroupedConfig

    def __post_init__(self) -> None:
        if self.up.block_m != self.down.block_m:
            raise ValueError(
                f"the two products read the same tiles, which have {self.up.block_m} rows for one and {self.down.block_m} for the other"
            )


def swapped(block_m: int, block_k: int, stages: int) -> GroupedPair:
    """Both products with 64 results a tile."""
    config = GroupedConfig(block_m, 64, block_k, 4, stages, swap=True)
    return GroupedPair(config, config)


LARGE: Final = GroupedPair(
    GroupedConfig(128, 128, 64, 8, 4, swap=False), GroupedConfig(128, 128, 64, 8, 3, swap=False)
)
GROUPED: Final[dict[int, tuple[tuple[float, GroupedPair], ...]]] = {
    9: (
        (8, swapped(16, 128, 4)),
        (20, swapped(32, 128, 4)),
        (48, swapped(64, 64, 4)),
        (float("inf"), LARGE),
    ),
}
"""By the major compute capability: (most rows an expert on average, shapes)."""
SMALL_CARDS: Final[tuple[tuple[float, GroupedPair], ...]] = (
    (10, swapped(16, 64, 4)),
    (24, swapped(32, 64, 4)),
    (64, swapped(64, 64, 3)),
    (float("inf"), GroupedPair(*[GroupedConfig(128, 64, 32, 8, 3, swap=False)] * 2)),
)
"""On cards that GROUPED does not name."""
WITHOUT_TENSOR_CORES: Final[tuple[tuple[float, GroupedPair], ...]] = (
    (12, GroupedPair(*[GroupedConfig(16, 64, 32, 4, 3, swap=False)] * 2)),
    (float("inf"), GroupedPair(*[GroupedConfig(64, 64, 32, 8, 3, swap=False)] * 2)),
)
"""Of float32, and of cards without tensor cores: multiplications are laid out one by one, so that
larger tiles take long to compile."""


def device_class(device: torch.device) -> int:
    """The major compute capability; where nothing runs on a GPU, Hopper's."""
    return _capability(device) if device.type == "cuda" else 9


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def pick_up(k: int) -> PairConfig:
    """Of gate and up of single rows of size k."""
    if 1024 < k <= 2048:
        return PairConfig(1, 2048, 1, 1, early=True)
    if k <= 1024:
        return PairConfig(2, _divisor(k, 512), 1, 3, early=True)
    return PairConfig(4, _divisor(k, 1024), 4, 3)


def pick_down(k: int, top_k: int) -> PairConfig:
    """Of the second product of single rows, of size k for each of `top_k` experts: tiles of 8,192
    weights, whatever the number of experts they are of."""
    most = max(128, 2048 >> (top_k - 1).bit_length())
    return PairConfig(4, _divisor(k, most), 4, 2, early=True)


def _divisor(k: int, most: int) -> int:
    """The largest power of two up to `most` that divides k; where that is small, `most`, and the
    last step is filled up."""
    power = k & -k
    return min(most, power) if power >= 128 else most


def pick_grouped(rows_per_expert: float, dtype: torch.dtype, device: torch.device) -> GroupedPair:
    """Of grouped products with so many rows an expert on average."""
    major = device_class(device)
    table = GROUPED.get(major, SMALL_CARDS)
    if dtype == torch.float32 or major < TRITON_TENSOR_CORES_FROM[0]:
        table = WITHOUT_TENSOR_CORES
    return next(pair for most, pair in table if rows_per_expert <= most)


def shared_bytes(config: GroupedConfig, itemsize: int, gated: bool) -> int:
    """Of shared memory: weights and rows of the steps under way."""
    rows = config.block_n * (2 if gated else 1) + config.block_m
    return itemsize * config.stages * config.block_k * rows


@functools.cache
def choose(best: GroupedConfig, itemsize: int, gated: bool) -> Choice[GroupedConfig]:
    """`best`, then with fewer steps under way and fewer elements in each; block_m stays the same,
    since the tiles are made for it."""
    shapes = [
        replace(best, stages=stages, block_k=block_k, block_n=block_n)
        for block_n in dict.fromkeys((best.block_n, 64))
        for block_k in dict.fromkeys((best.block_k, 64, 32))
        for stages in dict.fromkeys((best.stages, 3, 2))
        if stages <= best.stages and block_k <= best.block_k and block_n <= best.block_n
    ]
    candidates = tuple(
        Candidate(shape, shared_bytes(shape, itemsize, gated)) for shape in dict.fromkeys(shapes)
    )
    return Choice(
        f"grouped product of experts ({best.block_m} x {best.block_n} x {best.block_k}, {itemsize} bytes an element)",
        candidates,
    )
