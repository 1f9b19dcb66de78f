"""How the ranks of a group find each other, and which communicator they get."""

from pathlib import Path

import torch
from pagewire_kernels.communicator import SINGLE_RANK, Communicator, GlooCommunicator
from torch.distributed import FileStore

from ..process.group import Place


class NoCommunicator(ValueError):
    """Ranks cannot be connected on this device; the message says what can be done."""


def connect(place: Place | None, run_dir: Path, device: str) -> Communicator:
    """Returns when all ranks are there. On GPUs, rank r takes the r-th that this process sees.
    Raises NoCommunicator and CommunicatorFailed."""
    if place is None or place.size == 1:
        return SINGLE_RANK
    path = run_dir / f"{place.group}-{place.life}.store"
    store = FileStore(str(path), place.size)
    connected = _on_gpus if device == "cuda" else _on_cpus
    communicator = connected(store, place)
    # Every rank has read the file once all are here.
    communicator.all_gather(torch.zeros(1, device=device), 0)
    if place.rank == 0:
        path.unlink(missing_ok=True)
    return communicator


def _on_cpus(store: FileStore, place: Place) -> Communicator:
    return GlooCommunicator(store, place.rank, place.size)


def _on_gpus(store: FileStore, place: Place) -> Communicator:
    """Raises NoCommunicator."""
    count = torch.cuda.device_count()
    if count < place.size:
        raise NoCommunicator(
            f"--tensor-parallel-size {place.size} needs as many GPUs, and this process sees {count}"
        )
    torch.cuda.set_device(place.rank)
    try:
        from pagewire_kernels.cuda_communicator import CudaCommunicator  # pyright: ignore
    except ModuleNotFoundError:
        raise NoCommunicator(
            f"--tensor-parallel-size {place.size}: ranks on GPUs are not supported in this version; "
            "--device cpu runs them"
        ) from None
    return CudaCommunicator(store, place.rank, place.size)
