"""What becomes of a model's matrices: kept quantized as the checkpoint has them, rounded while they
are loaded, or full. Chooses before anything is loaded, and says what was chosen.

A CPU keeps what is codes with scales and minima, a GPU with tensor cores 8-bit floats and codes with
lookup tables too, but no tables of embeddings. Everything else is made full while it is loaded.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from pagewire_kernels import cpu_native, gpu_quantized_size
from pagewire_kernels.cpu_target import NoNativeCode

from ..device import kernel_cache
from ..models.architecture import Architecture, Unsupported
from ..models.rounding import ROUNDINGS, Rounding
from . import formats, gguf_quantized
from .formats.base import Assembler, CheckpointFormat, Extent
from .gguf_file import Gguf
from .pytorch_file import PytorchFiles
from .weights import Source, shapes_of

log = logging.getLogger("pagewire.worker")
BYTES: Final = {
    "Q4_0": 0.625,
    "Q4_1": 0.625,
    "Q4_K": 0.75,
    "Q5_0": 1.0625,
    "Q8_0": 1.0625,
    "Q5_1": 1.25,
    "Q5_K": 1.25,
    "Q6_K": 1.25,
}
"""Of a weight in panels (pagewire_kernels.cpu_panels), with its share of scales and minima."""
IN_FLIGHT: Final = {"int4": 0.625, "int8": 1.0625, "bitsandbytes_8bit": 1.125}
WITH_MINIMA: Final = 0.25
"""Bytes a weight of a scale and a minimum in float32 for 32 weights."""
MIB: Final = 1 << 20
LEAST_CAPABILITY: Final = (8, 0)
"""Of a GPU whose tensor cores Triton knows."""


@dataclass(frozen=True)
class Target:
    """What the weights are for. capability: of a GPU, None: a CPU."""

    dtype: torch.dtype
    capability: tuple[int, int] | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.capability is not None

    def title(self) -> str:
        """In a sentence."""
        return "a GPU" if self.on_gpu else "a CPU"

    def obstacle(self) -> str:
        """Why there can be no products with quantized weights, empty when there can."""
        if self.capability is None:
            return _cpu_obstacle(self.dtype)
        if self.capability < LEAST_CAPABILITY:
            major, minor = self.capability
            return f"they need compute capability 8.0, and this GPU has {major}.{minor}"
        if self.dtype == torch.float32:
            return "on a GPU they are multiplied in 16 bits; use --dtype bfloat16 or float16"
        return ""

    def keeps(self, extent: Extent) -> bool:
        """Whether a matrix of the checkpoint stays quantized."""
        if not self.on_gpu:
            return bool(extent.bits) and not extent.table
        if not (extent.bits or extent.is_float):
            return False
        return gpu_quantized_size.fits(extent.columns, extent.group, extent.table)

    def bytes(self, extent: Extent) -> int:
        """Of such a matrix, in memory."""
        if not self.on_gpu:
            weights = extent.rows * extent.columns
            return int(weights * (extent.code_bytes + WITH_MINIMA))
        size = (extent.rows, extent.columns, extent.group)
        bits = extent.bits or 8
        taken = gpu_quantized_size.packed_bytes(*size, bits, not extent.is_float, extent.table)
        return taken + (gpu_quantized_size.block_scale_bytes(*size) if extent.is_float else 0)


@dataclass(frozen=True)
class Quantizing:
    """kept: matrices that come quantized, or are rounded, stay so. rounding: of full ones. bytes:
    of all weights, as far as the files tell, 0 unknown. share: bytes of a weight that is
    rounded."""

    kept: bool = False
    rounding: Rounding | None = None
    bytes: int = 0
    share: float = 2

    def weight_bytes(self, arch: Architecture) -> int:
        """0 where the weights are full."""
        if not self.kept:
            return 0
        return self.bytes or int(arch.parameters * self.share)


NONE: Final = Quantizing()


@dataclass(frozen=True)
class Checkpoint:
    """The weights that a start has: `source` None for random ones; `form`: of quantized ones, other
    than GGUF's."""

    source: Source | None
    form: CheckpointFormat | None = None


