"""How the ranks of a group find each other, and which communicators they get."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
from pagewire_kernels.communicator import (
    LOOPBACK,
    SINGLE_RANK,
    TIMEOUT_S,
    Communicator,
    GlooCommunicator,
    GlooPointToPoint,
    PointToPoint,
)
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from ..config import ranks_share_a_gpu
from ..process.group import Place
from ..process.hosts import Hosts
from .load.rank_agreement import ALONE, Ranks, StageLinks
from .models.ranks import PipelineStage

STAGE_TIMEOUT_S: Final = 1800.0
"""How long a pipeline stage waits for another one, which computes a whole step meanwhile: a long
prompt may take minutes on a CPU. A rank that ends is noticed at once, one that hangs by whoever
started it."""
LOADING_TIMEOUT_S: Final = 3600.0
"""How long a rank waits for others that load: as long as reading a large model and compiling may
take. One that ends is noticed at once."""


class NoCommunicator(ValueError):
    """Ranks cannot be connected on this device; the message says what can be done."""


def connect(place: Place | None, run_dir: Path, device: str, stages: int = 1) -> Ranks:
    """Returns when all ranks are there. Each of the pipeline `stages` is as many ranks that follow
    each other. On GPUs, rank r takes the r-th that this process sees. Raises NoCommunicator and
    CommunicatorFailed."""
    if place is None or place.size == 1:
        return ALONE
    hosts = Hosts.inherited()
    if hosts is not None:
        return connect_ranks(_store_of(hosts, place), place, device, stages, hosts=hosts)
    path = run_dir / f"{place.group}-{place.life}.store"
    store = FileStore(str(path), place.size)
    ranks = connect_ranks(store, place, device, stages)
    # Every rank has read the file once all are here.
    ranks.wait()
    if place.rank == 0:
        path.unlink(missing_ok=True)
    return ranks


def _store_of(hosts: Hosts, place: Place) -> Store:
    """Where the ranks of several hosts find each other: in memory of rank 0."""
    is_first = place.rank == 0
    return TCPStore(
        hosts.store_host,
        hosts.store_port,
        place.size,
        is_first,
        timedelta(seconds=LOADING_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=hosts.listen_fd if is_first else None,
    )


def connect_ranks(
    store: Store,
    place: Place,
    device: str,
    stages: int,
    stage_timeout_s: float = STAGE_TIMEOUT_S,
    hosts: Hosts | None = None,
) -> Ranks:
    """The same through `store`, which no group has used before. hosts: of a group that has
    several."""
    address = hosts.address if hosts is not None else LOOPBACK
    everyone = PrefixStore("host", store)
    host = GlooCommunicator(everyone, place.rank, place.size, LOADING_TIMEOUT_S, address)
    size = place.size // stages
    stage = PipelineStage(place.rank // size, stages)
    gpu = _take_gpu(place, hosts) if device == "cuda" else None
    layers: Communicator = SINGLE_RANK
    if size > 1:
        own = PrefixStore(f"layers-{stage.index}", store)
        number = place.rank % size
        first = place.rank - number
        layers = (
            GlooCommunicator(own, number, size, TIMEOUT_S, address)
            if gpu is None
            else _on_gpu(own, number, size, gpu, share_memory(hosts, range(first, first + size)))
        )
    links = StageLinks()
    if not stage.is_whole:
        pairs = _Pairs(store, place.rank, gpu, stage_timeout_s, address)
        links = pairs.links(stage, size)
    of_host = hosts.local(place.rank) if hosts is not None else None
    return Ranks(layers, host, stage, links, of_host)


def share_memory(hosts: Hosts | None, ranks: Sequence[int]) -> bool:
    """Whether the GPUs of `ranks` may reach each other's memory: those of one host."""
    return hosts is None or hosts.are_together(ranks)


class _Pairs:
    """Connections of rank `rank` to single other ones. gpu: where its hidden states are, None on a
    CPU. address: of this rank's host."""

    def __init__(
        self,
        store: Store,
        rank: int,
        gpu: torch.device | None,
        timeout_s: float,
        address: str = LOOPBACK,
    ) -> None:
        self._store = store
        self._rank = rank
        self._gpu = gpu
        self._timeout_s = timeout_s
        self._address = address

    def links(self, stage: PipelineStage, size: int) -> StageLinks:
        """Of a rank of a stage of `size` ranks. All connect in the order of the stages."""
        rank = self._rank
        first = rank % size
        last = first + size * (stage.count - 1)
        return StageLinks(
            previous=None if stage.is_first else self._hidden_states(rank - size, rank),
            following=None if stage.is_last else self._hidden_states(rank, rank + size),
            results=self._by_gloo(last, first, "results")
            if stage.is_first or stage.is_last
            else None,
        )

    def _hidden_states(self, sender: int, receiver: int) -> PointToPoint:
        if self._gpu is None:
            return self._by_gloo(sender, receiver, "hidden states")
        from pagewire_kernels.cuda_point_to_point import NcclPointToPoint, StagedPointToPoint

        store, peer, is_sender = self._ends(sender, receiver, "hidden states")
        if ranks_share_a_gpu():
            return StagedPointToPoint(store, self._rank, peer, is_sender=is_sender)
        return NcclPointToPoint(store, self._rank, peer, self._gpu, is_sender=is_sender)

    def _by_gloo(self, sender: int, receiver: int, of: str) -> PointToPoint:
        store, peer, is_sender = self._ends(sender, receiver, of)
        timeout_s = self._timeout_s if self._gpu is None else TIMEOUT_S
        return GlooPointToPoint(
            store,
            self._rank,
            peer,
            is_sender=is_sender,
            timeout_s=timeout_s,
            address=self._address,
        )

    def _ends(self, sender: int, receiver: int, of: str) -> tuple[Store, int, bool]:
        """(a store for the two, the other one, whether this one sends)."""
        is_sender = self._rank == sender
        store = PrefixStore(f"{of}-{sender}-to-{receiver}", self._store)
        return store, receiver if is_sender else sender, is_sender


def gpu_of(place: Place, hosts: Hosts | None) -> tuple[int, int]:
    """(which of the GPUs that it sees a rank takes, how many it must see): those of its host's
    ranks."""
    return (place.rank, place.size) if hosts is None else hosts.local(place.rank)


def _take_gpu(place: Place, hosts: Hosts | None) -> torch.device:
    """This rank's, which is torch's current device from now on. Raises NoCommunicator."""
    if ranks_share_a_gpu():
        return torch.device("cuda", 0)
    number, needed = gpu_of(place, hosts)
    count = torch.cuda.device_count()
    if count < needed:
        raise NoCommunicator(
            f"{needed} ranks need as many GPUs, and this process sees {count}: lower "
            "--tensor-parallel-size or --pipeline-parallel-size"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _on_gpu(
    store: Store, rank: int, size: int, device: torch.device, shares_memory: bool
) -> Communicator:
    """To the other ranks of a tensor-parallel group of `size`."""
    from pagewire_kernels import cuda_communicator

    if not shares_memory:
        return cuda_communicator.NcclCommunicator(store, rank, size, device)
    connect = (
        cuda_communicator.connect_on_one_gpu if ranks_share_a_gpu() else cuda_communicator.connect
    )
    return connect(store, rank, size, device)
