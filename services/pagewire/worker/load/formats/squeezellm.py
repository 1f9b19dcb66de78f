"""SqueezeLLM (its squeezellm/quant.py): a table of values for each output, and for some checkpoints
a sparse part in full.

qweight int32 [K * bits / 32, N], packed as GPTQ's; lookup_table [N, 2^bits]; w[n, k] =
lookup_table[n, code[n, k]]. The sparse part is added: rows int32 [N + 1], cols, vals (compressed
rows over the outputs), and full_rows [K, X] with full_row_indices int32 [X] of whole outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from pagewire_kernels.lookup_tables import ENTRIES, ROW_TABLES
from pagewire_kernels.quantized import Quantized
from torch import Tensor

from ...models.architecture import Unsupported
from .base import (
    FOUR_BITS,
    CheckpointFormat,
    Extent,
    Parts,
    check_shape,
    required,
    whole_number,
)
from .packing import BITS_A_WORD, unpack_words

SPARSE: Final = frozenset(("vals", "full_rows"))
"""Endings of parts that are added in full."""


@dataclass(frozen=True)
class SqueezeLlm(CheckpointFormat):
    """bits: 3 or 4."""

    name: ClassVar[str] = "squeezellm"
    endings: ClassVar[tuple[str, ...]] = (
        "qweight",
        "lookup_table",
        "rows",
        "cols",
        "vals",
        "full_rows",
        "full_row_indices",
    )
    markers: ClassVar[tuple[str, ...]] = ("lookup_table",)
    unused: ClassVar[tuple[str, ...]] = (".startrows",)
    rounds: ClassVar[bool] = False
    bits: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "SqueezeLlm":
        """Raises Unsupported for other numbers of bits."""
        bits = whole_number(config, "wbits", "bits")
        if bits not in (3, 4):
            raise Unsupported(f"SqueezeLLM weights of {bits} bits are not supported; 3 and 4 are")
        return cls(bits)

    def title(self) -> str:
        """See CheckpointFormat."""
        return f"squeezellm ({self.bits} bits, a table a row)"

    def matrix(self, module: str, parts: Parts) -> Tensor | Quantized:
        """See CheckpointFormat."""
        qweight = required(module, parts, "qweight")
        table = required(module, parts, "lookup_table")
        out_features = qweight.shape[1]
        in_features = qweight.shape[0] * BITS_A_WORD // self.bits
        check_shape(module, "lookup_table", table, out_features, 1 << self.bits)
        codes = unpack_words(qweight.T.contiguous(), self.bits, in_features)
        if not SPARSE.intersection(parts):
            tables = torch.nn.functional.pad(table.float(), (0, ENTRIES - table.shape[1]))
            return Quantized(codes, torch.ones_like(tables[:, :1]), table=tables)
        weight = table.float().gather(1, codes.long())
        if "vals" in parts:
            self._add_sparse(module, parts, weight)
        if "full_rows" in parts:
            outputs = required(module, parts, "full_row_indices").long()
            check_shape(module, "full_rows", parts["full_rows"], in_features, len(outputs))
            weight.index_add_(0, outputs, parts["full_rows"].float().T.contiguous())
        return weight

    def _add_sparse(self, module: str, parts: Parts, weight: Tensor) -> None:
        starts = required(module, parts, "rows").long()
        columns = required(module, parts, "cols").long()
        check_shape(module, "rows", starts, len(weight) + 1)
        check_shape(module, "cols", columns, len(parts["vals"]))
        if bool((starts.diff() < 0).any()) or int(starts[-1]) != len(columns):
            raise Unsupported(
                f"{module}.rows does not count the {len(columns)} values of the matrix"
            )
        if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < weight.shape[1]:
            raise Unsupported(f"{module}.cols names an input beyond {weight.shape[1] - 1}")
        rows = torch.repeat_interleave(
            torch.arange(len(weight), device=weight.device), starts.diff()
        )
        weight.index_put_((rows, columns), parts["vals"].float(), accumulate=True)

    def extent(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Extent:
        """See CheckpointFormat."""
        words, rows = shapes["qweight"]
        columns = words * BITS_A_WORD // self.bits
        if SPARSE.intersection(shapes):
            return Extent(rows, columns, 0)
        return Extent(rows, columns, FOUR_BITS, table=ROW_TABLES)