def choose(
    checkpoint: Checkpoint, arch: Architecture, quantization: str, target: Target
) -> Quantizing:
    """quantization: the flag, empty for what the weights themselves bring. Raises Unsupported for
    what cannot be had."""
    source = checkpoint.source
    form = checkpoint.form
    if isinstance(source, Gguf):
        if quantization:
            raise Unsupported(
                f"--quantization {quantization} rounds full weights; a GGUF file's are served as they are: leave the flag out"
            )
        return _of_gguf(source, arch, target)
    if form is not None and source is not None:
        return _of_checkpoint(source, form, arch, target)
    if form is not None:
        return _random(form, arch, target)
    return _rounded(ROUNDINGS[quantization], arch, target) if quantization else NONE


def _of_gguf(source: Gguf, arch: Architecture, target: Target) -> Quantizing:
    counts = source.type_counts()
    types = gguf_quantized.TYPES
    if not target.on_gpu:
        types = {name: layout for name, layout in types.items() if layout.table is None}
    quantized = {name: count for name, count in counts.items() if name in types}
    if not quantized or _made_full(target, "quantized weights"):
        return NONE
    kept = ", ".join(f"{count} {name}" for name, count in sorted(quantized.items()))
    full = ", ".join(
        f"{count} {name}" for name, count in sorted(counts.items()) if name not in quantized
    )
    itemsize = target.dtype.itemsize
    sizes = gpu_quantized_size.GGUF_BYTES if target.on_gpu else BYTES
    weights = source.count_bytes({name: sizes[name] for name in types}, itemsize)
    if target.on_gpu:
        # the table of embeddings is full
        weights += arch.vocab_size * arch.hidden_size * itemsize
    log.info(
        "%s matrices stay quantized, which saves about %s MiB%s",
        kept,
        _mebibytes(source.count_bytes({}, itemsize) - weights),
        f"; {full} are made full" if full else "",
    )
    # memory for one dequantized matrix comes on top
    return Quantizing(True, None, weights + (_scratch(arch) if target.on_gpu else 0))


def _mebibytes(saved: float) -> str:
    """Bytes that are saved, in MiB; 0 where small models have more of what is full."""
    return f"{max(0.0, saved) / MIB:,.0f}"


def _of_checkpoint(
    source: Path | PytorchFiles, form: CheckpointFormat, arch: Architecture, target: Target
) -> Quantizing:
    """Says what is kept, and what that saves."""
    extents = _extents(form, shapes_of(source))
    kept = [extent for extent in extents.values() if target.keeps(extent)]
    if not kept:
        log.warning(
            "%s: the %d matrices are made full while they are loaded, since there are no products with such weights on %s",
            form.title(),
            len(extents),
            target.title(),
        )
        return NONE
    if _made_full(target, form.title()):
        return NONE
    itemsize = target.dtype.itemsize
    weights = sum(extent.rows * extent.columns for extent in kept)
    kept_bytes = sum(target.bytes(extent) for extent in kept)
    log.info(
        "%s: %d matrices stay quantized, which saves %s MiB%s",
        form.title(),
        len(kept),
        _mebibytes(weights * itemsize - kept_bytes),
        f"; {len(extents) - len(kept)} are made full" if len(kept) < len(extents) else "",
    )
    full = max(0, arch.parameters - weights) * itemsize
    scratch = _scratch(arch) if target.on_gpu else 0
    return Quantizing(True, None, kept_bytes + full + scratch)


def _random(form: CheckpointFormat, arch: Architecture, target: Target) -> Quantizing:
    """Random weights are rounded to the format that the configuration names."""
    if not target.on_gpu or target.obstacle() or not form.rounds:
        return NONE
    rounding = Rounding(form.rounding_name, form.title(), form.rounded, stays=False, head=False)
    log.info("random weights are rounded to %s", form.title())
    return _kept_on_gpu(rounding, arch, target)


