"""Launch shapes of decode attention: by the number of programs, by the size of a cache's elements,
and by the shared memory that a GPU has for them. Launches nothing."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from .shapes import Candidate, Choice, elements


@dataclass(frozen=True)
class DecodeConfig:
    """Launch shape. block_n: tokens a tile; chunk: least tokens a split; splits: most splits of a
    request."""

    block_n: int
    warps: int
    stages: int
    chunk: int
    splits: int


@dataclass(frozen=True)
class FewConfig:
    """Launch shape of attention_decode_few. first_n: tokens of the first tile, which is read ahead,
    and of the least split; block_n: of the tiles behind it; splits: most splits of a request."""

    first_n: int
    block_n: int
    warps: int
    stages: int
    splits: int


FEW: Final = 8
"""Programs (rows * KV heads) up to which latency counts."""
_FEW: Final = FewConfig(32, 64, 2, 2, 32)
_FEW_NORMED: Final = FewConfig(64, 64, 2, 2, 32)
"""With QK-norm. First tiles were chosen in chains of layers on an H200; tiles of 64 behind one of 32
are not measured yet (docs/performance.md). With heads of 128 in 16 bits both have 39 KiB of shared
memory, which every GPU has."""
_TABLE: Final = (
    (16, DecodeConfig(64, 2, 3, 64, 32)),
    (64, DecodeConfig(32, 2, 4, 128, 16)),
    (128, DecodeConfig(32, 2, 4, 256, 16)),
    (256, DecodeConfig(64, 2, 3, 1024, 8)),
    (1024, DecodeConfig(32, 2, 4, 1024, 4)),
    (4096, DecodeConfig(32, 1, 2, 2048, 2)),
)
"""Up to so many programs (rows * KV heads); measured on an H200 (docs/performance.md)."""
_BEYOND: Final = DecodeConfig(32, 1, 2, 2048, 1)
_TABLE_OF_BYTES: Final = (
    (16, DecodeConfig(64, 2, 3, 64, 32)),
    (64, DecodeConfig(64, 2, 4, 128, 16)),
    (128, DecodeConfig(64, 2, 4, 256, 16)),
    (256, DecodeConfig(64, 2, 4, 1024, 8)),
    (1024, DecodeConfig(64, 2, 4, 1024, 4)),
    (4096, DecodeConfig(64, 2, 3, 2048, 2)),
)
"""The same of caches of 8-bit codes, where a tile of as many tokens has half the bytes. Not
measured yet: tests/worker/gpu_kv_fp8.py times others beside these."""
_BEYOND_OF_BYTES: Final = DecodeConfig(64, 2, 3, 2048, 1)
MARGIN: Final = 512
"""Bytes, for reductions across warps."""


@functools.cache
def pick_config(head_dim: int, group: int, programs: int, kv_itemsize: int) -> DecodeConfig:
    """The best launch shape for `programs` = rows * KV heads of `group` query heads, on a GPU that
    has the shared memory for it. kv_itemsize: bytes of an element of the caches."""
    table, beyond = (_TABLE_OF_BYTES, _BEYOND_OF_BYTES) if kv_itemsize == 1 else (_TABLE, _BEYOND)
    config = next((config for limit, config in table if programs <= limit), beyond)
    if head_dim > 128:
        return replace(config, block_n=32, warps=2, stages=4)
    return config if group <= 16 else replace(config, warps=max(2, config.warps))


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def shared_bytes(
    config: DecodeConfig, head_dim: int, group: int, itemsize: int, kv_itemsize: int
) -> int:
    """Of shared memory, on every target: the tiles of keys and values that are under way, the
    queries, and the weights of a tile."""
    rows = max(16, _power_of_2(group))
    width = _power_of_2(head_dim)
    tiles = 2 * (config.stages - 1) * config.block_n
    queries = rows * width + rows * config.block_n
    return kv_itemsize * tiles * width + itemsize * queries + MARGIN


def _ladder(best: DecodeConfig) -> Iterator[DecodeConfig]:
    """`best`, then with fewer tiles under way, then with smaller ones. How a row is split stays as
    it is: the workspace depends on it."""
    yield from (replace(best, stages=stages) for stages in range(best.stages, 1, -1))
    yield from (
        replace(best, block_n=block_n, stages=2) for block_n in (32, 16) if block_n < best.block_n
    )


@functools.cache
def _choice(
    best: DecodeConfig, head_dim: int, group: int, itemsize: int, kv_itemsize: int
) -> Choice[DecodeConfig]:
    shapes = tuple(
        Candidate(config, shared_bytes(config, head_dim, group, itemsize, kv_itemsize))
        for config in _ladder(best)
    )
    return Choice(f"decode attention ({elements(head_dim, itemsize, kv_itemsize)})", shapes)


def choose(
    head_dim: int, group: int, programs: int, itemsize: int, kv_itemsize: int
) -> Choice[DecodeConfig]:
    """The launch shapes for elements of queries and of caches of so many bytes; all of them have
    the same splits."""
    best = pick_config(head_dim, group, programs, kv_itemsize)
    return _choice(best, head_dim, group, itemsize, kv_itemsize)


def pick_few(
    head_dim: int, group: int, programs: int, itemsize: int, kv_itemsize: int, normed: bool
) -> FewConfig | None:
    """The launch shape of attention_decode_few; None where it does not serve: for many programs,
    and for sizes whose tiles do not fit the registers. normed: with QK-norm."""
    fits = head_dim <= 128 and group < 16 and itemsize == kv_itemsize == 2
    if programs > FEW or not fits:
        return None
    return _FEW_NORMED if normed else _FEW
