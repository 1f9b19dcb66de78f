"""What a start on a GPU is planned with: which GPU, how its memory is divided, how large steps get
and who computes attention. Decides before anything large is allocated.
"""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from pagewire_kernels.attention_torch_plan import Shape, workspace
from pagewire_kernels.backend import backend
from pagewire_kernels.capability import attends_by_torch
from pagewire_kernels.communicator import SINGLE_RANK, Communicator

from ...config import LARGE_GPU, ModelConfig, SchedulerConfig, WorkerConfig
from ..device import gpus
from ..device.gpus import Gpu
from ..models.architecture import Architecture
from ..models.cache_spec import CacheSpec, cache_spec
from ..models.decoder import Decoder
from ..models.fallback import OtherArchitecture
from ..models.layers import Build
from ..models.ranks import WHOLE_MODEL, PipelineStage, of_rank
from ..models.weight_slots import Shard
from . import gpu_memory, kv_dtype, kv_sizing
from .gpu_memory import Load, MemoryRequest
from .kv_sizing import DoesNotFit, Sizing

log = logging.getLogger("pagewire.worker")
FEWER_ROWS: Final = (128, 64)
"""What is tried on a small GPU where nobody said how many."""
ROW_TOKENS: Final = 128
"""Rows that have less of the KV cache each are too many: what is reserved for them would serve
better as blocks."""


@dataclass(frozen=True)
class GpuPlan:
    """step_tokens, rows: most tokens and most requests of a step."""

    sizing: Sizing
    step_tokens: int
    rows: int
    attends_by_torch: bool


def look_at_gpu(ranks: int = 1) -> Gpu:
    """The GPU that the model, or a rank's part of it, goes to. Raises gpus.NoUsableGpu where our
    kernels cannot run on it."""
    gpu = gpus.survey(torch.cuda.current_device())
    gpus.check(gpu, torch.cuda.get_arch_list())
    # the other ranks' GPUs are in use, or will be
    if ranks == 1 and (line := gpus.idle_elsewhere(gpu)):
        log.warning(line)
    return gpu


def plan_gpu(
    arch: Architecture,
    dtype: torch.dtype,
    model: ModelConfig,
    config: WorkerConfig,
    gpu: Gpu,
    scheduler: SchedulerConfig,
    quantized: int = 0,
    communicator: Communicator = SINGLE_RANK,
    stage: PipelineStage = WHOLE_MODEL,
) -> GpuPlan:
    """Of a rank, which has `stage` of the model with the others of `communicator`. quantized: bytes
    of its weights where some stay quantized, 0 where all are full. Raises kv_sizing.DoesNotFit. What
    is chosen by the GPU's kind is told in the log."""
    by_torch = attends_by_torch(gpu.capability)
    if by_torch:
        major, minor = gpu.capability
        log.warning(
            f"{gpu.title()} has compute capability {major}.{minor}; below 8.0 Triton has no tensor cores, so attention and products run "
            f"through torch, without CUDA graphs (--enforce-eager)"
        )
    weights = quantized or weight_bytes(arch, dtype, communicator, stage)
    # every rank of the last stage has all logits
    vocab_size = arch.vocab_size if stage.is_last else 0
    arch = replace(of_rank(arch, communicator.size, stage), vocab_size=vocab_size)
    tokens = scheduler.step_tokens(True, gpu.total, stage.count)
    cache = cache_spec(arch, kv_dtype.choose(config.kv_cache_dtype, dtype))

    def size(rows: int) -> Sizing:
        load = Load(tokens, rows, model.max_model_len or arch.max_position, stage=stage)
        load = load_of(arch, dtype.itemsize, cache, gpu, weights, config, load)
        request = memory_request(model, config)
        return gpu_memory.size(arch, dtype.itemsize, cache, weights, gpu, request, load)

    rows, sizing = most_rows(scheduler, gpu, size)
    return GpuPlan(sizing, tokens, rows, by_torch)


def most_rows(
    scheduler: SchedulerConfig, gpu: Gpu, size: Callable[[int], Sizing]
) -> tuple[int, Sizing]:
    """(rows, what `size` gives for them): as many as asked for or usual; on a small GPU where
    nobody asked, fewer when the KV cache would be too small for them. Raises what `size` raises."""
    usual = scheduler.num_seqs()
    if scheduler.max_num_seqs or gpu.total >= LARGE_GPU:
        return usual, size(usual)
    for rows in (usual, *FEWER_ROWS):
        with contextlib.suppress(DoesNotFit):
            sizing = size(rows)
            if sizing.num_blocks * sizing.block_size >= rows * ROW_TOKENS:
                return rows, sizing
    return FEWER_ROWS[-1], size(FEWER_ROWS[-1])


def memory_request(model: ModelConfig, config: WorkerConfig) -> MemoryRequest:
    """What the flags of a model and a worker ask of the GPU's memory."""
    share = config.gpu_memory_utilization
    blocks = config.num_kv_blocks
    return MemoryRequest(
        share,
        config.block_size,
        config.kv_cache_memory_bytes,
        blocks,
        model.max_model_len,
        config.fit,
    )


def load_of(
    arch: Architecture,
    itemsize: int,
    cache: CacheSpec,
    gpu: Gpu,
    weights: int,
    config: WorkerConfig,
    load: Load,
) -> Load:
    """`load` with what follows from the kinds of GPU and model. weights: bytes."""
    fused = not isinstance(arch, OtherArchitecture)
    if not attends_by_torch(gpu.capability):
        return replace(load, graphs=fused and not config.enforce_eager, fused=fused)
    held = max(0, gpu.free - weights) // cache.block_bytes(1)
    shape = Shape(arch.num_heads, arch.num_kv_heads, arch.head_dim)
    return replace(
        load,
        graphs=False,
        fused=fused,
        attention=workspace(shape, min(load.positions, held), itemsize, cache.itemsize),
    )


def weight_bytes(
    arch: Architecture,
    dtype: torch.dtype,
    communicator: Communicator = SINGLE_RANK,
    stage: PipelineStage = WHOLE_MODEL,
) -> int:
    """Of all weights that this rank will have on its GPU, asked of a model without memory."""
    if isinstance(arch, OtherArchitecture):
        return arch.parameters * dtype.itemsize
    shard = Shard(communicator.rank, communicator.size)
    model = Decoder(arch, Build(backend("cuda"), dtype, "meta", shard=shard, stage=stage))
    return max(
        model.nbytes,
        kv_sizing.weight_bytes(model.rank_arch, dtype.itemsize, head_copy=False, stage=stage),
    )
