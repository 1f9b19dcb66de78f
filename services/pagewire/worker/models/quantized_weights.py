"""Weights that stay quantized where they come quantized, or that are rounded while they are loaded.
What cannot stay so is made dense.

A CPU also keeps tables of embeddings so; on a GPU those are dense.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pagewire_kernels.backend import Ops, QuantizedExpertOps, QuantizedOps
from pagewire_kernels.quantized import Quantized
from pagewire_kernels.quantized_rows import QuantizedRows, full_rows
from torch import Tensor

from .dense import DenseEmbedding, DenseMethod, applied, by_slot, matrix_slot
from .linear_method import (
    EmbeddingWeight,
    ExpertsSpec,
    ExpertsWeight,
    LinearSpec,
    LinearWeight,
)
from .rounding import Rounding
from .weight_slots import AnyMatrix, TensorSlice, WeightSlot, WeightSlots


@dataclass(frozen=True)
class QuantizedMethod:
    """The linear method of matrices that may stay quantized. `rounding`: of matrices that come in
    full; None: they stay full. `dtype`: of activations and full matrices."""

    ops: Ops
    quantized: QuantizedOps
    dtype: torch.dtype
    device: str
    rounding: Rounding | None = None

    @property
    def on_cpu(self) -> bool:
        """Where everything may stay quantized."""
        return self.device == "cpu"

    @property
    def dense(self) -> DenseMethod:
        """The method of what does not stay quantized."""
        return DenseMethod(self.ops, self.dtype, self.device)

    def allocate(self, spec: LinearSpec) -> "QuantizedLinear":
        """See LinearMethod."""
        return QuantizedLinear(self, spec)

    def allocate_experts(self, spec: ExpertsSpec) -> "QuantizedExperts | StackedExperts":
        """See LinearMethod."""
        packing = self.quantized.experts
        if packing is None:
            return QuantizedExperts(self, spec)
        return StackedExperts(self, packing, spec)

    def allocate_embedding(
        self, name: str, rows: int, columns: int, part: TensorSlice | None = None
    ) -> "QuantizedEmbedding | DenseEmbedding":
        """See LinearMethod."""
        if self.on_cpu:
            return QuantizedEmbedding(self, name, rows, columns, part)
        return self.dense.allocate_embedding(name, rows, columns, part)


class QuantizedSlot:
    """Holds what is copied here, until the weight is packed: a checkpoint says only then in which
    type a matrix comes. `arrived` is called after each copy."""

    def __init__(
        self,
        method: QuantizedMethod,
        rounding: Rounding | None,
        rows: int,
        columns: int,
        arrived: Callable[[], None] = lambda: None,
    ) -> None:
        self._dtype = method.dtype
        self._rounding = rounding
        self._arrived = arrived
        self.device = torch.device(method.device)
        self.shape = torch.Size((rows, columns))
        self.value: Tensor | Quantized | None = None

    def copy_(self, value: AnyMatrix) -> None:
        """Keep `value` [rows, columns], rounded where asked for."""
        held = value.to(self.device)
        if isinstance(held, Tensor) and self._rounding is not None:
            held = self._rounding.values(held)
        if isinstance(held, Tensor):
            held = held.to(self._dtype, copy=True)
        self.value = held
        self._arrived()

    def dense(self) -> Tensor:
        """The matrix in full."""
        assert self.value is not None
        if isinstance(self.value, Quantized):
            return self.value.dequantize().to(self._dtype)
        return self.value


class QuantizedLinear(LinearWeight):
    """The parts side by side: quantized where all of them are and there is a kernel for them."""

    def __init__(self, method: QuantizedMethod, spec: LinearSpec) -> None:
        self._method = method
        self._spec = spec
        rounding, self._whole = by_slot(applied(method.rounding, spec), spec.columns)
        # A GPU packs each matrix as soon as it is there: codes take twice their memory until then.
        arrived = (lambda: None) if method.on_cpu else self._pack_if_whole
        self._slots = [
            QuantizedSlot(method, rounding, part.held, spec.held_columns, arrived)
            for part in spec.parts
        ]
        self.kernel_weight: Any = None

    def weight_slots(self) -> WeightSlots:
        """See Weight."""
        for part, slot in zip(self._spec.parts, self._slots, strict=True):
            yield matrix_slot(part, slot, self._spec.columns, self._whole)

    def _pack_if_whole(self) -> None:
        if all(slot.value is not None for slot in self._slots):
            self.pack()

    def pack(self) -> None:
        """See Weight."""
        if self.kernel_weight is not None:
            return
        values = [slot.value for slot in self._slots]
        parts = [value for value in values if isinstance(value, Quantized)]
        packed = None
        if len(parts) == len(values):
            packed = self._method.quantized.pack(parts, self._spec.float32_output)
        if packed is None:
            full = torch.cat([slot.dense() for slot in self._slots])
            packed = self._method.ops.pack_linear(full)
        self.kernel_weight = packed
        for slot in self._slots:
            slot.value = None

    @property
    def nbytes(self) -> int:
        """See Weight."""
        return 0 if self.kernel_weight is None else self.kernel_weight.nbytes

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See LinearWeight."""
        return self._method.ops.linear(x, self.kernel_weight, bias)

    def input_group(self, rows: int, dtype: torch.dtype) -> int | None:
        """See LinearWeight."""
        quantizing = self._method.quantized.quantizing
        return None if quantizing is None else quantizing.group_of(self.kernel_weight, rows, dtype)

    def apply_quantized(self, x: QuantizedRows, bias: Tensor | None) -> Tensor:
        """See LinearWeight."""
        quantizing = self._method.quantized.quantizing
        if quantizing is None or self.input_group(len(x), x.dtype) != x.group:
            return self.apply(full_rows(x), bias)
        return quantizing.linear(x, self.kernel_weight, bias)


