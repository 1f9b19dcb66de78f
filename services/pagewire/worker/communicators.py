"""How the ranks of a group find each other, and which communicators they get."""

from pathlib import Path
from typing import Final

import torch
from pagewire_kernels.communicator import (
    SINGLE_RANK,
    TIMEOUT_S,
    Communicator,
    GlooCommunicator,
    GlooPointToPoint,
    PointToPoint,
)
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from ..config import STAGES_ON_GPUS, ranks_share_a_gpu
from ..process.group import Place
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
    path = run_dir / f"{place.group}-{place.life}.store"
    store = FileStore(str(path), place.size)
    ranks = connect_ranks(store, place, device, stages)
    # Every rank has read the file once all are here.
    ranks.wait()
    if place.rank == 0:
        path.unlink(missing_ok=True)
    return ranks


def connect_ranks(
    store: Store, place: Place, device: str, stages: int, stage_timeout_s: float = STAGE_TIMEOUT_S
) -> Ranks:
    """The same through `store`, which no group has used before."""
    host = GlooCommunicator(PrefixStore("host", store), place.rank, place.size, LOADING_TIMEOUT_S)
    if device == "cuda":
        if stages > 1:
            raise NoCommunicator(f"--pipeline-parallel-size {stages}: {STAGES_ON_GPUS}")
        return Ranks(_on_gpus(PrefixStore("layers", store), place), host)
    size = place.size // stages
    stage = PipelineStage(place.rank // size, stages)
    layers: Communicator = SINGLE_RANK
    if size > 1:
        own = PrefixStore(f"layers-{stage.index}", store)
        layers = GlooCommunicator(own, place.rank % size, size, TIMEOUT_S)
    return Ranks(layers, host, stage, _links(store, place.rank, size, stage, stage_timeout_s))


def _links(
    store: Store, rank: int, size: int, stage: PipelineStage, timeout_s: float
) -> StageLinks:
    """Of a rank of a stage of `size` ranks. All connect in the order of the stages."""
    if stage.is_whole:
        return StageLinks()

    def link(sender: int, receiver: int) -> PointToPoint:
        own = PrefixStore(f"{sender}-to-{receiver}", store)
        is_sender = rank == sender
        peer = receiver if is_sender else sender
        return GlooPointToPoint(own, rank, peer, is_sender=is_sender, timeout_s=timeout_s)

    first = rank % size
    last = first + size * (stage.count - 1)
    return StageLinks(
        previous=None if stage.is_first else link(rank - size, rank),
        following=None if stage.is_last else link(rank, rank + size),
        results=link(last, first) if stage.is_first or stage.is_last else None,
    )


def _on_gpus(store: PrefixStore, place: Place) -> Communicator:
    """Raises NoCommunicator."""
    from pagewire_kernels import cuda_communicator

    if ranks_share_a_gpu():
        device = torch.device("cuda", 0)
        return cuda_communicator.connect_on_one_gpu(store, place.rank, place.size, device)
    count = torch.cuda.device_count()
    if count < place.size:
        raise NoCommunicator(
            f"--tensor-parallel-size {place.size} needs as many GPUs, and this process sees {count}"
        )
    torch.cuda.set_device(place.rank)
    device = torch.device("cuda", place.rank)
    return cuda_communicator.connect(store, place.rank, place.size, device)
