"""From settings to a loaded model: which files, which type, how much memory, and the weights in
place. Runs once, before the first step."""

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec import structs
from pagewire_kernels.backend import Ops, backend
from pagewire_kernels.kv_cache import KVScales
from torch import Tensor

from ...checkpoint import end_tokens, quantization
from ...checkpoint.chat_templates import read_option
from ...config import ModelConfig, SchedulerConfig, WorkerConfig
from ...hub.huggingface import tokenizer_path
from ..device import gpus, processor
from ..device.gpus import Gpu
from ..models import FAMILIES, describe, fallback, rotary
from ..models.architecture import Architecture, Config, Unsupported, read_config
from ..models.cache_spec import CacheSpec, cache_spec
from ..models.decoder import Decoder
from ..models.dense import DenseMethod
from ..models.fallback import FallbackDecoder, Plan
from ..models.layers import Build, MethodChoice
from ..models.quantized_weights import QuantizedMethod
from ..models.ranks import check_ranks, check_undivided, of_rank
from ..models.weight_slots import Shard
from . import (
    cpu_crossings,
    kv_dtype,
    kv_sizing,
    memory_errors,
    precision,
    quantizing,
    weights,
)
from .gguf_file import Gguf
from .gpu_plan import GpuPlan, look_at_gpu, plan_gpu
from .in_thread import run_in_thread
from .kv_sizing import Sizing
from .pytorch_file import PytorchFiles
from .quantizing import Checkpoint, Quantizing
from .rank_agreement import ALONE, Ranks, agreed, agreed_plan, check_gpus, named_rank
from .sources import locate
from .weights import Source

log = logging.getLogger("pagewire.worker")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Loaded:
    """A model ready to run, or the part of one that a rank has. dtype: of its activations. cache
    [layers, 2, blocks, Hkv, block_size, D] is that of the one group of layers that there is;
    cos_sin[layer] is [positions, D], the same tensor for layers that rotate alike. Layers are
    counted from the first that is here."""

    decoder: Decoder | FallbackDecoder
    dtype: torch.dtype
    sizing: Sizing
    cos_sin: list[Tensor]
    cache_spec: CacheSpec
    cache: Tensor
    eos_token_ids: tuple[int, ...]
    device: str
    plan: GpuPlan | None = None
    """On a GPU: what its memory was divided for."""

    @property
    def on_gpu(self) -> GpuPlan:
        """The plan, of a model on a GPU."""
        assert self.plan is not None
        return self.plan

    @property
    def capturable(self) -> bool:
        """Whether a forward pass may be captured as a CUDA graph on this GPU."""
        by_torch = self.plan is not None and self.plan.attends_by_torch
        return isinstance(self.decoder, Decoder) and not by_torch

    @property
    def caches(self) -> list[Tensor]:
        """Of each layer [2, blocks, Hkv, block_size, D], views of `cache`."""
        return self.cache_spec.layer_caches([self.cache])


@dataclass(frozen=True)
class Description:
    """A checkpoint as its configuration describes it. `fallback_plan`: of a model that has no
    implementation here and runs through transformers."""

    settings: Config
    arch: Architecture
    checkpoint: Checkpoint
    eos_token_ids: tuple[int, ...]
    fallback_plan: Plan | None


@dataclass(frozen=True)
class LoadPlan:
    """As what a model is loaded, and by which of `ranks`. gpu: where its part goes; None: it stays
    in the CPU's memory."""

    gpu: Gpu | None
    ranks: Ranks
    dtype: torch.dtype
    quantizing: Quantizing

    @property
    def device(self) -> str:
        """Torch's name of it."""
        return "cuda" if self.gpu else "cpu"

    def part_of(self, arch: Architecture) -> Architecture:
        """Of the model `arch`, what this rank has."""
        return of_rank(arch, self.ranks.layers.size, self.ranks.stage)


