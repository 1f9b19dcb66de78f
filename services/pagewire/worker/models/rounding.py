"""What full weights can be rounded to while they are loaded (--quantization): the same values that
the library of each format gives, whether the device then keeps them quantized or holds them in
full.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from pagewire_kernels.quantized import GROUP, Quantized, quantize
from torch import Tensor

NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution: the NF4 of QLoRA, with bitsandbytes' digits."""
NF4_BLOCK: Final = 64
"""Weights of the flattened matrix that share a scale."""
INT8_MOST: Final = 127
E4M3_MOST: Final = 448.0
AT_A_TIME: Final = 1 << 22
"""Weights that are looked up in one go."""


@dataclass(frozen=True)
class Rounding:
    """One format. `values`: of a matrix [N, K], Quantized where it is codes with scales and minima.
    stays, stays_on_gpu: what the result can be kept quantized on. head: the head and, on a CPU, the
    embeddings are rounded too."""

    name: str
    title: str
    values: Callable[[Tensor], Tensor | Quantized]
    stays: bool
    head: bool
    stays_on_gpu: bool = True

    def full(self, weight: Tensor) -> Tensor:
        """The rounded values, dequantized."""
        rounded = self.values(weight)
        return rounded.dequantize() if isinstance(rounded, Quantized) else rounded


def _in_groups(bits: int) -> Callable[[Tensor], Tensor | Quantized]:
    def values(weight: Tensor) -> Tensor | Quantized:
        return weight if weight.shape[1] % GROUP else quantize(weight, bits)

    return values


def nf4(weight: Tensor) -> Tensor:
    """bitsandbytes' quantize_4bit of type nf4 without nested statistics, dequantized: blocks of 64
    of the flattened matrix, each scaled by its largest magnitude, to the nearest of 16 values."""
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4, device=weight.device)
    borders = (table[1:] + table[:-1]) / 2
    rows = max(1, AT_A_TIME // NF4_BLOCK)
    pieces = [
        table[torch.bucketize(torch.nan_to_num(part / most), borders)] * most
        for part, most in zip(blocks.split(rows), absmax.split(rows), strict=True)
    ]
    return torch.cat(pieces).flatten()[: len(flat)].view(weight.shape)


def int8_rows(weight: Tensor) -> Quantized:
    """bitsandbytes' int8_vectorwise_quant: each row scaled by its largest magnitude."""
    wide = weight.float()
    absmax = wide.abs().amax(1, keepdim=True)
    codes = torch.nan_to_num(wide * (INT8_MOST / absmax), posinf=0, neginf=0).round_()
    return Quantized(codes.to(torch.int8), absmax / INT8_MOST)


def fp8_rows(weight: Tensor) -> Quantized:
    """float8_e4m3fn with a scale for each row; inputs may be rounded alike, as vLLM does."""
    wide = weight.float()
    scale = (wide.abs().amax(1, keepdim=True) / E4M3_MOST).clamp_(min=torch.finfo().tiny)
    codes = (wide / scale).to(torch.float8_e4m3fn)
    return Quantized(codes, scale, quantize_inputs=True)


ROUNDINGS: Final = {
    rounding.name: rounding
    for rounding in (
        Rounding("int8", "8 bits in groups of 32 inputs", _in_groups(8), True, True),
        Rounding("int4", "4 bits in groups of 32 inputs", _in_groups(4), True, True),
        Rounding("bitsandbytes", "NF4 in blocks of 64", nf4, False, False, stays_on_gpu=False),
        Rounding("bitsandbytes_8bit", "8 bits with a scale a row", int8_rows, True, False),
        Rounding("fp8", "float8_e4m3 with a scale a row", fp8_rows, False, False),
    )
}
"""By their names in --quantization."""
