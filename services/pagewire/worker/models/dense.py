"""Weights as they are: matrices in the model's type, in the back end's layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pagewire_kernels.backend import Ops
from torch import Tensor

from .linear_method import (
    EmbeddingWeight,
    ExpertsSpec,
    ExpertsWeight,
    LinearPart,
    LinearSpec,
    LinearWeight,
)
from .rounding import Rounding
from .weight_slots import AnyMatrix, TensorSlice, WeightSlot, WeightSlots


@dataclass(frozen=True)
class DenseMethod:
    """The linear method of full weights of type `dtype` on `device`. `rounding`: of the matrices,
    while they are loaded."""

    ops: Ops
    dtype: torch.dtype
    device: str
    rounding: Rounding | None = None

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised memory."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def allocate(self, spec: LinearSpec) -> "DenseLinear":
        """See LinearMethod."""
        return DenseLinear(self, spec)

    def allocate_experts(self, spec: ExpertsSpec) -> "DenseExperts":
        """See LinearMethod."""
        return DenseExperts(self, spec)

    def allocate_embedding(
        self, name: str, rows: int, columns: int, part: TensorSlice | None = None
    ) -> "DenseEmbedding":
        """See LinearMethod."""
        return DenseEmbedding(self, name, rows, columns, part)


def applied(rounding: Rounding | None, spec: LinearSpec) -> Rounding | None:
    """The rounding of this layer's matrices."""
    if rounding is None or spec.keep_precision or (spec.float32_output and not rounding.head):
        return None
    return rounding


class RoundedTarget:
    """Memory for full weights that are rounded on their way there."""

    def __init__(self, memory: Tensor, rounding: Rounding) -> None:
        self._memory = memory
        self._rounding = rounding

    @property
    def shape(self) -> torch.Size:
        """Of the memory."""
        return self._memory.shape

    @property
    def device(self) -> torch.device:
        """Of the memory."""
        return self._memory.device

    def copy_(self, value: AnyMatrix) -> None:
        """Take a matrix; one that comes quantized is not rounded again."""
        if isinstance(value, Tensor):
            self._memory.copy_(self._rounding.full(value.to(self._memory.device)))
        else:
            self._memory.copy_(value.dequantize())


def target_for(memory: Tensor, rounding: Rounding | None) -> Tensor | RoundedTarget:
    """`memory`, or what rounds before it copies there."""
    return memory if rounding is None else RoundedTarget(memory, rounding)


def matrix_slot(
    part: LinearPart,
    target: Any,
    columns: TensorSlice | None,
    rounding: Rounding | None = None,
) -> WeightSlot:
    """The slot of one part's matrix; `rounding`: of the whole before it is cut (see `by_slot`).
    Raises ValueError for a slice in both dimensions, which no layout of ranks asks for."""
    if part.rows is not None and columns is not None:
        raise ValueError(f"{part.name} cannot be cut by rows and by columns at once")
    whole = rounding.values if rounding is not None else None
    part_of = part.rows or columns
    return WeightSlot(f"{part.name}.weight", target, part_of, part.row_order, whole)


def by_slot(
    rounding: Rounding | None, columns: TensorSlice | None
) -> tuple[Rounding | None, Rounding | None]:
    """(what the target rounds with, what the slot does): scales are of groups of columns, so where
    ranks cut those the whole matrix is rounded first, as one process would."""
    return (rounding, None) if columns is None else (None, rounding)


class DenseLinear(LinearWeight):
    """One matrix; the parts of the checkpoint are ranges of its rows, so that loading is a copy."""

    def __init__(self, method: DenseMethod, spec: LinearSpec) -> None:
        self._ops = method.ops
        self._spec = spec
        self._rounding = applied(method.rounding, spec)
        self.kernel_weight: Tensor = method.empty(spec.held_rows, spec.held_columns)

    def weight_slots(self) -> WeightSlots:
        """See Weight."""
        first = 0
        columns = self._spec.columns
        rounding, whole = by_slot(self._rounding, columns)
        for part in self._spec.parts:
            rows = self.kernel_weight[first : first + part.held]
            yield matrix_slot(part, target_for(rows, rounding), columns, whole)
            first += part.held

    def pack(self) -> None:
        """See Weight."""
        self.kernel_weight = self._ops.pack_linear(self.kernel_weight)

    @property
    def nbytes(self) -> int:
        """See Weight."""
        return self.kernel_weight.nbytes

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See LinearWeight."""
        return self._ops.linear(x, self.kernel_weight, bias)


class DenseExperts(ExpertsWeight):
    """Gate and up of all experts [E, 2I, H], and down [E, H, I]."""

    def __init__(self, method: DenseMethod, spec: ExpertsSpec) -> None:
        self._ops = method.ops
        self._spec = spec
        self._rounding = method.rounding
        inner = spec.held_inner
        hidden = spec.hidden_size
        gate_up = method.empty(spec.num_experts, 2 * inner, hidden)
        down = method.empty(spec.num_experts, hidden, inner)
        self._nbytes = gate_up.nbytes + down.nbytes
        self._gate_up: Any = gate_up
        self._down: Any = down

    @property
    def nbytes(self) -> int:
        """See Weight."""
        return self._nbytes

    def weight_slots(self) -> WeightSlots:
        """See Weight."""
        inner = self._spec.held_inner
        for expert in range(self._spec.num_experts):
            gate, up = self._spec.gate_up(expert).parts
            down = self._spec.down(expert)
            for part, memory, columns in (
                (gate, self._gate_up[expert, :inner], None),
                (up, self._gate_up[expert, inner:], None),
                (down.parts[0], self._down[expert], down.columns),
            ):
                rounding, whole = by_slot(self._rounding, columns)
                yield matrix_slot(part, target_for(memory, rounding), columns, whole)

    def pack(self) -> None:
        """See Weight."""
        self._gate_up = self._ops.pack_experts(self._gate_up)
        self._down = self._ops.pack_experts(self._down)

    def packed(self) -> Iterator[Any]:
        """See Weight."""
        yield from self._gate_up
        yield from self._down

    @property
    def kernel_weights(self) -> tuple[Any, Any]:
        """See ExpertsWeight."""
        return self._gate_up, self._down

    def apply(self, x: Tensor, top_k_ids: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ExpertsWeight."""
        return self._ops.experts(x, self._gate_up, self._down, top_k_ids, top_k_weights)


class DenseEmbedding(EmbeddingWeight):
    """The table; as a head it is packed a second time where the back end has a layout of its
    own."""

    def __init__(
        self, method: DenseMethod, name: str, rows: int, columns: int, part: TensorSlice | None
    ) -> None:
        self._ops = method.ops
        self._name = name
        self._part = part
        self.table = method.empty(rows if part is None else part.length, columns)
        self.kernel_weight: Any = self.table

    def weight_slots(self) -> WeightSlots:
        """See Weight."""
        yield WeightSlot(f"{self._name}.weight", self.table, self._part)

    def pack(self) -> None:
        """A table is read row by row, as it is."""

    def packed(self) -> Iterator[Any]:
        """See Weight."""
        yield self.kernel_weight

    @property
    def nbytes(self) -> int:
        """See Weight."""
        return self.table.nbytes

    def embed(self, ids: Tensor) -> Tensor:
        """See EmbeddingWeight."""
        return torch.embedding(self.table, ids)

    def pack_head(self) -> None:
        """See EmbeddingWeight."""
        self.kernel_weight = self._ops.pack_linear(self.table)

    def logits(self, x: Tensor) -> Tensor:
        """See EmbeddingWeight."""
        return self._ops.tied_logits(x, self.kernel_weight, self.table)