def _kept_on_gpu(rounding: Rounding, arch: Architecture, target: Target) -> Quantizing:
    """Of all matrices but the table of embeddings and, where it is not rounded, the head."""
    table = arch.vocab_size * arch.hidden_size
    full = table if rounding.head or arch.tie_word_embeddings else 2 * table
    share = gpu_quantized_size.IN_FLIGHT.get(rounding.name, gpu_quantized_size.LARGEST)
    rounded = max(0, arch.parameters - full)
    itemsize = target.dtype.itemsize
    _say_saved(rounded * (itemsize - share))
    weights = int(full * itemsize + rounded * share) + _scratch(arch)
    return Quantizing(True, rounding, weights)


def _say_saved(saved: float) -> None:
    log.info("they stay quantized, which saves about %s MiB", _mebibytes(saved))


def _scratch(arch: Architecture) -> int:
    """Bytes in which the largest matrices are dequantized, one at a time."""
    heads = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    rows = max(heads, 2 * arch.intermediate_size, arch.hidden_size)
    return gpu_quantized_size.scratch_bytes(rows * arch.hidden_size)


def _extents(form: CheckpointFormat, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Extent]:
    """Of each quantized matrix, by its name."""
    extents: dict[str, Extent] = {}
    for module, endings in Assembler(form, shapes).modules.items():
        parts = {ending: shapes[f"{module}.{ending}"] for ending in endings}
        extent = form.extent(module, parts)
        scales = next((shape for ending, shape in parts.items() if "scale" in ending), ())
        extents[module] = replace(extent, group=_group(extent, scales))
    return extents


def _group(extent: Extent, scales: tuple[int, ...]) -> int:
    """Inputs that share a scale, from the shape of all scales of a matrix."""
    if len(scales) < 2 or 1 in scales:
        return extent.columns
    # one for each row and group, in either order; or one for each block of rows
    across = scales[0] if scales[1] == extent.rows else scales[1]
    return -(-extent.columns // across)


def _rounded(rounding: Rounding, arch: Architecture, target: Target) -> Quantizing:
    name = rounding.name
    stays = target.on_gpu or rounding.stays
    obstacle = target.obstacle() if stays else ""
    if obstacle and rounding.stays:
        raise Unsupported(f"--quantization {name} is not possible here: {obstacle}")
    if stays and not obstacle:
        log.info(
            "weights are rounded to %s (%s) while they are loaded, as asked for",
            name,
            rounding.title,
        )
        if target.on_gpu:
            return _kept_on_gpu(rounding, arch, target)
        share = IN_FLIGHT.get(name, 2)
        _say_saved(arch.parameters * (target.dtype.itemsize - share))
        return Quantizing(True, rounding, share=share)
    log.warning(
        "weights are rounded to %s (%s) while they are loaded, as asked for, and then held in full, since there are no products with "
        "such weights on this device yet: no memory is saved",
        name,
        rounding.title,
    )
    return Quantizing(False, rounding)


def _made_full(target: Target, weights: str) -> bool:
    """Whether there are no quantized products here, with a line that says of which `weights` and
    why."""
    obstacle = target.obstacle()
    if obstacle:
        log.warning(
            "%s are made full (%s), which is several times slower and larger", weights, obstacle
        )
    return bool(obstacle)


def _cpu_obstacle(dtype: torch.dtype) -> str:
    if dtype not in (torch.bfloat16, torch.float32):
        return f"there are no quantized products for {dtype}; use bfloat16 or float32"
    kernel_cache.keep_native()
    try:
        cpu_native.check()
    except NoNativeCode as error:
        return str(error)
    return ""


def read_format(settings: Mapping[str, object] | None) -> CheckpointFormat | None:
    """The format that a quantization's configuration (checkpoint.quantization.of_checkpoint)
    describes. Raises Unsupported."""
    return None if settings is None else formats.read(settings)