def load(
    path: Path,
    model: ModelConfig,
    config: WorkerConfig,
    progress: weights.Progress,
    scheduler: SchedulerConfig | None = None,
    ranks: Ranks = ALONE,
) -> Loaded:
    """The model at `path` (a directory or a .gguf file), or the part of it that one of several
    ranks has. `scheduler` says how large steps get. Raises Unsupported, kv_sizing.DoesNotFit,
    gpus.NoUsableGpu or memory_errors.GpuFailed with what is wrong and what to do."""
    _use_cores(config.threads, ranks)
    gpu = _gpu(config.device, ranks)
    described = describe_checkpoint(path, model)
    check_divided(described, ranks)
    _check(described, model)
    if described.fallback_plan:
        config = structs.replace(config, enforce_eager=True)
    load_plan = plan_load(described, model, config, gpu, ranks)
    rank_arch = load_plan.part_of(described.arch)
    kv_scales = _kv_scales(described, config)
    sizing, plan = _agreed_memory(
        described, load_plan, model, config, scheduler or SchedulerConfig()
    )
    _log_size(described.arch, load_plan, sizing)
    spec = cache_spec(rank_arch, kv_dtype.choose(config.kv_cache_dtype, load_plan.dtype))
    with torch.inference_mode(), memory_errors.explained("loading the model", sizing):
        decoder = _read(described, load_plan, kv_scales, model, progress)
        (group,) = spec.groups
        cache = group.allocate(sizing.num_blocks, sizing.block_size, load_plan.device)
    return Loaded(
        decoder,
        load_plan.dtype,
        sizing,
        _rotary_tables(rank_arch, sizing.max_model_len, load_plan.device),
        spec,
        cache,
        described.eos_token_ids,
        load_plan.device,
        plan,
    )


def _use_cores(threads: int, ranks: Ranks) -> None:
    """threads: 0 for a fair share of those that this process may use."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // ranks.local[1]))


def _gpu(device: str, ranks: Ranks) -> Gpu | None:
    """This rank's; None where `device` means the CPU. Raises gpus.NoUsableGpu."""
    if choose_device(device) != "cuda":
        return None
    gpu = look_at_gpu(ranks.size)
    check_gpus(gpu, ranks.host)
    return gpu


def plan_load(
    described: Description, model: ModelConfig, config: WorkerConfig, gpu: Gpu | None, ranks: Ranks
) -> LoadPlan:
    """Choose the type of activations, and which weights stay quantized, or become so. Raises
    Unsupported."""
    dtype = choose_dtype(config.dtype, described.settings, gpu)
    target = quantizing.Target(dtype, gpu.capability if gpu else None)
    chosen = quantizing.choose(described.checkpoint, described.arch, model.quantization, target)
    return LoadPlan(gpu, ranks, dtype, chosen)


def plan_memory(
    described: Description,
    load_plan: LoadPlan,
    model: ModelConfig,
    config: WorkerConfig,
    scheduler: SchedulerConfig,
) -> tuple[Sizing, GpuPlan | None]:
    """How this rank's memory would be divided; on a GPU also for which steps. Raises
    kv_sizing.DoesNotFit."""
    gpu = load_plan.gpu
    if gpu is None:
        return _size_on_cpu(described.arch, load_plan, model, config), None
    ranks = load_plan.ranks
    stage = ranks.stage
    arch = described.arch
    quantized = load_plan.quantizing.weight_bytes(arch)
    share = quantized // ranks.size
    if not stage.is_whole:
        share = kv_sizing.rank_share(quantized, arch, load_plan.part_of(arch), stage)
    plan = plan_gpu(
        arch, load_plan.dtype, model, config, gpu, scheduler, share, ranks.layers, stage
    )
    return plan.sizing, plan


def _agreed_memory(
    described: Description,
    load_plan: LoadPlan,
    model: ModelConfig,
    config: WorkerConfig,
    scheduler: SchedulerConfig,
) -> tuple[Sizing, GpuPlan | None]:
    """See `plan_memory`, with no more than any rank has."""
    host = load_plan.ranks.host
    with named_rank(host):
        sizing, plan = plan_memory(described, load_plan, model, config, scheduler)
    if plan is None:
        return agreed(sizing, host), None
    plan = agreed_plan(plan, host)
    return plan.sizing, plan


def check_divided(described: Description, ranks: Ranks) -> None:
    """Raises Unsupported for a model that cannot be divided so."""
    arch = described.arch
    if described.fallback_plan:
        check_undivided(arch.model_type, ranks.layers.size, ranks.stage.count)
    check_ranks(arch, ranks.layers.size, ranks.stage.count)


def _check(described: Description, model: ModelConfig) -> None:
    """Raises Unsupported for a model that cannot be loaded as it is asked for."""
    if described.fallback_plan and model.quantization:
        raise Unsupported(
            f"--quantization {model.quantization} is not supported for models that run through transformers"
        )


