"""The ranks of a group as threads of one process, connected by gloo: imports of torch, and models,
are paid for once.

They take turns: products with quantized weights may not be computed by two threads at a time.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import TypeVar

from pagewire_kernels.communicator import Communicator, GlooCommunicator
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

    @contextmanager
    def _others_turn(self) -> Iterator[None]:
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()


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
