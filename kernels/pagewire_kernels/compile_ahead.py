"""Compiles kernels many at a time, before any of them is launched.

A launch compiles its kernel first, about a second each, and the launches of a start come one after
the other. So they are rehearsed: within `noting`, a kernel that is not compiled yet is noted with
all that its machine code depends on, and not launched. `compile_all` then compiles what was noted in
threads: most of the compiler's passes, and the assembler, hold no lock of Python's. What was missed
is compiled at its launch as ever.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import torch
import triton.language as tl
from triton import knobs

from . import workspace

log = logging.getLogger("pagewire.kernels")
MOST_THREADS: Final = 32
"""More would wait for each other: a kernel's first and last passes are written in Python."""


class Wanted(NamedTuple):
    """A kernel to compile. specialization: what Triton calls so, the types, constants and options
    as JSON."""

    function: Any
    specialization: str


def _named_like_a_type(constant: object) -> bool:
    """Whether a constant is a text that `preload` would take for one of Triton's types: "int8" is
    not equal to the type, so that another kernel would be compiled, and found by the launch."""
    return isinstance(constant, str) and tl.dtype.is_dtype(constant)


@contextlib.contextmanager
def noting(wanted: dict[Wanted, None]) -> Iterator[None]:
    """Note in `wanted` what would be compiled. What kernels were to fill holds nothing meaningful
    then: nothing of it may be used as an index. Those compiled before are launched."""
    runtime: Any = knobs.runtime

    def note(**told: Any) -> bool:
        if any(map(_named_like_a_type, told["compile"]["constants"].values())):
            return False  # compiled by its launch
        wanted[Wanted(told["fn"].jit_function, told["compile"]["specialization_data"])] = None
        return True  # neither compiled nor launched

    before = runtime.jit_cache_hook
    runtime.jit_cache_hook = note
    try:
        with workspace.rehearsing():
            yield
    finally:
        runtime.jit_cache_hook = before


def compile_all(
    wanted: Sequence[Wanted],
    threads: int,
    device: torch.device | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Compile `wanted` for `device`, `threads` at a time. One that fails is left to its launch,
    which says why."""

    def begin() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own, and Triton asks for it

    def compiled(one: Wanted) -> None:
        try:
            one.function.preload(one.specialization)
        except Exception:
            log.debug("%s is left to its launch", one.function.__name__, exc_info=True)

    if not wanted:
        return
    with ThreadPoolExecutor(max(1, min(threads, MOST_THREADS)), "compile", begin) as pool:
        for done, _ in enumerate(pool.map(compiled, wanted), 1):
            progress(done / len(wanted))
