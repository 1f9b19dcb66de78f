"""Connects ranks on GPUs of one host: NCCL, symmetric memory, and the choice between them by timing.

Where a GPU cannot reach another one's memory, all goes through NCCL. NVLink multicast stays off: a
program that ends badly while it uses it can put a whole host's GPUs out of service.
"""

import base64
import json
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from . import symmetric_memory
from .all_gather import takes_low_latency as gather_is_small
from .all_reduce import takes_low_latency as sum_is_small
from .communicator import TIMEOUT_S, Communicator, CommunicatorFailed, GlooCommunicator
from .graph_capture import capture
from .symmetric_communicator import (
    GATHERS,
    LIBRARY,
    LOW_LATENCY,
    ONE_SHOT,
    SUMS,
    TWO_SHOT,
    Crossings,
    SymmetricCommunicator,
    crossings,
)
from .symmetric_memory import Layout, SymmetricMemory

log = logging.getLogger("pagewire.kernels")

WAIT_S: Final = 600.0
"""How long a kernel, and NCCL, wait for other ranks while they load: compiling a kernel may take one
of them longer than another. See also SymmetricCommunicator.serve."""
SIZES: Final = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Bytes at which the ways are timed; each is the choice for what is smaller, down to the one
before."""
REPEATS: Final = 20
WIDTH: Final = 8192
"""Bytes of a row in the timing."""
NO_MULTICAST: Final = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


class NcclCommunicator:
    """A Communicator by NCCL, over the process's default group. NCCL's sums are the same bits on all
    ranks, but in an order of its own."""

    def __init__(self, store: Store, rank: int, size: int, device: torch.device) -> None:
        """Returns when NCCL can be captured, too. Raises CommunicatorFailed."""
        os.environ.update(NO_MULTICAST)
        self.rank = rank
        self.size = size
        torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                "nccl",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=WAIT_S),
                device_id=device,
            )
            x = torch.zeros(size, device=device)
            self.all_reduce(x)
            self.all_gather(x, 0)
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise CommunicatorFailed(
                f"rank {rank} of {size} cannot connect by NCCL on {device}: {_reason(error)}; NCCL_DEBUG=INFO says more, "
                "and a /dev/shm that is too small (--shm-size, --ipc=host) is a frequent cause"
            ) from None

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Communicator; x is overwritten."""
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """See Communicator."""
        gathered = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return torch.cat(list(gathered), dim)


class StagedCommunicator:
    """A Communicator by gloo, through copies in the host's memory: for ranks that share a GPU, which
    NCCL refuses. It cannot be captured."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """Raises CommunicatorFailed."""
        self.rank = rank
        self.size = size
        self._host = GlooCommunicator(store, rank, size, TIMEOUT_S)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Communicator."""
        return self._host.all_reduce(x.cpu()).to(x.device)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """See Communicator."""
        return self._host.all_gather(x.cpu(), dim).to(x.device)


def connect_on_one_gpu(
    store: Store,
    rank: int,
    size: int,
    device: torch.device,
    layout: Layout | None = None,
    timeout_s: float = WAIT_S,
) -> SymmetricCommunicator:
    """See `connect`, for ranks that share `device`: to try kernels, graphs and ranks on a machine
    with a single GPU. Nothing is timed, since the GPU gives its time to one process after another:
    a collective operation takes milliseconds. Raises CommunicatorFailed."""
    torch.cuda.set_device(device)
    layout = layout or Layout(size)
    library = StagedCommunicator(PrefixStore("library", store), rank, size)
    try:
        addresses, kept = _by_ipc(store, rank, layout, device)
    except RuntimeError as error:
        raise CommunicatorFailed(
            f"rank {rank} of {size} cannot reach the memory of the others on {device}: {_reason(error)}"
        ) from None
    memory = symmetric_memory.make(rank, layout, addresses, device, timeout_s, kept)
    torch.cuda.synchronize(device)
    library.all_reduce(torch.zeros(1, device=device))  # regions hold zeros on all ranks
    packed = layout.packed_bytes + 1
    sums = Crossings([(0, LOW_LATENCY), (packed, ONE_SHOT), (4 * packed, TWO_SHOT)])
    gathers = Crossings([(0, LOW_LATENCY), (packed, ONE_SHOT)])
    return SymmetricCommunicator(memory, library, sums, gathers)


def connect(
    store: Store,
    rank: int,
    size: int,
    device: torch.device,
    layout: Layout | None = None,
    timeout_s: float = WAIT_S,
) -> Communicator:
    """The ranks' fastest Communicator, a SymmetricCommunicator where every GPU can reach the memory
    of all others; call it before anything is captured, on all ranks at once. Raises
    CommunicatorFailed."""
    library = NcclCommunicator(store, rank, size, device)
    memory = _symmetric_memory(store, rank, layout or Layout(size), device, timeout_s)
    if memory is None:
        return library
    start = Crossings([(0, LIBRARY)])
    communicator = SymmetricCommunicator(memory, library, start, start)
    communicator.sums = _agreed(_timed_sums(communicator, device), rank)
    communicator.gathers = _agreed(_timed_gathers(communicator, device), rank)
    if rank == 0:
        log.info("all-reduce from bytes on: %s", communicator.sums.ways)
        log.info("all-gather from bytes on: %s", communicator.gathers.ways)
    return communicator


