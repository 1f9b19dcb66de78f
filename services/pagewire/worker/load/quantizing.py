"""What becomes of a model's matrices: kept quantized as the checkpoint has them, rounded while they
are loaded, or full. Chooses before anything is loaded, and says what was chosen.

A CPU keeps what is codes with scales and minima. Everything else, and everything on a GPU, where
there are no products with quantized weights yet, is made full while it is loaded.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from pagewire_kernels import cpu_native
from pagewire_kernels.cpu_target import NoNativeCode

from ..device import kernel_cache
from ..models.architecture import Architecture, Unsupported
from ..models.rounding import ROUNDINGS, Rounding
from . import formats, gguf_quantized
from .formats.base import Assembler, CheckpointFormat, Extent
from .gguf_file import Gguf
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


@dataclass(frozen=True)
class Quantizing:
    """kept: matrices that come quantized, or are rounded, stay so. rounding: of full ones. bytes: of
    all weights, as far as the files tell, 0 unknown."""

    kept: bool = False
    rounding: Rounding | None = None
    bytes: int = 0

    def weight_bytes(self, arch: Architecture) -> int:
        """0 where the weights are full."""
        if not self.kept:
            return 0
        share = IN_FLIGHT.get(self.rounding.name, 2) if self.rounding else 2
        return self.bytes or int(arch.parameters * share)


NONE: Final = Quantizing()


@dataclass(frozen=True)
class Checkpoint:
    """The weights that a start has: `source` None for random ones; `form`: of quantized ones, other
    than GGUF's."""

    source: Source | None
    form: CheckpointFormat | None = None


def choose(
    checkpoint: Checkpoint, arch: Architecture, asked: str, dtype: torch.dtype, device: str
) -> Quantizing:
    """asked: --quantization, empty for what the weights themselves bring. Raises Unsupported for
    what cannot be had."""
    source, form = checkpoint.source, checkpoint.form
    if isinstance(source, Gguf):
        if asked:
            raise Unsupported(
                f"--quantization {asked} rounds full weights; a GGUF file's are served as they are: leave the flag out"
            )
        return _of_gguf(source, dtype) if device == "cpu" else NONE
    if form is not None:
        return _of_checkpoint(source, form, arch, dtype, device)
    return _rounded(ROUNDINGS[asked], dtype, device) if asked else NONE


def _of_gguf(source: Gguf, dtype: torch.dtype) -> Quantizing:
    kinds = source.kinds()
    quantized = {kind: count for kind, count in kinds.items() if kind in gguf_quantized.TYPES}
    if not quantized or _made_full(dtype, "quantized weights"):
        return NONE
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(quantized.items()))
    others = ", ".join(
        f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind not in quantized
    )
    log.info("%s matrices stay quantized%s", listed, f"; {others} are made full" if others else "")
    return Quantizing(True, None, source.count_bytes(BYTES, dtype.itemsize))


def _of_checkpoint(
    source: Source | None,
    form: CheckpointFormat,
    arch: Architecture,
    dtype: torch.dtype,
    device: str,
) -> Quantizing:
    """Says what is kept, and what that saves."""
    if source is None or isinstance(source, Gguf):
        return NONE
    extents = _extents(form, shapes_of(source))
    kept = [extent for extent in extents if extent.bits]
    if device != "cpu":
        log.warning(
            "%s: the %d matrices are made full while they are loaded, since there are no products with quantized weights on a GPU yet",
            form.title(),
            len(extents),
        )
        return NONE
    if not kept:
        log.warning(
            "%s: the %d matrices are made full while they are loaded, since there are no products with such weights on a CPU",
            form.title(),
            len(extents),
        )
        return NONE
    if _made_full(dtype, form.title()):
        return NONE
    weights = sum(extent.rows * extent.columns for extent in kept)
    kept_bytes = int(
        sum(extent.rows * extent.columns * (extent.code_bytes + WITH_MINIMA) for extent in kept)
    )
    log.info(
        "%s: %d matrices stay quantized, which saves %s MiB%s",
        form.title(),
        len(kept),
        f"{(weights * dtype.itemsize - kept_bytes) / MIB:,.0f}",
        f"; {len(extents) - len(kept)} are made full" if len(kept) < len(extents) else "",
    )
    full = max(0, arch.parameters - weights) * dtype.itemsize
    return Quantizing(True, None, kept_bytes + full)


def _extents(form: CheckpointFormat, shapes: Mapping[str, tuple[int, ...]]) -> list[Extent]:
    modules = Assembler(form, shapes).modules
    return [
        form.extent(module, {ending: shapes[f"{module}.{ending}"] for ending in endings})
        for module, endings in modules.items()
    ]


def _rounded(rounding: Rounding, dtype: torch.dtype, device: str) -> Quantizing:
    asked = rounding.name
    if rounding.stays and device == "cpu":
        if obstacle := _obstacle(dtype):
            raise Unsupported(f"--quantization {asked} is not possible here: {obstacle}")
        log.info(
            "weights are rounded to %s (%s) while they are loaded, as asked for",
            asked,
            rounding.title,
        )
        return Quantizing(True, rounding)
    if asked in ("int4", "int8"):
        raise Unsupported(
            f"--quantization {asked} rounds weights for the CPU; on a GPU it is not supported yet: leave it out, or add --device cpu"
        )
    log.warning(
        "weights are rounded to %s (%s) while they are loaded, as asked for, and then held in full, since there are no products with "
        "such weights on this device yet: no memory is saved",
        asked,
        rounding.title,
    )
    return Quantizing(False, rounding)


def _made_full(dtype: torch.dtype, weights: str) -> bool:
    """Whether there are no quantized products here, with a line that says of which `weights` and
    why."""
    obstacle = _obstacle(dtype)
    if obstacle:
        log.warning(
            "%s are made full (%s), which is several times slower and larger", weights, obstacle
        )
    return bool(obstacle)


def _obstacle(dtype: torch.dtype) -> str:
    """Why there can be no quantized products here, empty when there can."""
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
