"""Which of cuBLASLt's algorithms is fastest for each GEMM of the model, timed at the first start
and kept on disk.

The library's heuristic ranks candidates without running them, and on large shapes the first is
often a tenth slower than the best. Each candidate is held against torch's result before it is
timed, on the model's own weights. Choices are kept beside the compiled kernels, for one kind of GPU
and one version of the library; so starts after the first measure nothing, and compute the same.
"""

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from pagewire_kernels import gemm_cublaslt
from pagewire_kernels.gemm import pick_config
from pagewire_kernels.gemm_cublaslt import Gemm, GemmAlgorithms, Shape
from torch import Tensor

from ..device import choices, kernel_cache

log = logging.getLogger("pagewire.worker")
LEAST_GAIN: Final = 0.02
"""Less is noise."""
LEAST_COLUMNS: Final = 256
"""Smaller GEMMs, such as a router's, cost next to nothing."""
BURST_US: Final = 60.0
"""How long a candidate runs at a time, at least."""
ROUNDS: Final = 3
LAUNCH_US: Final = 20.0
"""Shorter GEMMs would wait for the CPU, so they queue up while the GPU is kept busy."""
CYCLES: Final = 16_000
"""Of the GPU's clock for each launch in the queue, some 8 us."""
TOLERANCE: Final = 0.02
"""Relative; what two orders of the same sum differ by in bf16 is a tenth of it."""

Run = Callable[[Tensor], object]
Gemms = Mapping[Shape, tuple[int, Sequence[Tensor]]]
"""By shape, how many rows a GEMM had, and its weights in all layers."""


def record(algorithms: GemmAlgorithms, forward: Callable[[], object]) -> Gemms:
    """The GEMMs of the model that `algorithms` are for. `forward` runs it once, over more tokens
    than rows; with several ranks, on all of them at once."""
    if not gemm_cublaslt.version():
        return {}
    with algorithms.recording() as gemms:
        forward()
    return gemms


def choose(
    algorithms: GemmAlgorithms,
    gemms: Gemms,
    tokens: Sequence[int],
    rows: Sequence[int],
    progress: Callable[[float], None],
) -> None:
    """Fill `algorithms` with the fastest ones for `gemms`. `tokens`: sizes of steps that will be
    run; `rows`: how many tokens of a step are sampled."""
    if not gemms:
        return
    path = _path()
    began = time.monotonic()
    timed = choices.read(path, _digits)
    num_kept = len(timed)
    most_rows = max(num_rows for num_rows, _ in gemms.values())
    for index, (shape, (num_rows, weights)) in enumerate(gemms.items()):
        if not _is_worth_timing(shape):
            continue
        # A GEMM of fewer rows than the step has tokens, such as the head's, is of sampled rows
        # only.
        sizes = _sizes_to_choose_for(shape, tokens if num_rows == most_rows else rows)
        chosen: dict[int, bytes] = {}
        for i, size in enumerate(sizes):
            key = _key(size, shape)
            if key not in timed:
                timed[key] = _fastest_that_fits(size, shape, weights).hex()
            chosen[size] = bytes.fromhex(timed[key])
            progress((index + i / len(sizes)) / len(gemms))
        algorithms.choose(shape, chosen)
    if len(timed) > num_kept:
        choices.write(path, timed)
    log.info(
        "%d GEMMs timed in %.1f s, %d found in %s",
        len(timed) - num_kept,
        time.monotonic() - began,
        num_kept,
        path,
    )


def _is_worth_timing(shape: Shape) -> bool:
    n, _, dtype = shape
    return n >= LEAST_COLUMNS and dtype in gemm_cublaslt.TYPES


def _sizes_to_choose_for(shape: Shape, sizes: Sequence[int]) -> list[int]:
    """Where our own kernel serves so few rows, there is nothing to choose."""
    n, k, _ = shape
    return [size for size in sizes if pick_config(size, n, k) is None]


def _key(rows: int, shape: Shape) -> str:
    n, k, dtype = shape
    return f"{rows}x{n}x{k} {str(dtype).removeprefix('torch.')}"


def _path() -> Path:
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    return kernel_cache.usual() / f"products-{gpu}-{gemm_cublaslt.version()}.json"


def _digits(algorithm: str) -> str:
    """An algorithm as hexadecimal digits; empty where torch's choice is as fast. Raises ValueError
    for anything else."""
    return bytes.fromhex(algorithm).hex()


def _fastest_that_fits(rows: int, shape: Shape, weights: Sequence[Tensor]) -> bytes:
    """See `fastest`. Torch's choice (empty) where there is no memory for one result more."""
    try:
        return fastest(rows, shape, weights)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return b""


def fastest(rows: int, shape: Shape, weights: Sequence[Tensor]) -> bytes:
    """The fastest algorithm for [rows, K] @ [N, K]^T; empty where torch's choice is as fast.
    Launches go round `weights`, all those of this shape: in a step, too, no weight is in the GPU's
    cache when it is read."""
    n, k, dtype = shape
    x = torch.randn(rows, k, dtype=dtype, device=weights[0].device)
    out = torch.empty(rows, n, dtype=dtype, device=x.device)
    runs: dict[bytes, Run] = {b"": lambda weight: torch.mm(x, weight.t(), out=out)}
    sample = slice(None, None, max(1, rows // 64))
    runs[b""](weights[0])
    exact = out[sample].float()
    gemm = Gemm(rows, shape)
    for algorithm in gemm.candidates():
        multiply = gemm.bound(algorithm, x.device)
        with contextlib.suppress(RuntimeError):  # what the library names it cannot always do
            multiply(x, weights[0], out.fill_(float("nan")))
            if float((out[sample].float() - exact).norm()) <= TOLERANCE * float(exact.norm()):
                runs[algorithm] = lambda weight, multiply=multiply: multiply(x, weight, out)
    return best(_times(runs, weights)) if len(runs) > 1 else b""


def _times(runs: dict[bytes, Run], weights: Sequence[Tensor]) -> dict[bytes, float]:
    """Microseconds of each, the least of some rounds; in a round all run one after the other, so
    that a change of clock meets all of them."""
    count = max(1, math.ceil(BURST_US / _burst(runs[b""], weights, 2)))
    rounds = [[_burst(run, weights, count) for run in runs.values()] for _ in range(ROUNDS)]
    return dict(zip(runs, map(min, zip(*rounds, strict=True)), strict=True))


def _burst(run: Run, weights: Sequence[Tensor], count: int) -> float:
    """Microseconds of one launch of `count`."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if count > BURST_US / LAUNCH_US:
        torch.cuda._sleep(CYCLES * count)
    began.record()
    for i in range(count):
        run(weights[i % len(weights)])
    ended.record()
    ended.synchronize()
    return 1000 * began.elapsed_time(ended) / count


def best(times: dict[bytes, float]) -> bytes:
    """The algorithm of the least time if that is clearly less than torch's, else torch's, whose key
    is empty."""
    fast = min(times, key=lambda algorithm: times[algorithm])
    return fast if times[fast] < times[b""] * (1 - LEAST_GAIN) else b""
