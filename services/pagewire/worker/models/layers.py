"""The parts of a decoder that hold weights. Each names the checkpoint tensors it is made of and
gives the place each one goes to.

Fused weights (query, key and value; gate and up) are one matrix whose rows are named slices, so
that loading is a copy by name. Where matrices may stay quantized, each has a place of its own until
all are there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pagewire_kernels.backend import Ops
from pagewire_kernels.batch import Batch
from pagewire_kernels.quantized import GROUP, Quantized, quantize
from torch import Tensor


class Place(Protocol):
    """Where a checkpoint's tensor goes."""

    @property
    def shape(self) -> torch.Size: ...

    def copy_(self, value: Any, /) -> object: ...


Places = Iterator[tuple[str, Any]]
"""Names with a Tensor or another Place."""


@dataclass(frozen=True)
class Build:
    """What every part is made with."""

    ops: Ops
    dtype: torch.dtype
    device: str
    quantized: bool = False
    """Matrices that come quantized stay so; the back end has `pack_quantized`."""
    quantize_to: int = 0
    """Bits that matrices which come in full are rounded to, 0: none."""

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


class Part(Protocol):
    def places(self) -> Places:
        """Checkpoint tensors by name, with the memory each goes to."""
        ...

    def pack(self) -> None:
        """Once, after loading: `places` are dead from then on."""
        ...

    def packed(self) -> Iterator[Any]:
        """The matrices as the back end has them."""
        ...


class NoMatrix:
    def pack(self) -> None:
        """Nothing to do."""

    def packed(self) -> Iterator[Any]:
        yield from ()


class Matrix:
    """The place of a matrix that may stay quantized: holds what was copied here."""

    def __init__(self, build: Build, rows: int, columns: int) -> None:
        self._build, self.shape = build, torch.Size((rows, columns))
        self.value: Tensor | Quantized | None = None

    def copy_(self, value: Tensor | Quantized) -> None:
        if isinstance(value, Tensor) and self._build.quantize_to and self.shape[1] % GROUP == 0:
            value = quantize(value, self._build.quantize_to)
        self.value = (
            value if isinstance(value, Quantized) else value.to(self._build.dtype, copy=True)
        )

    def dense(self) -> Tensor:
        assert self.value is not None
        return (
            self.value.dequantize().to(self._build.dtype)
            if isinstance(self.value, Quantized)
            else self.value
        )


def pack_matrices(build: Build, matrices: list[Matrix], wide: bool = False) -> Any:
    """Side by side in the back end's form: quantized if all are and it has a kernel for them. wide:
    results in float32. Empties them."""
    values = [matrix.value for matrix in matrices]
    parts = [value for value in values if isinstance(value, Quantized)]
    packed = build.ops.pack_quantized(parts, wide) if len(parts) == len(values) else None
    if packed is None:
        packed = build.ops.pack_linear(torch.cat([matrix.dense() for matrix in matrices]))
    for matrix in matrices:
        matrix.value = None
    return packed


