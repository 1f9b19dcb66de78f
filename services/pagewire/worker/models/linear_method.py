"""How the weights of linear layers are held and multiplied: one seam for dense weights and for
every quantized format.

A `LinearMethod` is chosen for each layer, by its name, when the model is built (`Build.method`). It
allocates a weight for the layer; the weight says which tensors of the checkpoint it wants (with a
suffix of its own for each: .weight, or .qweight, .scales and .qzeros), brings them into the form
that its kernel reads once all have come, multiplies, and says how many bytes it takes. Layers,
loading and memory planning ask it for all of that and know no format.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pagewire_kernels.quantized_rows import QuantizedRows, full_rows
from torch import Tensor

from .weight_slots import TensorSlice, WeightSlots


@dataclass(frozen=True)
class LinearPart:
    """One matrix of the checkpoint, of those that a layer multiplies side by side. `name`: without
    a suffix. `out_features`: rows in the checkpoint. `rows`: the slice of them that this rank
    holds, None: all."""

    name: str
    out_features: int
    rows: TensorSlice | None = None
    row_order: Tensor | None = None
    """See WeightSlot.row_order. A format that packs rows into words must unpack them first."""

    @property
    def held(self) -> int:
        """Rows that this rank holds."""
        return self.out_features if self.rows is None else self.rows.length


@dataclass(frozen=True)
class LinearSpec:
    """What a layer asks of its weight: y = x W^T, with the rows of W from `parts`, in order.
    `in_features`: columns in the checkpoint. `columns`: the slice of them that this rank holds,
    None: all."""

    parts: tuple[LinearPart, ...]
    in_features: int
    columns: TensorSlice | None = None
    float32_output: bool = False
    """Results may be float32 where that costs nothing: of the head."""
    keep_precision: bool = False
    """Not to be rounded while it is loaded, as a router; a checkpoint that comes with it quantized
    is another matter."""

    @property
    def held_rows(self) -> int:
        """Rows of all parts that this rank holds."""
        return sum(part.held for part in self.parts)

    @property
    def held_columns(self) -> int:
        """Columns that this rank holds."""
        return self.in_features if self.columns is None else self.columns.length


@dataclass(frozen=True)
class ExpertsSpec:
    """The matrices of a mixture's experts: of each, `names` + number + .gate_proj, .up_proj and
    .down_proj. `inner`: the slice of the intermediate size that this rank holds, None: all."""

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    inner: TensorSlice | None = None

    @property
    def held_inner(self) -> int:
        """Elements of the intermediate size that this rank holds."""
        return self.intermediate_size if self.inner is None else self.inner.length

    def gate_up(self, expert: int) -> LinearSpec:
        """The first matrices of one expert, side by side."""
        names = (f"{self.name}.{expert}.gate_proj", f"{self.name}.{expert}.up_proj")
        parts = tuple(LinearPart(name, self.intermediate_size, self.inner) for name in names)
        return LinearSpec(parts, self.hidden_size)

    def down(self, expert: int) -> LinearSpec:
        """The last matrix of one expert."""
        part = LinearPart(f"{self.name}.{expert}.down_proj", self.hidden_size)
        columns = self.inner and TensorSlice(
            1, self.inner.start, self.inner.length, self.inner.total
        )
        return LinearSpec((part,), self.intermediate_size, columns)


class Weight(ABC):
    """What all weights have. Memory is uninitialised until every slot has been filled; `pack` is
    called once, after that, and ends the life of the slots."""

    @abstractmethod
    def weight_slots(self) -> WeightSlots:
        """The checkpoint's tensors, several for a quantized matrix; without biases."""

    @abstractmethod
    def pack(self) -> None:
        """Bring what was loaded into the form that is multiplied with."""

    @abstractmethod
    def packed(self) -> Iterator[Any]:
        """The matrices in that form: whatever the back end's functions take as a weight."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the device's memory that the weight takes once it is packed, as far as they are
        known: before loading, a format that depends on the file gives 0."""


class LinearWeight(Weight):
    """The weight of one linear layer: W [held rows, held columns]."""

    kernel_weight: Any
    """The one matrix for Ops.linear, once packed. Fused kernels take it only where it is a
    Tensor."""

    def packed(self) -> Iterator[Any]:
        """The one matrix; a format that keeps parts apart gives several."""
        yield self.kernel_weight

    @abstractmethod
    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, held columns] W^T + bias -> [T, held rows]. Called in every step: no choices here,
        nothing that waits for the device."""

    def input_group(self, rows: int, dtype: torch.dtype) -> int | None:
        """How so many rows of x of type `dtype` may come rounded to float8, as
        backend.QuantizingOps.group_of says; None: they come in full."""
        return None

    def apply_quantized(self, x: QuantizedRows, bias: Tensor | None) -> Tensor:
        """`apply` of rows that something has rounded, for this weight as `input_group` says or for
        another that reads them too."""
        return self.apply(full_rows(x), bias)


class InputReader(Protocol):
    """What reads the result of a norm."""

    def input_group(self, rows: int, dtype: torch.dtype) -> int | None:
        """See LinearWeight."""
        ...


class ExpertsWeight(Weight):
    """The weights of all experts of a mixture."""

    @property
    @abstractmethod
    def kernel_weights(self) -> tuple[Any, Any]:
        """Gate and up of all experts, and down, for Ops.experts; once packed."""

    @abstractmethod
    def apply(self, x: Tensor, top_k_ids: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [T, H] -> [T, H]; top_k_ids [T, k] integer, top_k_weights [T, k] float32."""


class EmbeddingWeight(Weight):
    """A table of vectors [rows, columns], which may serve as the head too."""

    kernel_weight: Any
    """The matrix that the head multiplies with, once packed."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> [T, columns] in the model's type."""

    @abstractmethod
    def pack_head(self) -> None:
        """After `pack`, where the table is the head's matrix as well."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """x [R, columns] -> [R, rows]; after `pack_head`."""


class LinearMethod(Protocol):
    """A format of weights on a device. Holds no weights itself: one serves any number of layers."""

    def allocate(self, spec: LinearSpec) -> LinearWeight:
        """A weight for a linear layer. Raises Unsupported for a shape that the format cannot
        hold."""
        ...

    def allocate_experts(self, spec: ExpertsSpec) -> ExpertsWeight:
        """Weights for the experts of a mixture."""
        ...

    def allocate_embedding(
        self, name: str, rows: int, columns: int, part: TensorSlice | None = None
    ) -> EmbeddingWeight:
        """A table for token embeddings; `name` without a suffix, `rows` in the checkpoint, `part`:
        the slice of them that this rank holds, None: all."""
        ...
