"""Connections of two ranks on GPUs, through which pipeline stages hand on hidden states: by NCCL, or,
where ranks share a GPU, through the host's memory.

With NCCL neither end waits on the host. A receive is queued behind what the receiver's stream does;
a send runs beside the sender's stream, which waits for it only when MOST_SENT tensors are on their
way. Both can hold the GPU's streams for as long as the other rank does not come: `check` says so.
"""

import os
import time
from collections import deque
from datetime import timedelta
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from .communicator import TIMEOUT_S, CommunicatorFailed, GlooPointToPoint
from .cuda_communicator import NO_MULTICAST, WAIT_S
from .symmetric_communicator import SERVING_TIMEOUT_S

MOST_SENT: Final = 4
"""Tensors that a rank sends ahead of their being received: those of two steps."""
MOST_BLOCKS: Final = 8
"""Thread blocks of NCCL's kernels, which hold as much of a GPU while they wait for the other end, and
reach most of NVLink's bandwidth."""


class _UnderWay(NamedTuple):
    """A tensor on its way, whose memory this keeps, torch's handle of it, and when it was queued."""

    x: Tensor
    work: Any
    since: float


class NcclPointToPoint:
    """A PointToPoint and a CheckedCommunicator, by NCCL: tensors go from GPU to GPU. Not for use in
    captured graphs, nor by two threads."""

    def __init__(
        self,
        store: Store,
        rank: int,
        peer: int,
        device: torch.device,
        *,
        is_sender: bool,
    ) -> None:
        """From `rank`, which this is, to `peer`, or the other way. Returns when both are there and a
        tensor has gone over. Raises CommunicatorFailed."""
        os.environ.update(NO_MULTICAST)
        self._who = f"rank {rank}"
        self._peer = f"rank {peer}"
        self._operation = "sending to" if is_sender else "receiving from"
        number = 0 if is_sender else 1
        self._other = 1 - number
        self._limit_s = WAIT_S
        self._under_way: deque[_UnderWay] = deque()
        # torch's stubs lack most of this class
        nccl: Any = dist.ProcessGroupNCCL
        try:
            options = nccl.Options()
            options._timeout = timedelta(seconds=WAIT_S)
            options.config.max_ctas = MOST_BLOCKS
            self._group = nccl(store, number, 2, options)
            self._group.eager_connect_single_device(device)
            x = torch.zeros(1, device=device)
            if is_sender:
                self.send(x)
            else:
                self.recv(x)
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            reason = next(iter(str(error).strip().splitlines()), "")[:200]
            raise CommunicatorFailed(
                f"rank {rank} cannot connect to rank {peer} by NCCL on {device}: {reason}; "
                "NCCL_DEBUG=INFO says more, and a /dev/shm that is too small (--shm-size, "
                "--ipc=host) is a frequent cause"
            ) from None

    def send(self, x: Tensor) -> None:
        """See PointToPoint. What waits, where MOST_SENT tensors are on their way, is the current
        stream."""
        while len(self._under_way) >= MOST_SENT:
            self._under_way.popleft().work.wait()
        self._queue(x, self._group.send([_as_bytes(x)], self._other, 0))

    def recv(self, x: Tensor) -> None:
        """See PointToPoint. What waits is the current stream."""
        self._forget_completed()
        work = self._group.recv([_as_bytes(x)], self._other, 0)
        self._queue(x, work)
        work.wait()

    def serve(self) -> None:
        """See CheckedCommunicator."""
        self._limit_s = SERVING_TIMEOUT_S

    def check(self) -> None:
        """See CheckedCommunicator; also of an operation that has not ended, for too long."""
        self._forget_completed()
        if not self._under_way:
            return
        waited_s = time.monotonic() - self._under_way[0].since
        if waited_s > self._limit_s:
            raise CommunicatorFailed(
                f"{self._who} has waited {waited_s:.0f} s in {self._operation} {self._peer}: it has "
                "ended or hangs; all ranks must start again"
            )

    def _queue(self, x: Tensor, work: Any) -> None:
        self._under_way.append(_UnderWay(x, work, time.monotonic()))

    def _forget_completed(self) -> None:
        while self._under_way and self._under_way[0].work.is_completed():
            self._under_way.popleft()


class StagedPointToPoint:
    """A PointToPoint by gloo, through copies in the host's memory: for ranks that share a GPU, which
    NCCL refuses. The host of the sender waits for what `x` is computed by, that of the receiver for
    its arrival."""

    def __init__(self, store: Store, rank: int, peer: int, *, is_sender: bool) -> None:
        """Raises CommunicatorFailed."""
        self._host = GlooPointToPoint(store, rank, peer, is_sender=is_sender, timeout_s=TIMEOUT_S)

    def send(self, x: Tensor) -> None:
        """See PointToPoint."""
        self._host.send(x.cpu())

    def recv(self, x: Tensor) -> None:
        """See PointToPoint."""
        received = torch.empty_like(x, device="cpu")
        self._host.recv(received)
        x.copy_(received)


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