def _read(
    described: Description,
    load_plan: LoadPlan,
    kv_scales: tuple[KVScales, ...],
    model: ModelConfig,
    progress: weights.Progress,
) -> Decoder | FallbackDecoder:
    """The weights, where they belong."""
    if described.fallback_plan is None:
        decoder = _load_decoder(described, load_plan, kv_scales, model.seed, progress)
    else:
        decoder = _load_fallback(described, described.fallback_plan, load_plan, model, progress)
    if load_plan.device == "cuda":
        # Tensors are converted on the GPU: what that took is not to be missing from the cache.
        torch.cuda.empty_cache()
    return decoder


def describe_checkpoint(path: Path, model: ModelConfig) -> Description:
    """Raises Unsupported."""
    source, settings, eos = open_model(path, model)
    if settings.get("model_type") in FAMILIES:
        checkpoint = _checkpoint(path, source, settings)
        return Description(settings, describe(settings), checkpoint, eos, None)
    plan = plan_other(path, source, settings, model)
    return Description(settings, plan.arch, Checkpoint(source), eos, plan)


def _log_size(arch: Architecture, load_plan: LoadPlan, sizing: Sizing) -> None:
    """The first rank speaks for all. Those of one pipeline stage are alike."""
    ranks = load_plan.ranks
    if ranks.rank:
        return
    on = "cuda" if load_plan.gpu else processor.look().title()
    size = f"{arch.parameters / 1e6:,.0f} M parameters"
    log.info("%s with %s as %s on %s", arch.model_type, size, load_plan.dtype, on)
    if not ranks.stage.is_whole:
        log.info(
            "divided among %d pipeline stages of %d rank(s); one with %d layers has:",
            ranks.stage.count,
            ranks.layers.size,
            len(ranks.stage.layers(arch.num_layers)),
        )
    elif ranks.size > 1:
        log.info("divided among %d ranks; each of them has:", ranks.size)
    for line in sizing.lines():
        log.info(line)


def _load_decoder(
    described: Description,
    load_plan: LoadPlan,
    kv_scales: tuple[KVScales, ...],
    seed: int,
    progress: weights.Progress,
) -> Decoder:
    """A model of a family that is implemented here."""
    stage = load_plan.ranks.stage
    communicator = load_plan.ranks.layers
    device = load_plan.device
    chosen = load_plan.quantizing
    ops = backend(device)
    method = method_choice(ops, load_plan.dtype, device, chosen)
    shard = Shard(communicator.rank, communicator.size)
    build = Build(ops, load_plan.dtype, device, method, shard, kv_scales, communicator, stage)
    decoder = Decoder(described.arch, build)
    checkpoint = described.checkpoint
    weights.load(
        decoder,
        checkpoint.source,
        described.settings,
        seed,
        progress,
        chosen.kept,
        checkpoint.form,
    )
    if chosen.kept and device == "cpu":
        cpu_crossings.choose(decoder.packed(), load_plan.dtype)
    return decoder


def _load_fallback(
    described: Description,
    plan: Plan,
    load_plan: LoadPlan,
    model: ModelConfig,
    progress: weights.Progress,
) -> FallbackDecoder:
    """Any other model, through transformers: in a thread, since that tells no progress."""
    load_model = functools.partial(
        plan.load,
        model.load_format,
        backend(load_plan.device),
        load_plan.dtype,
        load_plan.device,
        model.seed,
        weights.tensors_for_transformers(described.checkpoint.source),
    )
    return run_in_thread(load_model, lambda: progress("loading weights through transformers", 0.0))


def _checkpoint(path: Path, source: Source | None, settings: Config) -> Checkpoint:
    """With the format of weights that come quantized. Raises Unsupported."""
    if not path.is_dir() or isinstance(source, Gguf):
        return Checkpoint(source)
    return Checkpoint(source, quantizing.read_format(quantization.of_checkpoint(path, settings)))


def _kv_scales(described: Description, config: WorkerConfig) -> tuple[KVScales, ...]:
    """Of each layer; empty where the KV cache has none."""
    tensors = weights.tensors_named(described.checkpoint.source, kv_dtype.is_scale)
    quantization_settings = described.settings.get("quantization_config") or {}
    num_layers = described.arch.num_layers
    return kv_dtype.scales(tensors, num_layers, quantization_settings, config.kv_cache_dtype)


