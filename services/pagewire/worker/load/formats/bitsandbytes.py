"""bitsandbytes, as transformers saves it.

4 bits: weight uint8 [N * K / 2, 1] over the flattened matrix, the high half of a byte first;
weight.absmax float32 [blocks], or, quantized itself, uint8 with weight.nested_absmax and
weight.nested_quant_map; weight.quant_map float32 [16]; and a tensor of JSON with the block sizes,
the shape and the offset. w = quant_map[code] * absmax. 8 bits: weight int8 [N, K], SCB float32 [N];
w = code * SCB / 127. The columns that LLM.int8 multiplies in 16 bits for their large activations
are no matter here: activations all stay in 16 bits.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from pagewire_kernels.lookup_tables import form_of
from pagewire_kernels.quantized import Quantized
from torch import Tensor

from ...models.architecture import Unsupported
from ...models.rounding import TABLE_BLOCK, by_table, int8_rows
from .base import FOUR_BITS, CheckpointFormat, Extent, Parts, check_shape, required

STATE: Final = "weight.quant_state.bitsandbytes__"
TYPES: Final = ("nf4", "fp4")
INT8_MOST: Final = 127
TABLE: Final = 16


@dataclass(frozen=True)
class Bitsandbytes(CheckpointFormat):
    """bits: 4 or 8."""

    name: ClassVar[str] = "bitsandbytes"
    endings: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *(STATE + kind for kind in TYPES),
        "SCB",
        "weight_format",
    )
    markers: ClassVar[tuple[str, ...]] = ("weight.absmax", "SCB")
    bits: int
    kind: str

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Bitsandbytes":
        """Raises Unsupported where neither 4 nor 8 bits are named."""
        if config.get("load_in_4bit") or config.get("_load_in_4bit"):
            return cls(4, str(config.get("bnb_4bit_quant_type") or "fp4"))
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            return cls(8, "int8")
        raise Unsupported(
            "bitsandbytes with neither load_in_4bit nor load_in_8bit is not supported"
        )

    def title(self) -> str:
        """See CheckpointFormat."""
        return f"bitsandbytes ({self.kind})"

    def matrix(self, module: str, parts: Parts) -> Tensor | Quantized:
        """See CheckpointFormat."""
        weight = required(module, parts, "weight")
        if "SCB" in parts:
            return _int8(module, weight, parts["SCB"])
        state = _state(module, parts)
        rows, columns = state["shape"]
        blocksize = int(state["blocksize"])
        absmax = _absmax(module, parts, state)
        check_shape(module, "weight.absmax", absmax, -(-rows * columns // blocksize))
        packed = weight.reshape(-1)
        check_shape(module, "weight", packed, -(-rows * columns // 2))
        table = required(module, parts, "weight.quant_map").float()
        check_shape(module, "weight.quant_map", table, TABLE)
        codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: rows * columns]
        if columns % TABLE_BLOCK == 0 and blocksize % TABLE_BLOCK == 0 and form_of(table):
            scale = absmax.repeat_interleave(blocksize // TABLE_BLOCK)
            groups = rows * columns // TABLE_BLOCK
            scale = scale[:groups].view(rows, -1)
            return Quantized(codes.view(rows, columns), scale, table=table)
        # blocks go over the ends of rows
        values = table[codes.int()]
        blocks = absmax.repeat_interleave(blocksize)[: rows * columns]
        return values.mul_(blocks).view(rows, columns)

    @property
    def rounding_name(self) -> str:
        """See CheckpointFormat."""
        return self.name if self.bits == FOUR_BITS else f"{self.name}_8bit"

    def rounded(self, weight: Tensor) -> Tensor | Quantized:
        """See CheckpointFormat."""
        return by_table(weight, self.kind) if self.bits == FOUR_BITS else int8_rows(weight)

    def extent(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Extent:
        """See CheckpointFormat."""
        rows, columns = shapes["weight"]
        if "SCB" in shapes:
            return Extent(rows, columns, 8)
        # A matrix of 4 bits is saved as one column of bytes, which does not tell how long its rows
        # are: those of nearly all models are whole blocks.
        return Extent(2 * rows * columns // TABLE_BLOCK, TABLE_BLOCK, FOUR_BITS, table=self.kind)


def _int8(module: str, weight: Tensor, scb: Tensor) -> Quantized:
    if weight.dtype != torch.int8:
        raise Unsupported(f"{module}.weight is {weight.dtype}, where int8 is expected")
    check_shape(module, "SCB", scb.reshape(-1), weight.shape[0])
    return Quantized(weight, (scb.float() / INT8_MOST).reshape(-1, 1))


def _state(module: str, parts: Parts) -> dict[str, Any]:
    """What bitsandbytes writes beside the tensors: blocksize, shape and, of nested scales, the
    blocksize and offset of those."""
    for kind in TYPES:
        if STATE + kind in parts:
            try:
                return json.loads(bytes(parts[STATE + kind].tolist()))
            except ValueError as error:
                raise Unsupported(f"{module}.{STATE}{kind} is no JSON: {error}") from None
    raise Unsupported(f"{module} is quantized to 4 bits, but has no {module}.{STATE}nf4 or fp4")


def _absmax(module: str, parts: Parts, state: Mapping[str, Any]) -> Tensor:
    absmax = required(module, parts, "weight.absmax")
    if "weight.nested_absmax" not in parts:
        return absmax.float()
    table = required(module, parts, "weight.nested_quant_map").float()
    nested = parts["weight.nested_absmax"].float()
    blocksize = int(state["nested_blocksize"])
    check_shape(module, "weight.nested_absmax", nested, -(-len(absmax) // blocksize))
    scales = nested.repeat_interleave(blocksize)[: len(absmax)]
    return table[absmax.int()] * scales + float(state["nested_offset"])
