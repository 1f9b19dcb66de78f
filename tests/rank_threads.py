"""The ranks of a group as threads of one process, connected by gloo: imports of torch, and models,
are paid for once.

They take turns: products with quantized weights may not be computed by two threads at a time.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import TypeVar

from pagewire.process.group import Place
from pagewire.worker.communicators import connect_ranks
from pagewire.worker.load.rank_agreement import Ranks, StageLinks
from pagewire_kernels.communicator import Communicator, GlooCommunicator, PointToPoint
from torch import Tensor
from torch.distributed import HashStore

Result = TypeVar("Result")


class TakingTurns:
    """A communicator whose thread holds `turn` but while it waits for the other ranks."""

    def __init__(self, ranks: Communicator, turn: Lock) -> None:
        self.rank = ranks.rank
        self.size = ranks.size
        self._ranks = ranks
        self._turn = turn

    def all_reduce(self, x: Tensor) -> Tensor:
        with self._others_turn():
            return self._ranks.all_reduce(x)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        with self._others_turn():
            return self._ranks.all_gather(x, dim)

    def _others_turn(self) -> AbstractContextManager[None]:
        return without(self._turn)


class LinkTakingTurns:
    """The same for a connection of two pipeline stages."""

    def __init__(self, link: PointToPoint, turn: Lock) -> None:
        self._link = link
        self._turn = turn

    def send(self, x: Tensor) -> None:
        with without(self._turn):
            self._link.send(x)

    def recv(self, x: Tensor) -> None:
        with without(self._turn):
            self._link.recv(x)


@contextmanager
def without(turn: Lock) -> Iterator[None]:
    """Within, other threads may have the turn that this one holds."""
    turn.release()
    try:
        yield
    finally:
        turn.acquire()


def run_ranks(
    size: int, run: Callable[[Communicator], Result], timeout_s: float = 60.0
) -> list[Result]:
    """`run` once for each rank, at the same time; what each returned, by rank. Raises what one
    raised."""
    store, turn = HashStore(), Lock()

    def one(rank: int) -> tuple[Communicator, Result]:
        communicator = GlooCommunicator(store, rank, size, timeout_s)
        with turn:
            return communicator, run(TakingTurns(communicator, turn))

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(one, range(size)))
    return [result for _, result in results]


def run_stages(
    stages: int,
    size: int,
    run: Callable[[Ranks, Lock], Result],
    timeout_s: float = 60.0,
    *,
    sends_in_thread: bool = False,
) -> list[Result]:
    """As `run_ranks`, with pipeline stages of `size` ranks each. `run` is also given the lock of
    turns, which it holds. sends_in_thread: the last stage's results leave by a thread, without a
    turn."""
    store, turn = HashStore(), Lock()

    def one(rank: int) -> tuple[Ranks, Result]:
        place = Place("group", rank, stages * size, "", 0, (), ())
        ranks = connect_ranks(store, place, "cpu", stages, timeout_s)
        with turn:
            return ranks, run(_taking_turns(ranks, turn, sends_in_thread), turn)

    with ThreadPoolExecutor(stages * size) as pool:
        results = list(pool.map(one, range(stages * size)))
    return [result for _, result in results]


def _taking_turns(ranks: Ranks, turn: Lock, sends_in_thread: bool) -> Ranks:
    def link(one: PointToPoint | None) -> PointToPoint | None:
        return None if one is None else LinkTakingTurns(one, turn)

    links = StageLinks(
        link(ranks.links.previous),
        link(ranks.links.following),
        # a thread of its own receives, which has no turn
        ranks.links.results
        if ranks.stage.is_first or sends_in_thread
        else link(ranks.links.results),
    )
    layers = TakingTurns(ranks.layers, turn)
    return Ranks(layers, TakingTurns(ranks.host, turn), ranks.stage, links)