def method_choice(
    ops: Ops, dtype: torch.dtype, device: str, chosen: Quantizing
) -> MethodChoice | None:
    """The format of each layer's matrices; None: all are dense, as they come."""
    if chosen.kept and ops.quantized is not None:
        kept = QuantizedMethod(ops, ops.quantized, dtype, device, chosen.rounding)
        return lambda names: kept
    if chosen.rounding is None:
        return None
    rounded = DenseMethod(ops, dtype, device, chosen.rounding)
    return lambda names: rounded


def plan_other(path: Path, source: Source | None, settings: Config, model: ModelConfig) -> Plan:
    """For a model of no family of ours. Raises Unsupported."""
    if isinstance(source, Path):
        weights.check_safetensors(source)
    plan = fallback.plan(path, settings, model.trust_remote_code)
    log.info(
        "model_type %r has no implementation here: it runs through transformers, correctly but more slowly",
        plan.arch.model_type,
    )
    return plan


def _rotary_tables(arch: Architecture, positions: int, device: str) -> list[Tensor]:
    """Of each layer."""
    with torch.inference_mode():
        everywhere = rotary.table(arch.rope, arch.head_dim, positions).to(device)
        local = (
            rotary.table(arch.local_rope, arch.head_dim, positions).to(device)
            if arch.local_rope
            else everywhere
        )
    return [everywhere if window is None else local for window in arch.windows]


def open_model(path: Path, model: ModelConfig) -> tuple[Source | None, Config, tuple[int, ...]]:
    """(where the weights come from, None for random ones; the configuration; the ids that end a
    text)."""
    load_format, path = locate(path, model.load_format)
    template = read_option(model.chat_template) if model.chat_template else ""
    if path.suffix == ".gguf":
        file = Gguf(path)
        ends = file.eos_token_ids(tokenizer_path(model), template)
        return (file if load_format == "gguf" else None), file.config(), ends
    config = read_config(path)
    ends = end_tokens.of_directory(path, config, tokenizer_path(model), template)
    sources = {"safetensors": lambda: path, "pt": lambda: PytorchFiles.of(path)}
    return sources.get(load_format, lambda: None)(), config, ends


def choose_device(asked: str) -> str:
    """cpu or cuda, which is torch's current device. Raises gpus.NoUsableGpu where cuda is asked for
    in vain."""
    return ("cuda" if gpus.usable(asked) else "cpu") if asked in ("auto", "cuda") else asked


def choose_dtype(asked: str, config: Config, gpu: Gpu | None) -> torch.dtype:
    """What `precision` chooses; a configuration that names no type, such as a GGUF file's, counts
    as bfloat16."""
    choice = precision.choose(
        asked,
        str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        gpu or processor.look(),
    )
    for line in (choice.note, precision.overflow(choice.dtype, str(config.get("model_type")))):
        if line:
            log.warning("%s", line)
    return DTYPES[choice.dtype]


def _size_on_cpu(
    arch: Architecture, load_plan: LoadPlan, model: ModelConfig, config: WorkerConfig
) -> Sizing:
    """Of one of the ranks; those of a host share its memory. arch: of the whole model. A pipeline
    stage gets memory for KV blocks by its layers, so that all have as many."""
    ranks = load_plan.ranks
    stage = ranks.stage
    dtype = load_plan.dtype
    rank_arch = load_plan.part_of(arch)
    for_cache = int(config.cpu_kv_cache_gb * kv_sizing.GIB)
    quantized = load_plan.quantizing.weight_bytes(arch)
    return kv_sizing.size(
        rank_arch,
        cache_spec(rank_arch, kv_dtype.choose(config.kv_cache_dtype, dtype)),
        weights=kv_sizing.rank_share(quantized, arch, rank_arch, stage)
        or kv_sizing.weight_bytes(rank_arch, dtype.itemsize, head_copy=True, stage=stage),
        available=kv_sizing.available_memory() // ranks.local[1],
        kv_bytes=config.kv_cache_memory_bytes
        or for_cache * rank_arch.num_layers // (arch.num_layers * ranks.layers.size),
        blocks=config.num_kv_blocks,
        block_size=config.block_size,
        max_model_len=model.max_model_len,
        fit=config.fit,
    )