def _symmetric_memory(
    store: Store, rank: int, layout: Layout, device: torch.device, timeout_s: float
) -> SymmetricMemory | None:
    """None where any rank can get none; all ranks agree."""
    reason = ""
    for get in (_by_torch, _by_ipc):
        reason = ""
        addresses: list[int] = []
        kept: tuple[Any, ...] = ()
        try:
            _require_peer_access(device, layout.size)
            addresses, kept = get(store, rank, layout, device)
        except Exception as error:  # torch raises many kinds; NCCL does not need this memory
            reason = _reason(error)
        failed = torch.tensor(float(bool(reason)), device=device)
        dist.all_reduce(failed)
        if not failed.item():
            memory = symmetric_memory.make(rank, layout, addresses, device, timeout_s, kept)
            torch.cuda.synchronize(device)
            dist.barrier()  # regions hold zeros on all ranks
            return memory
    log.warning(
        "rank %d of %d: GPUs cannot read each other's memory (%s); NCCL takes all collective operations, "
        "which is slower for few rows",
        rank,
        layout.size,
        reason or "another rank says why",
    )
    return None


def _require_peer_access(device: torch.device, size: int) -> None:
    """Of the GPUs that this process sees; where it sees only its own, mapping shows."""
    seen = torch.cuda.device_count()
    if seen < size:
        return
    for other in range(seen):
        if other != device.index and not torch.cuda.can_device_access_peer(device, other):
            raise RuntimeError(f"no peer access from {device} to cuda:{other}")


def _by_torch(
    store: Store, rank: int, layout: Layout, device: torch.device
) -> tuple[list[int], tuple[Any, ...]]:
    """Addresses of zeroed regions, by torch's symmetric memory."""
    import torch.distributed._symmetric_memory as symm_mem

    own = symm_mem.empty(layout.nbytes, dtype=torch.uint8, device=device)
    own.zero_()
    group: Any = dist.group.WORLD
    handle: Any = symm_mem.rendezvous(own, group.group_name)
    offset = getattr(handle, "offset", 0)
    return [address + offset for address in handle.buffer_ptrs], (own, handle)


def _by_ipc(
    store: Store, rank: int, layout: Layout, device: torch.device
) -> tuple[list[int], tuple[Any, ...]]:
    """The same by handles of CUDA's inter-process communication, which go through the store."""
    own = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    handle = own.untyped_storage()._share_cuda_()
    store.set(f"region {rank}", _written(handle))
    regions: list[Any] = []
    for peer in range(layout.size):
        if peer == rank:
            regions.append(own)
            continue
        fields = _read(store.get(f"region {peer}"))
        opened: Any = torch.UntypedStorage._new_shared_cuda(*fields)
        regions.append(opened)
    return [region.data_ptr() for region in regions], (own, regions)


def _written(handle: tuple[Any, ...]) -> str:
    fields = [
        {"bytes": base64.b64encode(each).decode()} if isinstance(each, bytes) else each
        for each in handle
    ]
    return json.dumps(fields)


def _read(text: bytes) -> list[Any]:
    return [
        base64.b64decode(each["bytes"]) if isinstance(each, dict) else each
        for each in json.loads(text)
    ]


def _reason(error: BaseException) -> str:
    """The first line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


Times = dict[int, dict[str, float]]


def _timed_sums(communicator: SymmetricCommunicator, device: torch.device) -> Times:
    memory = communicator.memory
    times: Times = {}
    for nbytes in SIZES:
        if nbytes > memory.layout.buffer_bytes:
            continue
        x = torch.ones(nbytes // WIDTH, WIDTH // 2, dtype=torch.bfloat16, device=device)
        for way, kernel in SUMS.items():
            if way != LOW_LATENCY or sum_is_small(memory, x):
                _note(times, nbytes, way, lambda kernel=kernel, x=x: kernel(memory, x))
        _note(times, nbytes, LIBRARY, lambda x=x: communicator.library.all_reduce(x))
    return times


def _timed_gathers(communicator: SymmetricCommunicator, device: torch.device) -> Times:
    memory = communicator.memory
    times: Times = {}
    for nbytes in SIZES:
        if nbytes > memory.layout.buffer_bytes:
            continue
        x = torch.ones(nbytes // WIDTH, WIDTH // 4, device=device)
        for way, kernel in GATHERS.items():
            if way == ONE_SHOT or gather_is_small(memory, x, 1):
                _note(times, nbytes, way, lambda kernel=kernel, x=x: kernel(memory, x, 1))
        _note(times, nbytes, LIBRARY, lambda x=x: communicator.library.all_gather(x, 1))
    return times


def _note(times: Times, nbytes: int, way: str, run: Callable[[], Any]) -> None:
    times.setdefault(nbytes, {})[way] = time_captured(run, REPEATS)


def time_captured(run: Callable[[], Any], repeats: int) -> float:
    """Seconds that `run` takes in a captured graph of so many of them: the median of five replays,
    of the slowest rank. Collective."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    torch.cuda.synchronize()
    taken: list[float] = []
    for _ in range(5):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / repeats)
    slowest = torch.tensor(sorted(taken)[2], device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _agreed(times: Times, rank: int) -> Crossings:
    """What rank 0 makes of its times."""
    text = json.dumps(crossings(times).ways).encode()
    length = torch.tensor(len(text), device="cuda")
    dist.broadcast(length, 0)
    sent = torch.zeros(int(length.item()), dtype=torch.uint8, device="cuda")
    if rank == 0:
        sent.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(sent, 0)
    return Crossings([(least, way) for least, way in json.loads(bytes(sent.tolist()))])
