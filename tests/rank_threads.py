"""The ranks of a group as threads of one process, connected by gloo: imports of torch, and models,
are paid for once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pagewire_kernels.communicator import Communicator, GlooCommunicator
from torch.distributed import HashStore

Result = TypeVar("Result")


def run_ranks(
    size: int, run: Callable[[Communicator], Result], timeout_s: float = 60.0
) -> list[Result]:
    """`run` once for each rank, at the same time; what each returned, by rank. Raises what one
    raised."""
    store = HashStore()

    def one(rank: int) -> tuple[Communicator, Result]:
        communicator = GlooCommunicator(store, rank, size, timeout_s)
        return communicator, run(communicator)

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(one, range(size)))
    return [result for _, result in results]
