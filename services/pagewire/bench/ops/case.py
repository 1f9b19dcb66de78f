"""What is known of a kernel at a shape, and how it is timed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pagewire_kernels.graph_capture import capture

GOAL_US = 4000.0
REPLAYS, WARM_UP = 12, 2


class Case:
    """A kernel with its inputs. `sets` are how many of them there are to rotate through."""

    sets = 1

    def launch(self, i: int, config: Any = None) -> Any:
        """Over input set i, in a launch shape of its own choice or in `config`."""
        raise NotImplementedError

    def check(self, config: Any = None) -> float:
        """The relative error against an oracle, on fresh inputs and poisoned outputs; NaN when
        anything is not finite."""
        raise NotImplementedError

    def other(self, i: int) -> Any:
        """What to time beside it, where the job names a peer."""
        raise NotImplementedError


@dataclass
class Job:
    """A kernel at a shape. `work`: bytes or operations of a launch, by unit; `target` in
    microseconds; `configs`: launch shapes to try."""

    name: str
    shape: str
    make: Callable[[], Case]
    work: float
    unit: str = "TB/s"
    target: float | None = None
    configs: list[Any] = field(default_factory=list)
    peer: str = ""


def graph_us(launch: Callable[[int], Any], sets: int, goal_us: float = GOAL_US) -> float:
    """Median microseconds a launch, over replays of a graph of enough launches to run about
    goal_us."""
    count = _count(launch, sets, goal_us)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        for i in range(count):
            launch(i % sets)
    times: list[float] = []
    for _ in range(REPLAYS):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times[WARM_UP:])


def _count(launch: Callable[[int], Any], sets: int, goal_us: float) -> int:
    launch(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(3):
        launch(i % sets)
    torch.cuda.synchronize()
    rough = max((time.perf_counter() - start) / 3 * 1e6, 5.0)
    return int(min(max(goal_us / rough, sets if sets <= 64 else 64, 4), 200))
