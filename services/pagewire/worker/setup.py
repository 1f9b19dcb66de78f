"""From settings to a loaded model: which files, which type, how much memory, and the weights in place. Runs once, before the first step."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from pagewire_kernels.backend import backend
from torch import Tensor

from ..config import ModelConfig, WorkerConfig
from . import kv, rotary, weights
from .architecture import Architecture, Config, Unsupported, eos_token_ids, read_config
from .gguf_file import Gguf
from .layers import Build
from .models import describe
from .models.decoder import Decoder

log = logging.getLogger("pagewire.worker")
DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


@dataclass
class Loaded:
    """A model ready to run: caches[layer] is [2, blocks, Hkv, block_size, D], all views of `cache` [layers, 2, blocks, ...]; cos_sin[layer]
    is [positions, D], the same tensor for layers that rotate alike."""

    decoder: Decoder
    sizing: kv.Sizing
    cos_sin: list[Tensor]
    cache: Tensor
    eos_token_ids: tuple[int, ...]
    device: str

    @property
    def caches(self) -> list[Tensor]:
        return list(self.cache)


def load(path: Path, model: ModelConfig, config: WorkerConfig, progress: weights.Progress) -> Loaded:
    """The model at `path` (a directory or a .gguf file). Raises Unsupported or kv.DoesNotFit with what is wrong and what to do."""
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    device = choose_device(config.device)
    source, settings, eos = open_model(path, model.load_format)
    arch = describe(settings)
    dtype = choose_dtype(config.dtype, settings, device)
    sizing = _size(arch, dtype, model, config, device)
    for line in (f"{arch.model_type} with {arch.parameters / 1e6:,.0f} M parameters as {dtype} on {device}", *sizing.lines()):
        log.info(line)
    with torch.inference_mode():
        decoder = Decoder(arch, Build(backend(device), dtype, device))
        weights.load(decoder, source, settings, model.seed, progress)
        cache = torch.zeros(
            (arch.num_layers, 2, sizing.num_blocks, arch.num_kv_heads, sizing.block_size, arch.head_dim), dtype=dtype, device=device
        )
    return Loaded(decoder, sizing, _factors(arch, sizing.max_model_len, device), cache, eos, device)


def _factors(arch: Architecture, positions: int, device: str) -> list[Tensor]:
    """The rotary table of each layer."""
    with torch.inference_mode():
        everywhere = rotary.table(arch.rope, arch.head_dim, positions).to(device)
        local = rotary.table(arch.local_rope, arch.head_dim, positions).to(device) if arch.local_rope else everywhere
    return [everywhere if window is None else local for window in arch.windows]


def open_model(path: Path, load_format: str) -> tuple[Path | Gguf | None, Config, tuple[int, ...]]:
    """(where the weights come from, None for random ones; the configuration; the end-of-sequence ids)."""
    if path.is_dir() and load_format in ("auto", "gguf") and not any(path.glob("*.safetensors")):
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise Unsupported(f"{path} has {len(files)} GGUF files; give one of them, for example {files[0].name}")
        path = files[0] if files else path
    if path.suffix == ".gguf":
        if load_format == "safetensors":
            raise Unsupported(f"{path.name} is a GGUF file, but --load-format is safetensors")
        file = Gguf(path)
        return (None if load_format == "dummy" else file), file.config(), file.eos_token_ids()
    if load_format == "gguf":
        raise Unsupported(f"{path} has no .gguf file, but --load-format is gguf")
    config = read_config(path)
    return (None if load_format == "dummy" else path), config, eos_token_ids(path, config)


def choose_device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise Unsupported("--device cuda, but torch sees no CUDA device; `pagewire doctor` says more")
    return asked


def choose_dtype(asked: str, config: Config, device: str) -> torch.dtype:
    """`auto` is what the checkpoint was saved in, bfloat16 for GGUF. On a CPU float16 becomes bfloat16: it has no fast products there."""
    if asked != "auto":
        return DTYPES[asked]
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = DTYPES.get(named)
    if dtype is None:
        raise Unsupported(f"weights of type {named!r} are not supported; choose --dtype bfloat16 or float32")
    if dtype == torch.float16 and device == "cpu":
        log.warning("the checkpoint is float16, which is slow on a CPU: using bfloat16; --dtype float16 or float32 keeps its precision")
        return torch.bfloat16
    return dtype


def _size(arch: Architecture, dtype: torch.dtype, model: ModelConfig, config: WorkerConfig, device: str) -> kv.Sizing:
    available, cache = kv.available_memory(), int(config.cpu_kv_cache_gb * kv.GIB)
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        available = free - int(total * (1 - config.gpu_memory_utilization))
        cache = available - kv.weight_bytes(arch, dtype.itemsize, head_copy=False) - 2 * kv.WORKSPACE
    return kv.size(
        arch,
        dtype.itemsize,
        available=available,
        kv_bytes=max(0, cache),
        blocks=config.num_kv_blocks,
        block_size=config.block_size,
        max_model_len=model.max_model_len,
        head_copy=device == "cpu",
    )
