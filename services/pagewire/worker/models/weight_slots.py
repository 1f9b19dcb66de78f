"""Where the tensors of a checkpoint go: each part of a model names the tensors that it is made of
as weight slots, and loading fills the slots by name.

Names are the decoder's own (see checkpoint.py). A slot may take a part of the checkpoint's tensor
only, as a rank of a tensor-parallel group does, and it puts the rows of heads into the order that
the kernels want. Knows no file format.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from pagewire_kernels.quantized import Quantized, StoredMatrix
from torch import Tensor

AnyMatrix = Tensor | Quantized | StoredMatrix
VOCABULARY_UNIT: Final = 64
"""Tokens of which each rank has a multiple."""


@dataclass(frozen=True)
class TensorSlice:
    """Indices start to start + length of dimension `dim`, which has `total` in the checkpoint: 0
    for the rows of a matrix (output features), 1 for its columns (input features)."""

    dim: int
    start: int
    length: int
    total: int

    def of(self, value: AnyMatrix) -> AnyMatrix:
        """This part of a checkpoint's tensor, without a copy."""
        return value.narrow(self.dim, self.start, self.length)


@dataclass(frozen=True)
class Shard:
    """The part of a model that one process of a tensor-parallel group holds: number `rank` of
    `size` equal ones. The default is the whole."""

    rank: int = 0
    size: int = 1

    @property
    def whole(self) -> bool:
        """Whether there is one rank only."""
        return self.size == 1

    def split(self, count: int, dim: int, unit: int = 1) -> TensorSlice | None:
        """This rank's part of a dimension of `count` units of `unit` elements, None for all of it.
        Fewer units than ranks, as KV heads may be, are held by several ranks each. Raises
        ValueError where `count` cannot be divided."""
        if self.whole:
            return None
        if count % self.size == 0:
            each = count // self.size
            return TensorSlice(dim, self.rank * each * unit, each * unit, count * unit)
        if self.size % count == 0:
            return TensorSlice(dim, self.rank * count // self.size * unit, unit, count * unit)
        raise ValueError(f"{count} cannot be divided among {self.size} ranks")

    def vocabulary(self, count: int) -> TensorSlice | None:
        """This rank's rows of a table of `count` tokens, None for all of them. Every rank but the
        last ones has `each_of_vocabulary`."""
        if self.whole:
            return None
        each = self.each_of_vocabulary(count)
        start = min(self.rank * each, count)
        return TensorSlice(0, start, min(each, count - start), count)

    def each_of_vocabulary(self, count: int) -> int:
        """The rows of a table of `count` tokens that a rank has, or would have if there were
        enough: in whole units that matrix products like, unless some rank were left with none."""
        each = -(-count // self.size)
        aligned = -(-each // VOCABULARY_UNIT) * VOCABULARY_UNIT
        return aligned if aligned * (self.size - 1) < count else each


WHOLE = Shard()


class SlotTarget(Protocol):
    """What holds a checkpoint's tensor where it may stay quantized. `shape`: as the slot takes it,
    after slicing."""

    @property
    def shape(self) -> torch.Size:
        """Of the slot's part."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the slot's part is held."""
        ...

    def copy_(self, value: AnyMatrix, /) -> object:
        """Take the slot's part of a checkpoint's tensor."""
        ...


@dataclass(frozen=True)
class WeightSlot:
    """One tensor that a part of the model wants. `name`: of the checkpoint's tensor, in the
    decoder's names; unique in a model. `target`: memory for it, of any type and device, or an
    object that also takes quantized matrices."""

    name: str
    target: Tensor | SlotTarget
    slice: TensorSlice | None = None
    """The part that `target` holds; None: all of it."""
    row_order: Tensor | None = None
    """[n] int64: of each n rows that follow each other, the order in which `target` has them
    (rotary.order). None: the checkpoint's."""
    rounding: Callable[[Tensor], Tensor | Quantized] | None = None
    """What the whole of a full tensor is brought to before a part of it is taken: where its values
    depend on what other ranks hold. None: nothing, or `target` does it."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor in the checkpoint."""
        sizes = list(self.target.shape)
        if self.slice is not None:
            sizes[self.slice.dim] = self.slice.total
        return torch.Size(sizes)

    def fill(self, value: AnyMatrix) -> None:
        """Copy this slot's part of a checkpoint's tensor to its place."""
        if self.rounding is not None and isinstance(value, Tensor):
            value = self.rounding(value.to(self.target.device))
        if not isinstance(self.target, Tensor):
            self.target.copy_(self._taken(value))
            return
        part = self._taken(value if isinstance(value, Tensor) else value.dequantize())
        assert isinstance(part, Tensor)
        self.target.copy_(part)

    def _taken(self, value: AnyMatrix) -> AnyMatrix:
        """Its part, with rows in order."""
        part = value if self.slice is None else self.slice.of(value)
        return part if self.row_order is None else in_order(part, self.row_order)


WeightSlots = Iterator[WeightSlot]


def in_order(value: AnyMatrix, order: Tensor) -> AnyMatrix:
    """`value` with each len(order) rows that follow each other put in `order`."""
    starts = torch.arange(0, value.shape[0], len(order))
    rows = (starts[:, None] + order).flatten()
    return value[rows] if isinstance(value, Tensor) else value.take(rows)
