"""Weights of type float8_e4m3fn with scales: one for the matrix, one for each row, or one for each
block, as DeepSeek and Qwen save them (`weight_scale_inv`, by which one multiplies despite its name;
transformers' integrations/finegrained_fp8.py). w = weight * scale. Activations were rounded
when it was made (`activation_scheme`), and may be again, with blocks where the scheme is dynamic;
static scales for them are not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pagewire_kernels.quantized import Quantized
from torch import Tensor

from ...models.architecture import Unsupported
from ...models.rounding import fp8_rows
from .base import CheckpointFormat, Extent, Parts, check_shape, required


@dataclass(frozen=True)
class Fp8(CheckpointFormat):
    """block: rows and columns of a block, None where scales are for whole matrices or rows.
    dynamic: activations' scales are found as they are rounded."""

    name: ClassVar[str] = "fp8"
    endings: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "weight_scale_inv")
    markers: ClassVar[tuple[str, ...]] = ("weight_scale", "weight_scale_inv")
    unused: ClassVar[tuple[str, ...]] = (
        ".input_scale",
        ".activation_scale",
    )
    block: tuple[int, int] | None
    dynamic: bool = True

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Fp8":
        """Raises Unsupported for a block that is none."""
        dynamic = config.get("activation_scheme", "dynamic") == "dynamic"
        block = config.get("weight_block_size")
        return cls(None if block is None else block_sizes("weight_block_size", block), dynamic)

    def title(self) -> str:
        """See CheckpointFormat."""
        scales = "a scale a matrix or row"
        if self.block is not None:
            scales = f"a scale for each {self.block[0]} x {self.block[1]} weights"
        return f"fp8 (e4m3, {scales})"

    def matrix(self, module: str, parts: Parts) -> Tensor | Quantized:
        """See CheckpointFormat."""
        weight = required(module, parts, "weight")
        inverse = parts.get("weight_scale_inv")
        scale = required(module, parts, "weight_scale") if inverse is None else inverse
        quantize_inputs = self.dynamic or self.block is None
        return quantized(module, weight, scale, self.block, quantize_inputs)

    def rounded(self, weight: Tensor) -> Tensor | Quantized:
        """See CheckpointFormat."""
        return fp8_rows(weight)

    def extent(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Extent:
        """See CheckpointFormat."""
        rows, columns = shapes["weight"]
        return Extent(rows, columns, 0, is_float=True)


def block_sizes(name: str, block: object) -> tuple[int, int]:
    """Rows and columns of a block, from the field `name` of the configuration. Raises
    Unsupported."""
    match block:
        case [int(rows), int(columns)] if min(rows, columns) > 0:
            return rows, columns
        case _:
            raise Unsupported(f"{name} of the quantization is {block!r}, not two sizes")


def quantized(
    module: str,
    weight: Tensor,
    scale: Tensor,
    block: tuple[int, int] | None = None,
    quantize_inputs: bool = True,
) -> Tensor | Quantized:
    """W [N, K]: weight e4m3 [N, K] times scale: one, [N], [N, 1], or one for each block, whose last
    ones may be cut at the edges. Without `block` a scale of another shape tells the size of its
    blocks, which must then be whole. Dequantized, float32, where blocks are no groups of a row's
    inputs. Raises Unsupported."""
    if weight.dtype != torch.float8_e4m3fn:
        raise Unsupported(
            f"{module}.weight is {weight.dtype}; of 8-bit floats only float8_e4m3fn is supported"
        )
    rows, columns = weight.shape
    scale = scale.float()
    if scale.numel() == 1:
        by_row = scale.reshape(1, 1).expand(rows, 1)
        return Quantized(weight, by_row, quantize_inputs=quantize_inputs)
    # Blocks may be as wide as the matrix: their scales are one column too, but fewer than rows.
    if scale.dim() == 1 or (scale.shape[1] == 1 and (block is None or scale.shape[0] == rows)):
        check_shape(module, "weight_scale", scale.reshape(-1), rows)
        return Quantized(weight, scale.reshape(rows, 1), quantize_inputs=quantize_inputs)
    if block is None:
        block = (rows // scale.shape[0], columns // scale.shape[1])
    height, width = block
    check_shape(module, "weight_scale_inv", scale, -(-rows // height), -(-columns // width))
    by_row = scale.repeat_interleave(height, 0)[:rows]
    if columns % width == 0:
        return Quantized(weight, by_row, quantize_inputs=quantize_inputs)
    return weight.float().mul_(by_row.repeat_interleave(width, 1)[:, :columns])