class QuantizedExperts(ExpertsWeight):
    """Each expert's matrices by themselves, on a CPU: types may differ between them."""

    def __init__(self, method: QuantizedMethod, spec: ExpertsSpec) -> None:
        self._ops = method.ops
        numbers = range(spec.num_experts)
        self._gate_up = [method.allocate(spec.gate_up(expert)) for expert in numbers]
        self._down = [method.allocate(spec.down(expert)) for expert in numbers]
        self._packed: tuple[list[Any], list[Any]] = ([], [])

    def weight_slots(self) -> WeightSlots:
        """See Weight."""
        for gate_up, down in zip(self._gate_up, self._down, strict=True):
            yield from gate_up.weight_slots()
            yield from down.weight_slots()

    def pack(self) -> None:
        """See Weight."""
        for weight in (*self._gate_up, *self._down):
            weight.pack()
        self._packed = (
            [weight.kernel_weight for weight in self._gate_up],
            [weight.kernel_weight for weight in self._down],
        )

    def packed(self) -> Iterator[Any]:
        """See Weight."""
        for weights in self._packed:
            yield from weights

    @property
    def nbytes(self) -> int:
        """See Weight."""
        return sum(weight.nbytes for weight in (*self._gate_up, *self._down))

    @property
    def kernel_weights(self) -> tuple[Any, Any]:
        """See ExpertsWeight."""
        return self._packed

    def apply(self, x: Tensor, top_k_ids: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ExpertsWeight."""
        gate_up, down = self._packed
        return self._ops.experts(x, gate_up, down, top_k_ids, top_k_weights)


class StackedExperts(ExpertsWeight):
    """The matrices of all experts together: quantized where all are alike and there is a kernel for
    them, else full."""

    def __init__(
        self, method: QuantizedMethod, packing: QuantizedExpertOps, spec: ExpertsSpec
    ) -> None:
        self._ops = method.ops
        self._packing = packing
        numbers = range(spec.num_experts)
        self._weight_slots: list[WeightSlot] = []
        self._gate_up = [self._expert(method, spec.gate_up(number)) for number in numbers]
        self._down = [self._expert(method, spec.down(number)) for number in numbers]
        self._packed: tuple[Any, Any] | None = None

    def _expert(self, method: QuantizedMethod, spec: LinearSpec) -> list[QuantizedSlot]:
        """Of matrices that read the same input."""
        rounding, whole = by_slot(applied(method.rounding, spec), spec.columns)
        slots = []
        for part in spec.parts:
            slot = QuantizedSlot(
                method, rounding, part.held, spec.held_columns, self._pack_if_whole
            )
            self._weight_slots.append(matrix_slot(part, slot, spec.columns, whole))
            slots.append(slot)
        return slots

    def weight_slots(self) -> WeightSlots:
        """See Weight."""
        yield from self._weight_slots

    def _pack_if_whole(self) -> None:
        # A layer at a time: codes take up to twice their memory until they are packed.
        if all(slot.value is not None for slots in self._slots() for slot in slots):
            self.pack()

    def _slots(self) -> list[list[QuantizedSlot]]:
        return self._gate_up + self._down

    def pack(self) -> None:
        """See Weight."""
        if self._packed is not None:
            return
        gate_up = self._stacked(self._gate_up)
        down = self._stacked(self._down)
        if gate_up is None or down is None:
            gate_up = self._full(self._gate_up)
            down = self._full(self._down)
        self._packed = (gate_up, down)
        for slots in self._slots():
            for slot in slots:
                slot.value = None

    def _stacked(self, experts: list[list[QuantizedSlot]]) -> Any | None:
        values = [[slot.value for slot in slots] for slots in experts]
        matrices = [[one for one in each if isinstance(one, Quantized)] for each in values]
        if sum(map(len, matrices)) < sum(map(len, values)):
            return None
        return self._packing.pack_experts(matrices)

    def _full(self, experts: list[list[QuantizedSlot]]) -> Any:
        matrices = [torch.cat([slot.dense() for slot in slots]) for slots in experts]
        return self._ops.pack_experts(torch.stack(matrices))

    def packed(self) -> Iterator[Any]:
        """See Weight."""
        assert self._packed is not None
        yield from self._packed

    @property
    def nbytes(self) -> int:
        """See Weight."""
        return 0 if self._packed is None else sum(weight.nbytes for weight in self._packed)

    @property
    def kernel_weights(self) -> tuple[Any, Any]:
        """See ExpertsWeight."""
        assert self._packed is not None
        return self._packed

    def apply(self, x: Tensor, top_k_ids: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ExpertsWeight."""
        gate_up, down = self.kernel_weights
        return self._ops.experts(x, gate_up, down, top_k_ids, top_k_weights)


class QuantizedEmbedding(EmbeddingWeight):
    """A table that stays quantized serves as a head as it is; one that does not is dense."""

    def __init__(
        self, method: QuantizedMethod, name: str, rows: int, columns: int, part: TensorSlice | None
    ) -> None:
        self._method = method
        self._name = name
        self._part = part
        rounding = method.rounding if method.rounding and method.rounding.head else None
        held = rows if part is None else part.length
        self._slot = QuantizedSlot(method, rounding, held, columns)
        self._table: Tensor | None = None
        self.kernel_weight: Any = None

    def weight_slots(self) -> WeightSlots:
        """See Weight."""
        yield WeightSlot(f"{self._name}.weight", self._slot, self._part)

    def pack(self) -> None:
        """See Weight."""
        value = self._slot.value
        if isinstance(value, Quantized):
            self.kernel_weight = self._method.quantized.pack([value], True)
        if self.kernel_weight is None:
            self._table = self._slot.dense()
            self.kernel_weight = self._table
        self._slot.value = None

    def packed(self) -> Iterator[Any]:
        """See Weight."""
        yield self.kernel_weight

    @property
    def nbytes(self) -> int:
        """See Weight."""
        return 0 if self.kernel_weight is None else self.kernel_weight.nbytes

    def embed(self, ids: Tensor) -> Tensor:
        """See EmbeddingWeight."""
        if self._table is not None:
            return torch.embedding(self._table, ids)
        return self.kernel_weight.embed(ids).to(self._method.dtype)

    def pack_head(self) -> None:
        """See EmbeddingWeight."""
        if self._table is not None:
            self.kernel_weight = self._method.ops.pack_linear(self._table)

    def logits(self, x: Tensor) -> Tensor:
        """See EmbeddingWeight."""
        if self._table is not None:
            return self._method.ops.tied_logits(x, self.kernel_weight, self._table)
        return self._method.ops.linear(x, self.kernel_weight)
