"""Processes that play the clients of a server, so that neither its CPU time nor its measurement
shares an interpreter with anything.

They stay up between loads. A load begins in all of them at once, when the requests of all are made.
"""

import itertools
import multiprocessing
import random
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType

import uvloop
from msgspec import Struct

from . import workloads
from .load import Sample, Target, send_all, send_at

GO_S = 60.0


class Task(Struct, frozen=True):
    """One process's share of a load. vocab 0: prompts of words."""

    target: Target
    model: str
    workload: workloads.Workload
    seed: str
    common_seed: str
    vocab: int


def moments(rate: float, count: int, make: random.Random) -> Iterator[float]:
    """When the requests of a Poisson process of `rate` a second come, in seconds."""
    return itertools.accumulate(make.expovariate(rate) for _ in range(count))


def play(pipe: Connection) -> None:
    """A client process: tasks until None comes."""
    while (task := pipe.recv()) is not None:
        load = task.workload
        made = [
            {"model": task.model, **body}
            for body in workloads.bodies(load, task.seed, task.common_seed, task.vocab)
        ]
        pipe.send(None)
        pipe.recv()
        if load.rate:
            when = moments(load.rate, load.requests, random.Random(f"{task.seed} arrivals"))
            pipe.send(uvloop.run(send_at(task.target, made, when)))
        else:
            pipe.send(uvloop.run(send_all(task.target, made, load.streams)))


class Clients:
    """`count` client processes. Use as a context manager."""

    def __init__(self, count: int = 4, timeout_s: float = 600.0) -> None:
        self._timeout_s = timeout_s
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        # Ctrl-C goes to all processes of a terminal; this one ends the clients, which inherit that
        # they ignore it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=play, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        finally:
            signal.signal(signal.SIGINT, before)

    def run(
        self, target: Target, model: str, load: workloads.Workload, seed: int, vocab: int = 0
    ) -> list[Sample]:
        """Raises OSError when a client has died or the load outlasts the timeout."""
        shares = workloads.split(load, len(self._pipes))
        pipes = self._pipes[: len(shares)]
        for i, (pipe, part) in enumerate(zip(pipes, shares, strict=True)):
            pipe.send(
                Task(
                    target,
                    model,
                    part,
                    f"{load.name} {seed} {i}",
                    f"{load.name} {seed} common",
                    vocab,
                )
            )
        for pipe in pipes:
            self._take(pipe, GO_S)
        for pipe in pipes:
            pipe.send(None)
        return [sample for pipe in pipes for sample in self._take(pipe, self._timeout_s) or ()]

    def _take(self, pipe: Connection, timeout_s: float) -> list[Sample] | None:
        try:
            if pipe.poll(timeout_s):
                return pipe.recv()
        except EOFError:
            raise OSError("a client process died") from None
        raise OSError(f"a client process gave no answer for {timeout_s:.0f} s")

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(5)
        for pipe in self._pipes:
            pipe.close()

    def __enter__(self) -> "Clients":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
