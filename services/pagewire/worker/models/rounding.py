"""What full weights can be rounded to while they are loaded (--quantization): the same values that
the library of each format gives, whether the device then keeps them quantized or holds them in
full.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from pagewire_kernels.lookup_tables import named
from pagewire_kernels.quantized import GROUP, Quantized, quantize
from torch import Tensor

TABLE_BLOCK: Final = 64
"""Weights of the flattened matrix that share a scale, of bitsandbytes' 4 bits."""
INT8_MOST: Final = 127
E4M3_MOST: Final = 448.0
AT_A_TIME: Final = 1 << 22
"""Weights that are looked up in one go."""


@dataclass(frozen=True)
class Rounding:
    """One format. `values`: of a matrix [N, K], Quantized where it is codes with scales and minima.
    stays: the result can be kept quantized on a CPU, as all can on a GPU. head: the head and, on a
    CPU, the embeddings are rounded too."""

    name: str
    title: str
    values: Callable[[Tensor], Tensor | Quantized]
    stays: bool
    head: bool

    def full(self, weight: Tensor) -> Tensor:
        """The rounded values, dequantized."""
        rounded = self.values(weight)
        return rounded.dequantize() if isinstance(rounded, Quantized) else rounded


def _in_groups(bits: int) -> Callable[[Tensor], Tensor | Quantized]:
    def values(weight: Tensor) -> Tensor | Quantized:
        return weight if weight.shape[1] % GROUP else quantize(weight, bits)

    return values


def by_table(weight: Tensor, form: str) -> Tensor | Quantized:
    """bitsandbytes' quantize_4bit of type `form` (nf4 or fp4) without nested statistics: blocks of 64
    of the flattened matrix. Dequantized where blocks are no parts of rows."""
    if weight.shape[1] % TABLE_BLOCK == 0:
        return in_blocks(weight, form)
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % TABLE_BLOCK)).view(-1, TABLE_BLOCK)
    return in_blocks(blocks, form).dequantize().flatten()[: len(flat)].view(weight.shape)


def in_blocks(weight: Tensor, form: str) -> Quantized:
    """weight [N, K], K a multiple of 64, each 64 inputs of a row scaled by their largest magnitude,
    to the nearest of the 16 values of the table of that name."""
    blocks = weight.float().reshape(-1, TABLE_BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    table = named(form, weight.device)
    in_order, code_of = table.sort(stable=True)
    borders = (in_order[1:] + in_order[:-1]) / 2
    rows = max(1, AT_A_TIME // TABLE_BLOCK)
    pieces = [
        code_of[torch.bucketize(torch.nan_to_num(part / most), borders)].to(torch.uint8)
        for part, most in zip(blocks.split(rows), absmax.split(rows), strict=True)
    ]
    scale = absmax.view(weight.shape[0], -1)
    return Quantized(torch.cat(pieces).view(weight.shape), scale, table=table)


def nf4(weight: Tensor) -> Tensor | Quantized:
    """by_table of NF4."""
    return by_table(weight, "nf4")


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
        Rounding("bitsandbytes", "NF4 in blocks of 64", nf4, False, False),
        Rounding("bitsandbytes_8bit", "8 bits with a scale a row", int8_rows, True, False),
        Rounding("fp8", "float8_e4m3 with a scale a row", fp8_rows, False, False),
    )
}
"""By their names in --quantization."""