class Norm(Part, Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        ...

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(self(x + residual), x + residual); either input may be overwritten."""
        ...


class Head(Part, Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        ...


class Linear:
    """y = x W^T + b. `parts` maps checkpoint names (without .weight) to their share of W's rows, in
    order. wide: results may be float32 where that costs nothing."""

    def __init__(
        self, build: Build, parts: dict[str, int], columns: int, bias: bool, wide: bool = False
    ) -> None:
        rows = sum(parts.values())
        self._build, self._ops, self._parts, self._wide = build, build.ops, parts, wide
        self._matrices = (
            [Matrix(build, count, columns) for count in parts.values()] if build.quantized else []
        )
        self.weight: Any = None if build.quantized else build.empty(rows, columns)
        self.bias = build.empty(rows) if bias else None

    def places(self) -> Places:
        first = 0
        for index, (name, rows) in enumerate(self._parts.items()):
            yield (
                f"{name}.weight",
                self._matrices[index] if self._matrices else self.weight[first : first + rows],
            )
            if self.bias is not None:
                yield f"{name}.bias", self.bias[first : first + rows]
            first += rows

    def pack(self) -> None:
        if self._matrices:
            self.weight = pack_matrices(self._build, self._matrices, self._wide)
        else:
            self.weight = self._ops.pack_linear(self.weight)

    def packed(self) -> Iterator[Any]:
        yield self.weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.linear(x, self.weight, self.bias)


class RmsNorm(NoMatrix):
    def __init__(self, build: Build, name: str, size: int, eps: float, wide: bool = False) -> None:
        self._ops, self._name, self.eps = build.ops, name, eps
        self.weight = build.empty(size, dtype=torch.float32 if wide else None)

    def places(self) -> Places:
        yield f"{self._name}.weight", self.weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self._ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(NoMatrix):
    def __init__(self, build: Build, name: str, size: int, eps: float, bias: bool) -> None:
        self._ops, self._name, self._eps = build.ops, name, eps
        self._weight, self._bias = build.empty(size), build.empty(size) if bias else None

    def places(self) -> Places:
        yield f"{self._name}.weight", self._weight
        if self._bias is not None:
            yield f"{self._name}.bias", self._bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.layer_norm(x, self._weight, self._bias, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self._ops.add_layer_norm(x, residual, self._weight, self._bias, self._eps)


class Embedding:
    def __init__(self, build: Build, name: str, rows: int, columns: int) -> None:
        self._name, self._build, self.dtype = name, build, build.dtype
        self._matrix = Matrix(build, rows, columns) if build.quantized else None
        self.weight: Any = None if build.quantized else build.empty(rows, columns)
        self.quantized = False

    def places(self) -> Places:
        yield f"{self._name}.weight", self._matrix or self.weight

    def pack(self) -> None:
        """A quantized one serves as a head too, as it is."""
        if self._matrix is None:
            return
        value = self._matrix.value
        packed = (
            self._build.ops.pack_quantized([value], True) if isinstance(value, Quantized) else None
        )
        self.weight = self._matrix.dense() if packed is None else packed
        self.quantized, self._matrix = packed is not None, None

    def packed(self) -> Iterator[Any]:
        yield self.weight

    def __call__(self, ids: Tensor, batch: Batch) -> Tensor:
        """ids [T] int64 -> [T, columns]."""
        return (
            self.weight.embed(ids).to(self.dtype)
            if self.quantized
            else torch.embedding(self.weight, ids)
        )


class InputEmbedding:
    """An embedding with what some families do next: scale it, project it to the hidden size, add a
    learned vector for each position."""

    def __init__(
        self,
        tokens: Embedding,
        scale: float,
        projection: Linear | None,
        positions: Embedding | None,
    ) -> None:
        self._tokens, self._projection, self._positions = tokens, projection, positions
        self._scale = torch.tensor(scale, dtype=tokens.dtype).item()
        """Rounded to the weights' type, as the models were trained."""

    def _parts(self) -> Iterator[Part]:
        return (
            part for part in (self._tokens, self._projection, self._positions) if part is not None
        )

    def places(self) -> Places:
        for part in self._parts():
            yield from part.places()

    def pack(self) -> None:
        for part in self._parts():
            part.pack()

    def packed(self) -> Iterator[Any]:
        for part in self._parts():
            yield from part.packed()

    def __call__(self, ids: Tensor, batch: Batch) -> Tensor:
        x = self._tokens(ids, batch)
        if self._scale != 1:
            x = x * self._scale
        if self._projection is not None:
            x = self._projection(x)
        return x if self._positions is None else x + self._positions(batch.positions, batch)


class TiedHead:
    """A head whose weight is the embedding's; packing keeps a second copy only where the back end
    has a layout of its own."""

    def __init__(self, build: Build, embedding: Embedding) -> None:
        self._ops, self._embedding = build.ops, embedding
        self.weight: Any = None

    def places(self) -> Places:
        yield from ()

    def pack(self) -> None:
        tied = self._embedding
        self.weight = tied.weight if tied.quantized else self._ops.pack_linear(tied.weight)

    def packed(self) -> Iterator[Any]:
        yield self.weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._embedding.quantized:
            return self._ops.linear(x, self.weight)
        return self._ops.tied_logits(x, self.weight, self._embedding.weight)


class LMHead:
    """A head with what some families do around it: project to the embedding's size before, hold
    logits within +-`cap` after."""

    def __init__(self, head: Head, projection: Linear | None, cap: float | None) -> None:
        self._head, self._projection, self._cap = head, projection, cap

    def places(self) -> Places:
        if self._projection is not None:
            yield from self._projection.places()
        yield from self._head.places()

    def pack(self) -> None:
        if self._projection is not None:
            self._projection.pack()
        self._head.pack()

    def packed(self) -> Iterator[Any]:
        if self._projection is not None:
            yield from self._projection.packed()
        yield from self._head.packed()

    def __call__(self, x: Tensor) -> Tensor:
        logits = self._head(x if self._projection is None else self._projection(x))
        return logits if self._cap is None else logits.div_(self._cap).tanh_().mul_(self._cap)
