"""What each rank of a group would hold, by the same arithmetic as at its start, without loading
anything. `python -m pagewire.worker.load.rank_forecast` answers a Request on its input, so that
others can ask without importing torch themselves.
"""

import sys
from pathlib import Path

import msgspec
from pagewire_kernels.communicator import Communicator, SingleRank

from ...config import ModelConfig, SchedulerConfig, WorkerConfig
from ..device.gpus import Gpu
from ..models.cache_spec import cache_spec
from ..models.ranks import of_rank
from . import kv_dtype, loader, quantizing
from .gpu_plan import plan_gpu
from .kv_sizing import DoesNotFit, Sizing


class Request(msgspec.Struct, frozen=True):
    """path: of the model's files. gpus: those of the ranks, in their order; none on CPUs."""

    path: str
    model: ModelConfig
    scheduler: SchedulerConfig
    worker: WorkerConfig
    gpus: tuple[Gpu, ...] = ()


class Forecast(msgspec.Struct, frozen=True):
    """What every rank has at least. weights, cache: bytes, of the rank with the most weights; tokens:
    of the KV cache. reason: why it does not fit, empty where it does."""

    weights: int = 0
    cache: int = 0
    tokens: int = 0
    max_model_len: int = 0
    reason: str = ""


class _Rank(SingleRank):
    """In the place of a connection to the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def forecast(request: Request) -> Forecast:
    """Raises Unsupported for a model that cannot be served so."""
    size = request.worker.tensor_parallel_size
    sizings: list[Sizing] = []
    for rank in range(size):
        try:
            sizings.append(_sizing(request, _Rank(rank, size)))
        except DoesNotFit as error:
            return Forecast(reason=f"rank {rank} of {size}: {error}")
    blocks = min(sizing.num_blocks for sizing in sizings)
    largest = max(sizings, key=lambda sizing: sizing.weight_bytes)
    return Forecast(
        largest.weight_bytes,
        blocks * largest.block_bytes,
        blocks * largest.block_size,
        min(sizing.max_model_len for sizing in sizings),
    )


def _sizing(request: Request, ranks: Communicator) -> Sizing:
    worker = request.worker
    gpu = request.gpus[ranks.rank] if request.gpus else None
    described = loader.describe_checkpoint(Path(request.path), request.model)
    arch = described.arch
    dtype = loader.choose_dtype(worker.dtype, described.settings, gpu)
    target = quantizing.Target(dtype, gpu.capability if gpu else None)
    chosen = quantizing.choose(described.checkpoint, arch, request.model.quantization, target)
    quantized = chosen.weight_bytes(arch)
    if gpu is not None:
        each = quantized // ranks.size
        return plan_gpu(
            arch, dtype, request.model, worker, gpu, request.scheduler, each, ranks
        ).sizing
    rank_arch = of_rank(arch, ranks.size)
    spec = cache_spec(rank_arch, kv_dtype.choose(worker.kv_cache_dtype, dtype))
    return loader.size_on_cpu(rank_arch, spec, dtype, request.model, worker, quantized, ranks.size)


def main() -> None:
    """Print the forecast as JSON."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    print(msgspec.json.encode(forecast(request)).decode())


if __name__ == "__main__":
    main()
