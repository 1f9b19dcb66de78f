"""The first start on a machine: its kernels are compiled many at a time, before they are launched.

What a start will launch is rehearsed (pagewire_kernels/compile_ahead.py). Steps are rehearsed by
capturing a graph that is thrown away: nothing of it runs, so no kernel meets what another one was
to fill. Later starts find the kernels on disk and rehearse nothing.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pagewire_kernels
import torch
import triton
from pagewire_kernels import compile_ahead
from pagewire_kernels.graph_capture import capture

from ..device import choices, kernel_cache

log = logging.getLogger("pagewire.worker")
KEPT: Final = "started.json"
"""Beside the compiled kernels: by digest, how many a start like it compiled ahead."""

Run = Callable[[], object]


class Launches(NamedTuple):
    """What a start will launch. alone: runs whose results only they use; steps: those of a model,
    which can be captured."""

    alone: Sequence[Run]
    steps: Sequence[Run]


def compile_kernels(
    launches: Callable[[], Launches],
    what: Sequence[object],
    share: tuple[int, int],
    progress: Callable[[float], None],
) -> None:
    """Compile what `launches` tells of, unless a start with the same `what`, all that kernels depend
    on, has done so. share: (rank, ranks); ranks compile at the same time, and each finds what others
    have made."""
    path = kernel_cache.usual() / KEPT
    known = choices.read(path, int)
    key = digest(what)
    if key in known:
        return
    began = time.monotonic()
    wanted = rehearse(launches())
    rank, ranks = share
    first = len(wanted) * rank // ranks
    threads = len(os.sched_getaffinity(0)) // ranks
    device = torch.device("cuda", torch.cuda.current_device())
    compile_ahead.compile_all(wanted[first:] + wanted[:first], threads, device, progress)
    log.info(
        "%d kernels compiled ahead in %.1f s, %d at a time",
        len(wanted),
        time.monotonic() - began,
        threads,
    )
    choices.write(path, {**choices.read(path, int), key: len(wanted)})


def digest(what: Sequence[object]) -> str:
    """Of `what`, the card, and the sources and the compiler of the kernels."""
    source = Path(pagewire_kernels.__file__).parent
    made_of = hashlib.sha256()
    for file in sorted(source.glob("*.py")):
        made_of.update(file.read_bytes())
    made_of.update(repr((triton.__version__, torch.cuda.get_device_name(), *what)).encode())
    return made_of.hexdigest()[:16]


def rehearse(launches: Launches) -> list[compile_ahead.Wanted]:
    """The kernels that are not compiled yet. A rehearsal that fails is cut short: what it would have
    found is compiled at its launch, and what is wrong shows there."""
    wanted: dict[compile_ahead.Wanted, None] = {}
    stream = torch.cuda.current_stream()
    try:
        with compile_ahead.noting(wanted):
            for run in launches.alone:
                run()
            _capture(launches.steps)
    except Exception as error:  # whatever a kernel, a compiler or the capture raises
        torch.cuda.set_stream(stream)
        log.warning("kernels are compiled one after the other: %s", str(error)[:200])
    return list(wanted)


def _capture(steps: Sequence[Run]) -> None:
    """All in one graph, whose memory is given back."""
    if not steps:
        return
    _start_blas()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        for run in steps:
            run()
    graph.reset()
    # A workspace that was made for the capture would keep the graph's memory.
    torch._C._cuda_clearCublasWorkspaces()  # pyright: ignore[reportPrivateUsage]
    torch.cuda.empty_cache()


def _start_blas() -> None:
    """The libraries' handles cannot be made while a graph is captured."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(16, 16, dtype=dtype, device="cuda")
        torch.mm(x, x)
        torch.nn.functional.linear(x, x, x[0])
