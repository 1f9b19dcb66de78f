"""The parts of a decoder that hold weights. Each names the checkpoint tensors it is made of and gives the place each one goes to.

Fused weights (query, key and value; gate and up) are one matrix whose rows are named slices, so that loading is a copy by name.
"""

from collections.abc import Iterator

import torch
from pagewire_kernels.backend import Ops
from torch import Tensor

Places = Iterator[tuple[str, Tensor]]


class Linear:
    """y = x W^T + b. `parts` maps checkpoint names (without .weight) to their share of W's rows, in order."""

    def __init__(self, ops: Ops, parts: dict[str, int], columns: int, bias: bool, dtype: torch.dtype, device: str) -> None:
        rows = sum(parts.values())
        self._ops, self._parts = ops, parts
        self._weight = torch.empty(rows, columns, dtype=dtype, device=device)
        self._bias = torch.empty(rows, dtype=dtype, device=device) if bias else None

    def places(self) -> Places:
        first = 0
        for name, rows in self._parts.items():
            yield f"{name}.weight", self._weight[first : first + rows]
            if self._bias is not None:
                yield f"{name}.bias", self._bias[first : first + rows]
            first += rows

    def pack(self) -> None:
        """Once, after loading: `places` are dead from then on."""
        self._weight = self._ops.pack_linear(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.linear(x, self._weight, self._bias)


class Norm:
    def __init__(self, name: str, size: int, dtype: torch.dtype, device: str) -> None:
        self._name = name
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def places(self) -> Places:
        yield f"{self._name}.weight", self.weight


class Embedding:
    def __init__(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
        self._name = name
        self.weight = torch.empty(rows, columns, dtype=dtype, device=device)

    def places(self) -> Places:
        yield f"{self._name}.weight", self.weight

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> [T, columns]."""
        return torch.embedding(self.weight, ids)


class TiedHead:
    """A head whose weight is the embedding's; packing keeps a second copy only where the back end has a layout of its own."""

    def __init__(self, ops: Ops, embedding: Embedding) -> None:
        self._ops, self._embedding = ops, embedding
        self._weight: Tensor | None = None

    def places(self) -> Places:
        yield from ()

    def pack(self) -> None:
        self._weight = self._ops.pack_linear(self._embedding.weight)

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.tied_logits(x, self._weight, self._embedding.weight)
