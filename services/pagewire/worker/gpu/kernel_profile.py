"""Which kernels the GPU's time goes to, logged when the load pauses. For `--log-kernels`.

Recording costs the GPU about a microsecond between kernels, so shares are what to look at;
`--log-steps` has times that nothing is added to. Knows kernels by their names alone.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch._C._profiler import _ExperimentalConfig  # pyright: ignore[reportMissingModuleSource, reportPrivateUsage]
from torch.autograd import (
    ProfilerActivity,  # pyright: ignore[reportPrivateImportUsage]
    ProfilerConfig,  # pyright: ignore[reportPrivateImportUsage]
    ProfilerState,  # pyright: ignore[reportPrivateImportUsage]
    _disable_profiler,  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    _enable_profiler,  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    _prepare_profiler,  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
)

log = logging.getLogger("pagewire.worker")
PAUSE_S: Final = 0.1
MOST_S: Final = 20.0
"""Of one record: 100,000 kernels and more, in memory until they are logged."""
SHOWN: Final = 12
KINDS: Final = {
    "_decode_inputs": "other",
    "_decode": "decode attention",
    "_prefix": "common blocks",
    "_prefill": "prefill attention",
    "_norm": "norms",
    "_rope_and_cache": "rotary and cache",
    "_gated": "activation",
    "_sample": "sampling",
    "_thresholds": "sampling",
    "_skinny": "GEMMs",
    "_row": "GEMMs",
    "Memcpy": "copies",
    "Memset": "copies",
}
"""By how a name begins; cuBLAS's names are many, and all that is neither is 'other'."""
CUBLAS: Final = ("nvjet", "gemm", "cublas", "cutlass", "splitK")

Kernel = tuple[str, int, int]
"""Name, and when it began and ended, in nanoseconds."""


def kind_of(name: str) -> str:
    """A kernel's kind (KINDS), by its name."""
    for beginning, title in KINDS.items():
        if name.startswith(beginning):
            return title
    return "GEMMs" if any(piece in name for piece in CUBLAS) else "other"


def summary(kernels: Iterable[Kernel], steps: int) -> Iterator[str]:
    """The lines to be logged: all of it, by kind, and the kernels that took longest."""
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    busy = 0
    last_end = 0
    by_kind = Counter[str]()
    by_name = Counter[str]()
    launches = Counter[str]()
    for name, began, ended in ordered:
        # Kernels may overlap: time counts once.
        busy += max(0, ended - max(began, last_end))
        last_end = max(last_end, ended)
        by_kind[kind_of(name)] += ended - began
        by_name[name] += ended - began
        launches[name] += 1
    span = last_end - ordered[0][1]
    times = ", ".join(f"{kind} {took / 1e6:,.0f}" for kind, took in by_kind.most_common())
    yield (
        f"{steps} steps, {len(ordered):,} kernels in {span / 1e6:,.0f} ms, "
        f"busy for {busy / span:.1%}; ms: {times}"
    )
    for name, took in by_name.most_common(SHOWN):
        count = launches[name]
        yield (
            f"{took / 1e6:10,.1f} ms {took / busy:6.1%} {count:8,} x "
            f"{took / count / 1e3:8.1f} us  {name[:80]}"
        )


class KernelProfile:
    """A StepObserver (runner.py). A record is logged by the first step after a pause."""

    def __init__(self) -> None:
        self._began = self._last = 0.0
        self._steps = 0
        self._ended = torch.cuda.Event()

    def begin(self) -> None:
        """Before a step's first launch."""
        now = time.monotonic()
        if self._steps and (
            now - self._began > MOST_S or (now - self._last > PAUSE_S and self._ended.query())
        ):
            self._log_record()
        if not self._steps:
            _start()
            self._began = now
        self._steps += 1
        self._last = now

    def end(self, tokens: int) -> None:
        """After its last; the step computes so many tokens."""
        self._ended.record()

    def _log_record(self) -> None:
        kernels = _stop()
        steps = self._steps
        self._steps = 0
        for line in summary(kernels, steps) if kernels else ():
            log.info("%s", line)


def _start() -> None:
    # torch.profiler would make an object of each of the kernels, for longer than a worker may be
    # silent.
    config = ProfilerConfig(
        ProfilerState.KINETO, False, False, False, False, False, _ExperimentalConfig()
    )
    _prepare_profiler(config, {ProfilerActivity.CUDA})
    _enable_profiler(config, {ProfilerActivity.CUDA})


def _stop() -> list[Kernel]:
    torch.cuda.synchronize()
    events = _disable_profiler().events()
    return [
        (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if _on_gpu(event)
    ]


def _on_gpu(event: Any) -> bool:
    return str(event.device_type()).endswith("CUDA")
