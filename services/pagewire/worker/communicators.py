"""How the ranks of a group find each other, and which communicators they get."""

from pathlib import Path
from typing import Final

import torch
from pagewire_kernels.communicator import TIMEOUT_S, Communicator, GlooCommunicator
from torch._C._distributed_c10d import FileStore, PrefixStore

from ..process.group import Place
from .load.rank_agreement import ALONE, Ranks

LOADING_TIMEOUT_S: Final = 3600.0
"""How long a rank waits for others that load: as long as reading a large model and compiling may
take. One that ends is noticed at once."""


class NoCommunicator(ValueError):
    """Ranks cannot be connected on this device; the message says what can be done."""


def connect(place: Place | None, run_dir: Path, device: str) -> Ranks:
    """Returns when all ranks are there. On GPUs, rank r takes the r-th that this process sees.
    Raises NoCommunicator and CommunicatorFailed."""
    if place is None or place.size == 1:
        return ALONE
    path = run_dir / f"{place.group}-{place.life}.store"
    store = FileStore(str(path), place.size)

    def on_cpus(name: str, timeout_s: float) -> Communicator:
        return GlooCommunicator(PrefixStore(name, store), place.rank, place.size, timeout_s)

    host = on_cpus("host", LOADING_TIMEOUT_S)
    layers = (
        _on_gpus(PrefixStore("layers", store), place)
        if device == "cuda"
        else on_cpus("layers", TIMEOUT_S)
    )
    ranks = Ranks(layers, host)
    # Every rank has read the file once all are here.
    ranks.wait()
    if place.rank == 0:
        path.unlink(missing_ok=True)
    return ranks


def _on_gpus(store: PrefixStore, place: Place) -> Communicator:
    """Raises NoCommunicator."""
    count = torch.cuda.device_count()
    if count < place.size:
        raise NoCommunicator(
            f"--tensor-parallel-size {place.size} needs as many GPUs, and this process sees {count}"
        )
    torch.cuda.set_device(place.rank)
    from pagewire_kernels import cuda_communicator

    device = torch.device("cuda", place.rank)
    return cuda_communicator.connect(store, place.rank, place.size, device)
