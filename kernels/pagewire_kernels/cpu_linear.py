"""A product with quantized weights on a CPU: by machine code of our own for few rows, and for many
by a copy made dense for the occasion, which oneDNN or MKL multiply faster than any code that widens
codes again for each row.

The caller's thread takes part as one of torch's team; nothing here may be used by two threads at a
time.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from . import cpu_native, cpu_target, cpu_task
from .cpu_panels import ROWS, Panels, pack, rows_of
from .quantized import GROUP, Quantized

CROSSING: Final = 32
"""Rows up to which the native product is used, until it has been measured (`cpu_choice`)."""
_scratch: dict[torch.dtype, Tensor] = {}


class QuantizedLinear:
    """Matrices that read the same input, side by side: [N, K] each. wide: results in float32.
    Raises ValueError where a kernel cannot hold them: all but the last must have a multiple of 16
    rows, K must be a multiple of 32."""

    def __init__(self, parts: Sequence[Quantized], wide: bool = False) -> None:
        if any(part.shape[0] % ROWS for part in parts[:-1]) or parts[0].shape[1] % GROUP:
            raise ValueError(
                f"matrices of {[tuple(part.shape) for part in parts]} do not fit panels of {ROWS} rows and groups of {GROUP}"
            )
        self.panels = [pack(part, cpu_target.converts_half()) for part in parts]
        self.rows = sum(panels.rows for panels in self.panels)
        self.columns = parts[0].shape[1]
        self.padded = ROWS * sum(len(panels.data) for panels in self.panels)
        self.crossing, self.wide = CROSSING, wide
        self.fields = np.concatenate([matrix_fields(panels) for panels in self.panels])

    @property
    def machine_code(self) -> bool:
        """See backend.PackedQuantized."""
        return True

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.columns))

    @property
    def nbytes(self) -> int:
        return sum(panels.nbytes for panels in self.panels)

    @property
    def key(self) -> str:
        """Names the shape and the formats."""
        return (
            f"{self.rows}x{self.columns} {'+'.join(panels.format.name for panels in self.panels)}"
        )

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N] in x's type, or where `wide` in float32."""
        if self.wide:
            x = x.float()
        out = self.native(x).to(x.dtype) if len(x) <= self.crossing else self.dense(x)
        return out if bias is None else out + bias

    def native(self, x: Tensor) -> Tensor:
        """[T, N] float32. T may be 0: a step that only computes part of a prompt asks for no
        logits."""
        x = x.float().contiguous()
        sums = x.view(len(x), self.columns // GROUP, GROUP).sum(-1)
        out = torch.empty(len(x), self.padded)
        head = (
            len(self.panels),
            x.data_ptr(),
            4 * self.columns,
            sums.data_ptr(),
            len(x),
            out.data_ptr(),
            4 * self.padded,
        )
        assert len(head) == cpu_task.M_FIELDS
        cpu_native.run(
            cpu_native.address("multiply"),
            np.concatenate([np.array(head, np.int64), self.fields]),
            torch.get_num_threads(),
        )
        return out[:, : self.rows]

    def dense(self, x: Tensor) -> Tensor:
        """[T, N] in x's type, float32 or bfloat16."""
        return torch.mm(x, self.transposed(x.dtype))

    def transposed(self, dtype: torch.dtype) -> Tensor:
        """[K, N] of float32 or bfloat16, valid until the next call for any matrix."""
        size = self.columns * self.padded
        room = _scratch.get(dtype)
        if room is None or room.numel() < size:
            room = _scratch[dtype] = torch.empty(size, dtype=dtype)
        place = room[:size].view(self.columns, self.padded)
        first = 0
        for panels in self.panels:
            out = place.data_ptr() + first * dtype.itemsize
            head = (out, self.padded * dtype.itemsize, int(dtype == torch.bfloat16))
            assert len(head) == cpu_task.D_FIELDS
            task = np.concatenate([np.array(head, np.int64), matrix_fields(panels)])
            cpu_native.run(cpu_native.address("make_dense"), task, torch.get_num_threads())
            first += ROWS * len(panels.data)
        return place[:, : self.rows]

    def embed(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] int64 of the first matrix, [T, K] float32."""
        return rows_of(self.panels[0], ids)


def matrix_fields(panels: Panels) -> np.ndarray:
    """The fields of a matrix in a task (cpu_task), int64."""
    multiply, dense = (
        cpu_native.address(f"{kind}_{panels.format.name}") for kind in ("matmul", "dequantize")
    )
    count, groups = panels.data.shape[:2]
    return np.array(
        [multiply, panels.data.data_ptr(), groups, panels.format.group, count, dense], np.int64
    )
