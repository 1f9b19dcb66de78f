"""Ranks as processes of this machine that run the collective kernels against each other, in
Triton's interpreter: its atomics are the processor's.

    python tests/ops/collective_ranks.py 2 3     groups of so many ranks; a line of JSON for each
                                                 rank and case

A process imports everything once and forks the ranks; regions are memory that they have in common.
"""

import json
import mmap
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import ops.conftest  # noqa: F401  # mends the interpreter, and chooses it
import torch
from ops import collective_cases
from pagewire_kernels import symmetric_memory
from pagewire_kernels.symmetric_communicator import failure_message
from pagewire_kernels.symmetric_memory import Layout, SymmetricMemory
from triton.runtime import interpreter

CPU = torch.device("cpu")
PROGRAMS = 4
"""Fewer than rows, and no power of two."""
PATIENCE_S = 60.0
LIMIT_S = 0.3
LINGERING = 0.1
"""Share of the barriers."""
LINGER_S = 0.008
"""Several times what an operation takes."""

CASES_OF = {3: ("sums", "gathers"), 4: ("shares", "mixed")}
"""Of larger groups, where more than the number of ranks is the same; all others run all."""

Regions = list[torch.Tensor]


def regions(layout: Layout) -> Regions:
    """Zeros that processes forked from here have in common."""
    return [
        torch.frombuffer(mmap.mmap(-1, layout.nbytes), dtype=torch.uint8)
        for _ in range(layout.size)
    ]


def memory_of(rank: int, layout: Layout, there: Regions, timeout_s: float) -> SymmetricMemory:
    """As this rank sees it."""
    addresses = [region.data_ptr() for region in there]
    return symmetric_memory.make(rank, layout, addresses, CPU, timeout_s, (there,))


def fork_ranks(size: int, run: Callable[[int], None]) -> None:
    """run(rank) in a process for each. Raises RuntimeError when one ends with an error."""
    children: list[int] = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            status = 1
            random.seed(rank)
            try:
                run(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise RuntimeError(f"ranks ended with {statuses}")


def say(result: dict[str, Any]) -> None:
    """One write, so that lines of several processes stay whole."""
    os.write(sys.stdout.fileno(), (json.dumps(result) + "\n").encode())


def checks(size: int) -> Callable[[int], None]:
    """All cases one after the other, over the same regions."""
    layout = Layout(size, PROGRAMS, packed_bytes=1 << 15, buffer_bytes=1 << 16)
    there = regions(layout)

    def run(rank: int) -> None:
        memory = memory_of(rank, layout, there, PATIENCE_S)
        for case in CASES_OF.get(size, tuple(collective_cases.CASES)):
            started = time.perf_counter()
            result = collective_cases.run(memory, CPU, collective_cases.TINY, case)
            seconds = time.perf_counter() - started
            say({"size": size, "rank": rank, "seconds": round(seconds, 2), **result})

    return run


def stopped(size: int) -> Callable[[int], None]:
    """The last rank takes part once, then never again."""
    layout = Layout(size, PROGRAMS, packed_bytes=1 << 12, buffer_bytes=1 << 12)
    there = regions(layout)

    def run(rank: int) -> None:
        memory = memory_of(rank, layout, there, PATIENCE_S)
        x = torch.ones(4, 8)
        for kernel in collective_cases.SUMS.values():
            kernel(memory, x)
        messages = [failure_message(memory)]
        if rank != size - 1:
            memory.set_timeout(LIMIT_S)
            for kernel in collective_cases.SUMS.values():
                kernel(memory, x)
                messages.append(failure_message(memory))
        say({"size": size, "rank": rank, "case": "stopped", "messages": messages})

    return run


def linger(builder: Any) -> None:
    """At a barrier, between the last signal and what is read because of it, a rank may be held up
    while the others go on to their next operation."""
    if random.random() < LINGERING:
        time.sleep(LINGER_S)


def main() -> None:
    interpreter.InterpreterBuilder.create_barrier = linger
    builder = interpreter.interpreter_builder
    # a third of the time
    builder.options = replace(builder.options, sanitize_overflow=False)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # imports much: once, before the ranks are forked
    for size in map(int, sys.argv[1:]):
        fork_ranks(size, checks(size))
        fork_ranks(size, stopped(size))


if __name__ == "__main__":
    main()
