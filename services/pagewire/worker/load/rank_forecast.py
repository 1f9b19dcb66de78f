"""What each rank of a group would hold, by the same arithmetic as at its start, without loading
anything. `python -m pagewire.worker.load.rank_forecast` answers a Request on its input, so that
others can ask without importing torch themselves.
"""

import sys
from pathlib import Path

import msgspec
from pagewire_kernels.communicator import SingleRank

from ...config import ModelConfig, SchedulerConfig, WorkerConfig
from ..device.gpus import Gpu
from ..models.ranks import PipelineStage
from . import loader
from .kv_sizing import DoesNotFit, Sizing
from .rank_agreement import Ranks


class Request(msgspec.Struct, frozen=True):
    """path: of the model's files. gpus: those of the ranks, in their order; none on CPUs."""

    path: str
    model: ModelConfig
    scheduler: SchedulerConfig
    worker: WorkerConfig
    gpus: tuple[Gpu, ...] = ()


class StageForecast(msgspec.Struct, frozen=True):
    """What each rank of a pipeline stage has. weights, cache: bytes, of the rank with the most
    weights."""

    layers: int
    weights: int
    cache: int


class Forecast(msgspec.Struct, frozen=True):
    """stages: in their order, one of them where the layers are not divided; tokens: of the KV
    cache, and max_model_len: what all ranks have. reason: why it does not fit, empty where it
    does."""

    stages: tuple[StageForecast, ...] = ()
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
    described = loader.describe_checkpoint(Path(request.path), request.model)
    stages: list[list[Sizing]] = [[] for _ in range(request.worker.pipeline_parallel_size)]
    for rank in range(request.worker.world_size):
        ranks = _ranks(request.worker, rank)
        loader.check_divided(described, ranks)
        try:
            stages[ranks.stage.index].append(_sizing(request, described, ranks))
        except DoesNotFit as error:
            return Forecast(reason=f"rank {rank} of {ranks.size}: {error}")
    every = [sizing for sizings in stages for sizing in sizings]
    blocks = min(sizing.num_blocks for sizing in every)
    return Forecast(
        tuple(
            _of_stage(PipelineStage(index, len(stages)), sizings, described, blocks)
            for index, sizings in enumerate(stages)
        ),
        blocks * request.worker.block_size,
        min(sizing.max_model_len for sizing in every),
    )


def _ranks(worker: WorkerConfig, rank: int) -> Ranks:
    """As rank `rank` of a group has them, without connections."""
    size = worker.tensor_parallel_size
    stage = PipelineStage(rank // size, worker.pipeline_parallel_size)
    return Ranks(_Rank(rank % size, size), _Rank(rank, worker.world_size), stage)


def _of_stage(
    stage: PipelineStage, sizings: list[Sizing], described: loader.Description, blocks: int
) -> StageForecast:
    largest = max(sizings, key=lambda sizing: sizing.weight_bytes)
    layers = len(stage.layers(described.arch.num_layers))
    return StageForecast(layers, largest.weight_bytes, blocks * largest.block_bytes)


def _sizing(request: Request, described: loader.Description, ranks: Ranks) -> Sizing:
    model = request.model
    worker = request.worker
    gpu = request.gpus[ranks.rank] if request.gpus else None
    load_plan = loader.plan_load(described, model, worker, gpu, ranks)
    sizing, _ = loader.plan_memory(described, load_plan, model, worker, request.scheduler)
    return sizing


def main() -> None:
    """Print the forecast as JSON."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    print(msgspec.json.encode(forecast(request)).decode())


if __name__ == "__main__":
    main()
