"""From how many rows on a product with quantized weights is faster through a dense copy than in our
own machine code: measured at the first start, for each shape and type, and kept on disk, so that
later starts measure nothing and compute the same.
"""

import logging
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch
from pagewire_kernels.cpu_linear import QuantizedLinear

from ...hub.huggingface import cache_dir
from ..device import choices, processor

log = logging.getLogger("pagewire.worker")
SIZES: Final = (8, 16, 32, 64, 128, 256)
"""Rows that are tried. The crossing is taken to lie half-way between the last size that the machine
code wins and the next."""
ROUNDS: Final = 3
MOST_S: Final = 0.1
"""A product that takes longer is measured once."""
SLOW_S: Final = 1.0
"""A product that takes longer with a few rows is left as it is: an emulated processor would need
minutes to time it."""


def choose(packed: Iterable[Any], dtype: torch.dtype) -> None:
    """Set the crossing of each quantized product among a decoder's packed matrices, for inputs of
    `dtype`; those of one shape share it."""
    path = _file()
    began = time.monotonic()
    crossings = choices.read(path, int)
    before = len(crossings)
    for linear in (matrix for matrix in packed if isinstance(matrix, QuantizedLinear)):
        input_dtype = torch.float32 if linear.wide else dtype
        key = f"{linear.key} {str(input_dtype).removeprefix('torch.')}"
        if key not in crossings:
            crossings[key] = crossing(linear, input_dtype)
        linear.crossing = crossings[key]
    if len(crossings) > before:
        choices.write(path, crossings)
        log.info(
            "%d products timed in %.1f s, kept in %s",
            len(crossings) - before,
            time.monotonic() - began,
            path,
        )


def crossing(linear: QuantizedLinear, dtype: torch.dtype) -> int:
    """The most rows for which the machine code is faster."""
    best = SIZES[0] // 2
    for rows in SIZES:
        x = torch.randn(rows, linear.columns).to(dtype)
        native = _seconds(linear.native, x)
        if native > SLOW_S and rows == SIZES[0]:
            return linear.crossing
        if native >= _seconds(linear.dense, x):
            return (best + rows) // 2
        best = rows
    return best


def _seconds(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """The least of some rounds; the first is not counted if there are more."""
    times: list[float] = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - began)
        if times[-1] > MOST_S:
            break
    return min(times[1:] or times)


def _file() -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", processor.look().title().lower())
    return (
        cache_dir()
        / f"cpu-products-{name}-{torch.get_num_threads()}-torch-{torch.__version__}.json"
    )
