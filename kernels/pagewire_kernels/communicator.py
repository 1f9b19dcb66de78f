"""Collective operations between the ranks of one model: the protocol that the layers of a model
know, its form for one rank, and the one for CPUs. Beside them, the connection of two ranks, through
which pipeline stages hand on hidden states.

Sums are the same bits on every rank and in every run: ranks sample the tokens that they all go on
with, each by itself. Every rank must call the same operations in the same order with tensors of the
same shapes and types.

Who makes a connection waits until all its ranks are there; they find each other in a `store` of
torch's that nobody else has used.
"""

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import torch
import torch.distributed
from torch import Tensor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TIMEOUT_S: Final = 120.0
"""How long a rank waits for the others in one operation: longer than any step takes."""
MOST_SENT: Final = 2
"""Tensors that a rank sends to another one ahead of its receiving them."""


LOOPBACK: Final = "127.0.0.1"
"""The address at which ranks of one host reach each other."""


class CommunicatorFailed(ConnectionError):
    """Another rank did not take part: it has ended, or it hangs. The message says which operation
    waited, and how long."""


class Communicator(Protocol):
    """This process's connection to the other ranks. Tensors are on its device."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, of x's shape and type: added in the order of the ranks in
        float32, then rounded once. May overwrite x and return it. Raises CommunicatorFailed."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' x behind each other along `dim`, in the order of the ranks: contiguous. Raises
        CommunicatorFailed."""
        ...


@runtime_checkable
class NormingCommunicator(Protocol):
    """Of a Communicator that may add up, add a residual and normalise in one kernel."""

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
        """(norm(total), total) of total = all_reduce(x) + residual, all [T, H]; `centre`: a layer
        norm. May overwrite both; residual must be contiguous."""
        ...


@runtime_checkable
class CheckedCommunicator(Protocol):
    """Of a Communicator whose operations run on behind the caller's back, and may fail there."""

    def serve(self) -> None:
        """The ranks have been loaded: from now on none has to wait for another that compiles."""
        ...

    def check(self) -> None:
        """Waits for nothing. Raises CommunicatorFailed if an operation that has ended failed."""
        ...


class CheckedConnections:
    """Several of CheckedCommunicator as one."""

    def __init__(self, connections: Sequence[CheckedCommunicator]) -> None:
        self._connections = connections

    def serve(self) -> None:
        """See CheckedCommunicator."""
        for each in self._connections:
            each.serve()

    def check(self) -> None:
        """See CheckedCommunicator."""
        for each in self._connections:
            each.check()


class PointToPoint(Protocol):
    """One end of a connection from one rank to another. What is sent arrives in its order. Tensors
    are contiguous and on this process's device; the receiver knows their shapes and types."""

    def send(self, x: Tensor) -> None:
        """Hand x to the receiver; it must not change from now on. Waits only while MOST_SENT
        tensors before it have not been received. Raises CommunicatorFailed."""
        ...

    def recv(self, x: Tensor) -> None:
        """Fill x with the next tensor. Raises CommunicatorFailed."""
        ...


class SingleRank:
    """A Communicator without others."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """x itself."""
        return x


SINGLE_RANK: Final = SingleRank()


class GlooCommunicator:
    """A Communicator of processes or threads, on CPU tensors, through torch's gloo."""

    def __init__(
        self,
        store: "Store",
        rank: int,
        size: int,
        timeout_s: float = TIMEOUT_S,
        address: str = LOOPBACK,
    ) -> None:
        """address: of this process's host, by which the other ranks reach it. Raises
        CommunicatorFailed when not all are there within `timeout_s` seconds."""
        self.rank = rank
        self.size = size
        self._timeout_s = timeout_s
        self._who = f"rank {rank} of {size}"
        self._group = _gloo_group(store, rank, size, timeout_s, self._who, address)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Communicator. gloo's own sums are in the type of x, in an order that depends on its
        size."""
        parts = self._gathered(x, "an all-reduce")
        total = parts[0].float()
        for part in parts[1:]:
            total.add_(part)
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """See Communicator."""
        return torch.cat(self._gathered(x, "an all-gather"), dim)

    def _gathered(self, x: Tensor, operation: str) -> list[Tensor]:
        """Every rank's x, as bytes: gloo does not know all types."""
        own = x.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        try:
            self._group.allgather([[_as_bytes(part) for part in parts]], [_as_bytes(own)]).wait()
        except RuntimeError as error:
            raise _failed(self._who, operation, self._timeout_s, error) from None
        return parts


class GlooPointToPoint:
    """A PointToPoint between processes or threads, of CPU tensors, through torch's gloo."""

    def __init__(
        self,
        store: "Store",
        rank: int,
        peer: int,
        *,
        is_sender: bool,
        timeout_s: float = TIMEOUT_S,
        address: str = LOOPBACK,
    ) -> None:
        """From `rank`, which this is, to `peer`, or the other way. address: as of GlooCommunicator.
        Raises CommunicatorFailed when not both are there within `timeout_s` seconds."""
        self._who = f"rank {rank}, connected to rank {peer},"
        self._timeout_s = timeout_s
        number = 0 if is_sender else 1
        self._other = 1 - number
        self._group = _gloo_group(store, number, 2, timeout_s, self._who, address)
        self._sent: deque[Any] = deque()
        """Of each tensor that may not have been received: torch's handle, which keeps its
        memory."""

    def send(self, x: Tensor) -> None:
        """See PointToPoint."""
        try:
            while len(self._sent) >= MOST_SENT:
                self._sent.popleft().wait()
            self._sent.append(self._group.send([_as_bytes(x)], self._other, 0))
        except RuntimeError as error:
            raise _failed(self._who, "sending", self._timeout_s, error) from None

    def recv(self, x: Tensor) -> None:
        """See PointToPoint."""
        try:
            self._group.recv([_as_bytes(x)], self._other, 0).wait()
        except RuntimeError as error:
            raise _failed(self._who, "receiving", self._timeout_s, error) from None


def _gloo_group(
    store: "Store", rank: int, size: int, timeout_s: float, who: str, address: str
) -> Any:
    """torch's group of these ranks. who: this one, in words. Raises CommunicatorFailed."""
    # torch's stubs lack most of this class
    gloo: Any = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout_s)
    try:
        return gloo(store, rank, size, options)
    except RuntimeError as error:
        raise _failed(who, "connecting", timeout_s, error) from None


def _failed(who: str, operation: str, timeout_s: float, error: RuntimeError) -> CommunicatorFailed:
    line = next(iter(str(error).strip().splitlines()), "")
    reason = line.rpartition("] ")[2].partition(". ")[0][:120]
    return CommunicatorFailed(
        f"{who} was left alone in {operation}, for which it waits {timeout_s:g} s: another rank has "
        f"ended or hangs ({reason})"
    )


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
