"""What becomes of a model's matrices on a CPU: kept quantized as a GGUF file has them, quantized
while they are loaded, or full. Chooses before anything is loaded, and says what was chosen.
"""

import logging
from dataclasses import dataclass
from typing import Final

import torch
from pagewire_kernels import cpu_native
from pagewire_kernels.cpu_target import NoNativeCode

from ..device import kernel_cache
from ..models.architecture import Architecture
from . import gguf_quantized
from .gguf_file import Gguf
from .weights import Source

log = logging.getLogger("pagewire.worker")
BITS: Final = {"int4": 4, "int8": 8}
"""Of --quantization."""
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
IN_FLIGHT: Final = {4: 0.625, 8: 1.0625}


@dataclass(frozen=True)
class Quantizing:
    """kept: matrices that come quantized stay so. bits: full ones are rounded to as many, 0: they
    are not. bytes: of all weights, as far as the file tells, 0 unknown."""

    kept: bool = False
    bits: int = 0
    bytes: int = 0

    def weight_bytes(self, arch: Architecture) -> int:
        """0 where the weights are full."""
        if not self.kept:
            return 0
        return self.bytes or int(arch.parameters * IN_FLIGHT.get(self.bits, 2))


NONE: Final = Quantizing()


def choose(source: Source | None, asked: str, dtype: torch.dtype) -> Quantizing:
    """asked: --quantization, empty for what the weights themselves bring."""
    kinds = source.kinds() if isinstance(source, Gguf) else {}
    quantized = {kind: count for kind, count in kinds.items() if kind in gguf_quantized.TYPES}
    if not quantized and not asked:
        return NONE
    obstacle = _obstacle(dtype)
    if obstacle:
        log.warning(
            "quantized weights are made full (%s), which is several times slower and larger",
            obstacle,
        )
        return NONE
    if asked and not isinstance(source, Gguf):
        log.info(
            "weights are rounded to %s in groups of 32 inputs while they are loaded, as asked for",
            asked,
        )
        return Quantizing(True, BITS[asked])
    if asked:
        return NONE
    assert isinstance(source, Gguf)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(quantized.items()))
    others = ", ".join(
        f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind not in quantized
    )
    log.info("%s matrices stay quantized%s", listed, f"; {others} are made full" if others else "")
    return Quantizing(True, 0, source.count_bytes(BYTES, dtype.itemsize))


def refused(asked: str, device: str, foreign: bool, source: Source | None) -> str:
    """Why --quantization cannot be done."""
    if device != "cpu":
        return f"--quantization {asked} rounds weights for the CPU; on a GPU it is not supported yet: leave it out, or add --device cpu"
    if isinstance(source, Gguf):
        return f"--quantization {asked} rounds full weights; a GGUF file's are served as they are: leave the flag out"
    if foreign:
        return f"--quantization {asked} is not supported for models that run through transformers"
    return f"--quantization {asked} is not possible here: {_obstacle(torch.float32) or 'with --dtype float16; use bfloat16 or float32'}"


def _obstacle(dtype: torch.dtype) -> str:
    """Why there can be no quantized products here, empty when there can."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"there are no quantized products for {dtype}"
    kernel_cache.keep_native()
    try:
        cpu_native.check()
    except NoNativeCode as error:
        return str(error)
    return ""
