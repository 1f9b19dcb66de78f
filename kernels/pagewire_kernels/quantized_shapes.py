"""Launch shapes of products with quantized matrices (gemm_quantized.py), by their sizes."""

import functools
from dataclasses import dataclass, replace

import torch

from .lookup_tables import ROW_TABLES
from .packed_matrix import PackedMatrix
from .quantized_decode import EIGHT_BITS
from .shapes import Candidate, Choice


@dataclass(frozen=True)
class QuantizedConfig:
    """Launch shape. block_m: rows of x a program; block_n: weight rows, a multiple of TILE;
    block_k: inner elements a step; splits: programs sharing a result. late: scales are applied to
    sums where they can be, instead of to weights. registers: the most a thread may have."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int
    late: bool = True
    registers: int | None = None


def block_k_of(k: int) -> int:
    return 128 if k % 128 == 0 else 64


def pick_config(rows: int, matrix: PackedMatrix, dtype: torch.dtype) -> QuantizedConfig:
    """The launch shape; measured on an H100 (docs/performance.md). Splits give small matrices
    enough programs, some two for each multiprocessor."""
    n = matrix.padded
    k = matrix.shape[1]
    block_k = block_k_of(k)
    if dtype == torch.float32:
        return QuantizedConfig(16, 64, 64, _splits(256, n, 64, k), 4, 2)
    four_bits = matrix.form not in EIGHT_BITS
    late = four_bits and matrix.scales_late(block_k)
    if rows > 64:
        if late and matrix.table is not None:
            return _many_rows_late(rows, n, k)
        return _many_rows(rows, n, k, block_k)
    if late or matrix.form == ROW_TABLES:
        # which are read once a program: so there are few of them
        return _few_rows_late(rows, n, k, block_k, matrix.table is not None)
    return _few_rows(rows, n, k, block_k, four_bits)


def _few_rows_late(rows: int, n: int, k: int, block_k: int, tables: bool) -> QuantizedConfig:
    """4 bits with whole zero points, or tables, whose registers leave larger tiles none: sums are
    scaled while rows are few."""
    if rows <= 32:
        block_n = 128 if n > 4096 or k > 8192 else 64
        stages = 4 if rows <= 16 else 3
        return QuantizedConfig(
            16 if rows <= 16 else 32, block_n, block_k, _splits(256, n, block_n, k), 4, stages
        )
    block_n = 64 if tables else 128
    programs = 256 if k > 8192 or tables else 160
    return QuantizedConfig(64, block_n, block_k, _splits(programs, n, block_n, k), 4, 3)


def _few_rows(rows: int, n: int, k: int, block_k: int, four_bits: bool) -> QuantizedConfig:
    """8 bits, and 4 bits whose weights are scaled one by one."""
    large = n >= 16384
    if rows <= 16 and not four_bits and k % 256 == 0:
        return QuantizedConfig(16, 64, 256, _splits(256, n, 64, k), 4, 3)
    if rows <= 32:
        programs = 800 if four_bits else 256
        stages = 3 if large or four_bits or rows > 16 else 4
        return QuantizedConfig(
            16 if rows <= 16 else 32, 64, block_k, _splits(programs, n, 64, k), 4, stages
        )
    block_n = 128 if large else 64
    return QuantizedConfig(64, block_n, block_k, _splits(400, n, block_n, k), 4, 3)


def _many_rows(rows: int, n: int, k: int, block_k: int) -> QuantizedConfig:
    """Some hundreds. Sums stay in one set of registers, so that several programs of a small tile,
    or two of a large one, share a multiprocessor: one decodes while another multiplies."""
    row_tiles = -(-rows // 128)
    if n >= 16384:
        return QuantizedConfig(128, 128, 64, 1, 8, 3, late=False)
    if row_tiles == 1:
        return QuantizedConfig(128, 64, block_k, _splits(256, n, 64, k), 4, 3, late=False)
    if k > 8192 and row_tiles > 2:
        return QuantizedConfig(128, 128, 64, _splits(256 // row_tiles, n, 128, k), 8, 3, late=False)
    return QuantizedConfig(128, 64, 64, _splits(384 // row_tiles, n, 64, k), 4, 4, late=False)


def _many_rows_late(rows: int, n: int, k: int) -> QuantizedConfig:
    """Some hundreds, with tables that are rounded: sums are scaled at any number of rows, in a
    second set of registers."""
    row_tiles = -(-rows // 128)
    return QuantizedConfig(128, 64, 64, _splits(256 // row_tiles, n, 64, k), 4, 3)


def _splits(programs: int, n: int, block_n: int, k: int) -> int:
    """A power of two that gives no more than so many programs, each of which has four steps at
    least."""
    most = max(1, min(programs * block_n // n, k // 512))
    return 1 << (most.bit_length() - 1)


def shared_bytes(config: QuantizedConfig, form: str, itemsize: int) -> int:
    """Of shared memory: codes, rows of x and scales of the steps under way."""
    codes = config.block_n * config.block_k // (1 if form in EIGHT_BITS else 2)
    return config.stages * (codes + config.block_m * config.block_k * itemsize + 8 * config.block_n)


@functools.cache
def choose(best: QuantizedConfig, form: str, itemsize: int) -> Choice[QuantizedConfig]:
    """`best`, then with fewer steps under way, and last with the least tile."""
    shapes = [replace(best, stages=stages) for stages in range(best.stages, 1, -1)]
    shapes.append(replace(best, block_m=16, block_n=64, block_k=64, warps=4, stages=2))
    candidates = tuple(
        Candidate(shape, shared_bytes(shape, form, itemsize)) for shape in dict.fromkeys(shapes)
    )
    return Choice(f"quantized product ({form}, {itemsize} bytes an element of x)", candidates)
