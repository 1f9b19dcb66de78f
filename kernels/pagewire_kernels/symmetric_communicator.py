"""A Communicator over symmetric memory: which kernel, or which other communicator, an operation of
so many bytes goes to. Knows no way to get such memory; cuda_communicator.py does.

All that is launched here can be captured in CUDA graphs. A kernel that waited for too long leaves a
code in memory of the host, which `check` turns into an error: call it when a step's results are there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from . import all_gather, all_reduce, norm
from .all_reduce import AddNorm
from .communicator import Communicator, CommunicatorFailed
from .symmetric_memory import LIMIT, SymmetricMemory

LOW_LATENCY: Final = "low-latency"
ONE_SHOT: Final = "one-shot"
TWO_SHOT: Final = "two-shot"
LIBRARY: Final = "library"
"""What a communicator that was given for large tensors does: NCCL."""
SUMS: Final[Mapping[str, Callable[..., Tensor]]] = {
    LOW_LATENCY: all_reduce.low_latency,
    ONE_SHOT: all_reduce.one_shot,
    TWO_SHOT: all_reduce.two_shot,
}
GATHERS: Final[Mapping[str, Callable[..., Tensor]]] = {
    LOW_LATENCY: all_gather.low_latency,
    ONE_SHOT: all_gather.one_shot,
}
OPERATIONS: Final = {
    all_reduce.ALL_REDUCE: "an all-reduce",
    all_reduce.REDUCE_SCATTER: "a reduce-scatter",
    all_gather.ALL_GATHER: "an all-gather",
}


@dataclass(frozen=True)
class Crossings:
    """From how many bytes on another way is faster: (bytes, way) in rising order, the first from 0
    on. The same on all ranks."""

    ways: Sequence[tuple[int, str]]

    def way(self, nbytes: int) -> str:
        """For a tensor of so many bytes."""
        return [way for least, way in self.ways if least <= nbytes][-1]


def crossings(measured: Mapping[int, Mapping[str, float]]) -> Crossings:
    """By times of each way, by bytes: the fastest up to each size that was measured, from the size
    below on. Ways that are not there for a size don't take it."""
    ways: list[tuple[int, str]] = []
    first = 0
    for nbytes in sorted(measured):
        times = measured[nbytes]
        best = min(times, key=lambda way: (times[way], way))
        if not ways or ways[-1][1] != best:
            ways.append((first, best))
        first = nbytes + 1
    return Crossings(ways)


SERVING_TIMEOUT_S: Final = 30.0
"""How long a kernel waits for other ranks once all of them serve."""


class SymmetricCommunicator:
    """See Communicator. `sums`, `gathers`: chosen ways; a tensor that does not fit its way goes to
    the next larger one, and in the end to `library`. Rows that do not fit the buffers are added up
    by several launches, where that was the fastest way for as much as fits."""

    def __init__(
        self, memory: SymmetricMemory, library: Communicator, sums: Crossings, gathers: Crossings
    ) -> None:
        self.memory = memory
        self.rank = memory.rank
        self.size = memory.size
        self.library = library
        self.sums = sums
        self.gathers = gathers

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Communicator."""
        x = x.contiguous()
        way = self._sum_way(x)
        if way == LIBRARY:
            return self.library.all_reduce(x)
        out = torch.empty_like(x)
        for piece in all_reduce.pieces(self.memory, x):
            SUMS[way](self.memory, x[piece], out=out[piece])
        return out

    def all_reduce_add_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        bias: Tensor | None = None,
        *,
        centre: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See NormingCommunicator; in one kernel where one takes rows so wide. The total is written
        into `residual`."""
        x = x.contiguous()
        way = self._sum_way(x)
        if way != LIBRARY and all_reduce.takes_norm(x):
            out = torch.empty_like(x)
            for piece in all_reduce.pieces(self.memory, x):
                norm_of_piece = AddNorm(residual[piece], weight, eps, bias, centre)
                SUMS[way](self.memory, x[piece], norm_of_piece, out[piece])
            return out, residual
        total = self.all_reduce(x)
        if centre:
            return norm.add_layer_norm(total, residual, weight, bias, eps)
        return norm.add_rms_norm(total, residual, weight, eps)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """See Communicator."""
        dim %= x.ndim
        x = x.contiguous()
        way = LIBRARY if not x.numel() else self.gathers.way(x.nbytes)
        if way == LOW_LATENCY and not all_gather.takes_low_latency(self.memory, x, dim):
            way = ONE_SHOT
        if way == ONE_SHOT and not all_gather.takes_buffers(self.memory, x):
            way = LIBRARY
        return (
            self.library.all_gather(x, dim) if way == LIBRARY else GATHERS[way](self.memory, x, dim)
        )

    def serve(self) -> None:
        """See CheckedCommunicator."""
        self.memory.set_timeout(SERVING_TIMEOUT_S)

    def check(self) -> None:
        """See CheckedCommunicator."""
        message = failure_message(self.memory)
        if message:
            raise CommunicatorFailed(message)

    def _sum_way(self, x: Tensor) -> str:
        if not x.numel() or x.data_ptr() % 16:
            return LIBRARY
        way = self.sums.way(x.nbytes)
        if way == LOW_LATENCY and not all_reduce.takes_low_latency(self.memory, x):
            way = ONE_SHOT
        return way if all_reduce.pieces(self.memory, x) else LIBRARY


def failure_message(memory: SymmetricMemory) -> str:
    """What a kernel that waited for too long has left, in a line; empty when none has."""
    code = memory.failure
    if not code:
        return ""
    operation, missing = divmod(code, memory.size + 1)
    seconds = int(memory.control[LIMIT].item()) / 1e9
    return (
        f"rank {memory.rank} of {memory.size} waited {seconds:g} s in {OPERATIONS[operation]} for "
        f"rank {missing - 1}: it has ended or hangs; all ranks must start again"
    )
