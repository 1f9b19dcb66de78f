"""Pipeline stages as threads that take turns (rank_threads.py), with what a worker's loop does: rank
0's steps go to all ranks, which launch them in their order.
"""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagewire.process.group import RingReader
from pagewire.worker.cpu import stages
from pagewire.worker.load.rank_agreement import Ranks
from pagewire.worker.rank_link import Follower
from pagewire.worker.runners import AsyncRunner
from pagewire.worker.step.grammar_masks import GrammarMasks
from pagewire.worker.step.rank_masks import MakeMasks
from pagewire_protocol.messages import Step, StepResult, unpack
from rank_threads import run_stages, without
from worker.conftest import Driver


class Steps:
    """What rank 0 hands to the others."""

    def __init__(self, ranks: int) -> None:
        self._queues = [queue.SimpleQueue() for _ in range(ranks)]

    def put(self, step: Any) -> None:
        for one in self._queues[1:]:
            one.put(step)

    def get(self, rank: int, turn: threading.Lock) -> Any:
        with without(turn):
            return self._queues[rank].get()


class Leading:
    """Rank 0's runner as a SyncRunner: it hands on each step and waits for its end."""

    def __init__(self, runner, steps: Steps, turn: threading.Lock) -> None:
        self.runner = runner
        self.facts = runner.facts
        self._steps = steps
        self.turn = turn

    def clear(self) -> None:
        """As after a new scheduler."""
        self.runner.clear()
        self._steps.put("clear")

    def launch(self, step: Step):
        self._steps.put(step)
        return self.runner.launch(step)

    def finished(self, handle) -> StepResult:
        return finished(handle, self.turn)

    def execute(self, step: Step) -> StepResult:
        return self.finished(self.launch(step))


def finished(handle, turn: threading.Lock) -> StepResult:
    while not handle.done():
        with without(turn):
            time.sleep(0.0005)
    return handle.result()


def give_up_turns(runner, turn: threading.Lock) -> None:
    """While the first stage waits for the last one."""
    take = runner._under_way.receiver.take

    def patient(wait: bool) -> bytes | None:
        if not wait:
            return take(False)
        with without(turn):
            return take(True)

    runner._under_way.receiver.take = patient


class FollowerTakingTurns(Follower):
    """Gives up its turn while it waits for rank 0."""

    def __init__(self, ring: RingReader, turn: threading.Lock) -> None:
        super().__init__(ring)
        self._turn = turn

    def masks(self) -> bytes:
        with without(self._turn):
            return super().masks()


def usual_masks(rank: int, turn: threading.Lock) -> MakeMasks:
    return GrammarMasks


def run_group(
    path: Path,
    count: int,
    size: int,
    drive: Callable[[Driver], Any],
    masks: Callable[[int, threading.Lock], MakeMasks] = usual_masks,
    start: Callable[..., AsyncRunner] = stages.start,
) -> list[Any]:
    """What `drive` returns of rank 0's Driver; of each other rank, the results of all steps. masks:
    what makes those of a rank. start: its runner, with the arguments of CpuSteps; of another one than CPUs have, the
    last stage sends by a thread."""
    steps = Steps(count * size)

    def run(ranks: Ranks, turn: threading.Lock):
        def make(*arguments, **options):
            own = {"ranks": ranks, "make_masks": masks(ranks.rank, turn)}
            runner = start(*arguments, **options | own)
            if ranks.stage.is_first:
                give_up_turns(runner, turn)
            return runner if ranks.rank else Leading(runner, steps, turn)

        driver = Driver(path, make=make)
        if not ranks.rank:
            try:
                return drive(driver)
            finally:
                steps.put(None)
        results = []
        while (step := steps.get(ranks.rank, turn)) is not None:
            if step == "clear":
                driver.runner.clear()
            else:
                results.append(finished(driver.runner.launch(step), turn))
        return results

    return run_stages(count, size, run, sends_in_thread=start is not stages.start)


def collect(driver: Driver, result: StepResult) -> None:
    for slot, token in zip(unpack("i", result.slots), unpack("i", result.tokens), strict=True):
        driver.out[slot].append(token)
