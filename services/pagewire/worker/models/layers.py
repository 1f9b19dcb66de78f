"""The parts of a decoder that hold weights, and `Build`, with which they are made.

A part names the checkpoint's tensors that it is made of (weight_slots.py) and leaves the format of
its matrices to a linear method (linear_method.py). Fused weights (query, key and value; gate and
up) are one matrix of several parts of the checkpoint. Every call of a layer is given the step's
Batch, from which it can tell what row of its input belongs to which request.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pagewire_kernels.backend import Ops
from pagewire_kernels.batch import Batch
from pagewire_kernels.communicator import SINGLE_RANK, Communicator, NormingCommunicator
from pagewire_kernels.kv_cache import KVScales
from pagewire_kernels.quantized_rows import Activations, QuantizedRows
from pagewire_protocol.agreed import SPARE_POSITIONS
from torch import Tensor

from .dense import DenseMethod
from .linear_method import (
    EmbeddingWeight,
    ExpertsSpec,
    ExpertsWeight,
    LinearMethod,
    LinearPart,
    LinearSpec,
)
from .ranks import WHOLE_MODEL, PipelineStage
from .weight_slots import WHOLE, Shard, WeightSlot, WeightSlots

MethodChoice = Callable[[Sequence[str]], LinearMethod]
"""From the checkpoint's names of a layer's matrices, without a suffix, to the format that they are
held in. A layer of several matrices has one; a format that cannot hold unlike ones side by side
keeps them apart by itself."""


@dataclass(frozen=True)
class Build:
    """What every part is made with. `method`: chooses the format of each layer's matrices; None:
    all are dense. `shard`: the part of the model that this process holds. Matrices are cut by
    heads or by the MLP's inner size: column-parallel ones (of queries, keys and values, gate and
    up) by rows, so that results are parts of the whole's; row-parallel ones (of attention's output
    and the MLP's) by columns, so that results are to be added over the ranks.
    `kv_scales`: of each layer, where the KV cache holds 8-bit codes. `communicator`: to the other
    ranks that hold parts of the same layers, if there are any. `stage`: the layers that this
    process has."""

    ops: Ops
    dtype: torch.dtype
    device: str
    method: MethodChoice | None = None
    shard: Shard = WHOLE
    kv_scales: Sequence[KVScales] = ()
    communicator: Communicator = SINGLE_RANK
    stage: PipelineStage = WHOLE_MODEL

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory on the device, in the model's type unless `dtype` is given."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def method_of(self, names: Sequence[str]) -> LinearMethod:
        """The format of the layer that is made of the checkpoint's matrices `names`."""
        if self.method is None:
            return DenseMethod(self.ops, self.dtype, self.device)
        return self.method(names)

    def column_part(
        self, name: str, units: int, unit: int = 1, row_order: Tensor | None = None
    ) -> LinearPart:
        """A part of `units` times `unit` rows (heads of so many dimensions) that ranks divide
        between them by whole units."""
        return LinearPart(name, units * unit, self.shard.split(units, 0, unit), row_order)

    def column_parallel(
        self, parts: Sequence[LinearPart], in_features: int, bias: bool
    ) -> "Linear":
        """A layer made of `column_part`s, which read the same input."""
        return Linear(self, LinearSpec(tuple(parts), in_features), bias)

    def row_parallel(
        self, name: str, out_features: int, units: int, bias: bool, unit: int = 1
    ) -> "Linear":
        """A layer whose `units` times `unit` inputs ranks divide between them. Results are sums
        over a rank's inputs; the bias is in rank 0's."""
        columns = self.shard.split(units, 1, unit)
        spec = LinearSpec((LinearPart(name, out_features),), units * unit, columns)
        return Linear(self, spec, bias, adds_bias=self.shard.rank == 0)

    def vocabulary_parallel(
        self, name: str, vocab_size: int, in_features: int, bias: bool
    ) -> "Linear":
        """The head's matrix, of which each rank has the rows of its part of the vocabulary."""
        part = LinearPart(name, vocab_size, self.shard.vocabulary(vocab_size))
        return Linear(self, LinearSpec((part,), in_features, float32_output=True), bias)

    def replicated(
        self,
        name: str,
        out_features: int,
        in_features: int,
        bias: bool = False,
        *,
        keep_precision: bool = False,
    ) -> "Linear":
        """A layer that every rank has whole."""
        part = LinearPart(name, out_features)
        spec = LinearSpec((part,), in_features, keep_precision=keep_precision)
        return Linear(self, spec, bias)

    def experts(
        self, name: str, num_experts: int, hidden_size: int, intermediate_size: int
    ) -> "Experts":
        """A mixture's experts, of which ranks divide the inner size between them."""
        inner = self.shard.split(intermediate_size, 0)
        return Experts(self, ExpertsSpec(name, num_experts, hidden_size, intermediate_size, inner))


class Part(Protocol):
    """Anything of a model that has weights."""

    def weight_slots(self) -> WeightSlots:
        """The checkpoint's tensors that it wants."""
        ...

    def pack(self) -> None:
        """Once, when every slot has been filled; they are dead from then on."""
        ...

    def packed(self) -> Iterator[Any]:
        """The matrices as the back end has them."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that its weights take."""
        ...


class NoMatrix:
    """Base of parts without matrices: their weights are used as they are loaded."""

    def weight_slots(self) -> WeightSlots:
        """The checkpoint's tensors that it wants."""
        yield from ()

    def pack(self) -> None:
        """Nothing to do."""

    def packed(self) -> Iterator[Any]:
        """None."""
        yield from ()

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(
            slot.target.nbytes for slot in self.weight_slots() if isinstance(slot.target, Tensor)
        )


class MadeOfParts:
    """Base of what is made of parts."""

    def parts(self) -> Iterable[Part]:
        """Those that it is made of, in the order in which they are packed."""
        raise NotImplementedError

    def weight_slots(self) -> WeightSlots:
        """The checkpoint's tensors that all parts want."""
        for part in self.parts():
            yield from part.weight_slots()

    def packed(self) -> Iterator[Any]:
        """The matrices of all parts as the back end has them, once they are packed."""
        for part in self.parts():
            yield from part.packed()

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that all weights take, whatever their formats."""
        return sum(part.nbytes for part in self.parts())


class Composite(MadeOfParts):
    """Base of parts that are made of others."""

    def pack(self) -> None:
        """All parts."""
        for part in self.parts():
            part.pack()


class Norm(Part, Protocol):
    """A normalisation over the hidden size."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        ...

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(self(x + residual), x + residual); either input may be overwritten."""
        ...


class Head(Part, Protocol):
    """What turns hidden states into logits."""

    def __call__(self, x: Tensor, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """[R, H] -> [R, V]; x are the tokens `rows` [R] int64 of the batch, None: all."""
        ...


class Linear:
    """y = x W^T + b, with W in the format that the build's method gives the layer."""

    def __init__(self, build: Build, spec: LinearSpec, bias: bool, adds_bias: bool = True) -> None:
        """adds_bias: False on ranks whose results are added to that of one with the bias."""
        names = [part.name for part in spec.parts]
        self.weight = build.method_of(names).allocate(spec)
        self._spec = spec
        self._loaded_bias = build.empty(spec.held_rows) if bias else None
        self.bias = self._loaded_bias if adds_bias else None

    @property
    def kernel_weight(self) -> Any:
        """The packed matrix, for kernels that fuse the product with something else."""
        return self.weight.kernel_weight

    def weight_slots(self) -> WeightSlots:
        """Of the weight and of the bias."""
        yield from self.weight.weight_slots()
        if self._loaded_bias is None:
            return
        first = 0
        for part in self._spec.parts:
            rows = self._loaded_bias[first : first + part.held]
            yield WeightSlot(f"{part.name}.bias", rows, part.rows, part.row_order)
            first += part.held

    def pack(self) -> None:
        """Bring the weight into the form that is multiplied with."""
        self.weight.pack()

    def packed(self) -> Iterator[Any]:
        """The one matrix, or those that the format keeps apart."""
        yield from self.weight.packed()

    @property
    def nbytes(self) -> int:
        """Of weight and bias."""
        return self.weight.nbytes + (0 if self._loaded_bias is None else self._loaded_bias.nbytes)

    def input_group(self, rows: int, dtype: torch.dtype) -> int | None:
        """See linear_method.InputReader."""
        return self.weight.input_group(rows, dtype)

    def __call__(self, x: Activations, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N]; x are the batch's tokens, or those that `rows` [T] int64 names."""
        if isinstance(x, QuantizedRows):
            return self.weight.apply_quantized(x, self.bias)
        return self.weight.apply(x, self.bias)


class Experts(Composite):
    """The matrices of all experts of a mixture."""

    def __init__(self, build: Build, spec: ExpertsSpec) -> None:
        self.weight: ExpertsWeight = build.method_of([spec.name]).allocate_experts(spec)

    def parts(self) -> Iterable[Part]:
        """The weight, of three matrices of each expert."""
        return (self.weight,)

    def input_group(self, rows: int, dtype: torch.dtype) -> int | None:
        """See linear_method.InputReader; experts read rows in full."""
        return None

    def __call__(self, x: Tensor, top_k_ids: Tensor, top_k_weights: Tensor, batch: Batch) -> Tensor:
        """x [T, H] -> [T, H]; top_k_ids [T, k] integer, top_k_weights [T, k] float32."""
        return self.weight.apply(x, top_k_ids, top_k_weights)


class CorrectionBias(NoMatrix):
    """What is added to a router's scores for the choice of experts, but not to their weights."""

    def __init__(self, build: Build, name: str, num_experts: int) -> None:
        """`name`: the router's, without a suffix."""
        self._name = name
        self.bias = build.empty(num_experts, dtype=torch.float32)

    def weight_slots(self) -> WeightSlots:
        """One vector."""
        yield WeightSlot(f"{self._name}.e_score_correction_bias", self.bias)


class RmsNorm(NoMatrix):
    """x over its root mean square, times a weight; `fp32`: the weight is kept in float32."""

    def __init__(
        self,
        build: Build,
        name: str,
        size: int,
        eps: float,
        fp32: bool = False,
        row_order: Tensor | None = None,
    ) -> None:
        self._ops = build.ops
        self._name = name
        self._row_order = row_order
        self.eps = eps
        self.weight = build.empty(size, dtype=torch.float32 if fp32 else None)

    def weight_slots(self) -> WeightSlots:
        """One vector."""
        yield WeightSlot(f"{self._name}.weight", self.weight, row_order=self._row_order)

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(self(x + residual), x + residual); either input may be overwritten."""
        return self._ops.add_rms_norm(x, residual, self.weight, self.eps)

    def add_sum(
        self, communicator: NormingCommunicator, x: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`add` of the sum of all ranks' x, in one kernel."""
        return communicator.all_reduce_add_norm(x, residual, self.weight, self.eps)


class LayerNorm(NoMatrix):
    """x less its mean, over its standard deviation, times a weight, plus a bias if there is one."""

    def __init__(self, build: Build, name: str, size: int, eps: float, bias: bool) -> None:
        self._ops = build.ops
        self._name = name
        self._eps = eps
        self._weight = build.empty(size)
        self._bias = build.empty(size) if bias else None

    def weight_slots(self) -> WeightSlots:
        """One vector or two."""
        yield WeightSlot(f"{self._name}.weight", self._weight)
        if self._bias is not None:
            yield WeightSlot(f"{self._name}.bias", self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.layer_norm(x, self._weight, self._bias, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(self(x + residual), x + residual); either input may be overwritten."""
        return self._ops.add_layer_norm(x, residual, self._weight, self._bias, self._eps)

    def add_sum(
        self, communicator: NormingCommunicator, x: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`add` of the sum of all ranks' x, in one kernel."""
        weights = (self._weight, self._eps, self._bias)
        return communicator.all_reduce_add_norm(x, residual, *weights, centre=True)


class _AroundNorm(Composite):
    """Base of norms that add up what the ranks bring before another norm does its work."""

    def __init__(self, norm: Norm, communicator: Communicator) -> None:
        self._norm = norm
        self._communicator = communicator

    def parts(self) -> Iterable[Part]:
        """The norm."""
        return (self._norm,)

    def __call__(self, x: Tensor) -> Tensor:
        return self._norm(x)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See Norm."""
        return self._norm.add(x, residual)


class NormOfSum(_AroundNorm):
    """A norm whose `__call__` is given each rank's share of its input."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._norm(self._communicator.all_reduce(x))


class AddNormOfSum(_AroundNorm):
    """A norm whose `add` is given each rank's share of x, and the whole residual."""

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See Norm."""
        return self._norm.add(self._communicator.all_reduce(x), residual)


class FusedAddNormOfSum(_AroundNorm):
    """The same where the communicator does all of it in one kernel."""

    def __init__(
        self, norm: RmsNorm | LayerNorm, communicator: Communicator, norming: NormingCommunicator
    ) -> None:
        super().__init__(norm, communicator)
        self._add_sum = norm.add_sum
        self._norming = norming

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See Norm."""
        return self._add_sum(self._norming, x, residual)


class Embedding:
    """The table of token embeddings, of which a rank has its part of the vocabulary."""

    def __init__(self, build: Build, name: str, rows: int, columns: int) -> None:
        method = build.method_of([name])
        part = build.shard.vocabulary(rows)
        self.weight: EmbeddingWeight = method.allocate_embedding(name, rows, columns, part)
        self.dtype = build.dtype

    def weight_slots(self) -> WeightSlots:
        """The table."""
        yield from self.weight.weight_slots()

    def pack(self) -> None:
        """Bring the table into the form that is read from."""
        self.weight.pack()

    def packed(self) -> Iterator[Any]:
        """The table, or what the head multiplies with where it is the table too."""
        yield from self.weight.packed()

    @property
    def nbytes(self) -> int:
        """Of the table."""
        return self.weight.nbytes

    def __call__(self, ids: Tensor, batch: Batch) -> Tensor:
        """ids [T] int64 -> [T, columns]."""
        return self.weight.embed(ids)


class ParallelEmbedding(Embedding):
    """The table of several ranks: a token's vector comes from the one rank that has it."""

    def __init__(self, build: Build, name: str, rows: int, columns: int) -> None:
        super().__init__(build, name, rows, columns)
        part = build.shard.vocabulary(rows)
        assert part is not None
        self._first = part.start
        self._held = part.length
        self._communicator = build.communicator

    def __call__(self, ids: Tensor, batch: Batch) -> Tensor:
        """ids [T] int64 -> [T, columns]."""
        rows = ids - self._first
        elsewhere = (rows < 0) | (rows >= self._held)
        x = self.weight.embed(rows.masked_fill(elsewhere, 0))
        return self._communicator.all_reduce(x.masked_fill(elsewhere[:, None], 0))


class LearnedPositions(NoMatrix):
    """A vector for each position, added to the embedding. Spare positions have zeros."""

    def __init__(self, build: Build, name: str, positions: int, size: int) -> None:
        self._name = name
        self._positions = positions
        self._table = build.empty(positions + SPARE_POSITIONS, size)
        self._table[positions:].zero_()

    def weight_slots(self) -> WeightSlots:
        """The table without spare positions."""
        yield WeightSlot(f"{self._name}.weight", self._table[: self._positions])

    def __call__(self, batch: Batch) -> Tensor:
        """[T, size] of the batch's positions."""
        return torch.embedding(self._table, batch.positions)


class InputEmbedding(Composite):
    """An embedding with what some families do next: scale it, project it to the hidden size, add a
    learned vector for each position."""

    def __init__(
        self,
        tokens: Embedding,
        scale: float,
        projection: Linear | None,
        positions: LearnedPositions | None,
    ) -> None:
        self._tokens = tokens
        self._projection = projection
        self._positions = positions
        self._scale = torch.tensor(scale, dtype=tokens.dtype).item()
        """Rounded to the weights' type, as the models were trained."""

    def parts(self) -> Sequence[Part]:
        """Those of the three that there are."""
        parts: tuple[Part | None, ...] = (self._tokens, self._projection, self._positions)
        return [part for part in parts if part is not None]

    def __call__(self, ids: Tensor, batch: Batch) -> Tensor:
        """ids [T] int64 -> [T, H]."""
        x = self._tokens(ids, batch)
        if self._scale != 1:
            x = x * self._scale
        if self._projection is not None:
            x = self._projection(x, batch)
        return x if self._positions is None else x + self._positions(batch)


class TiedHead(NoMatrix):
    """A head whose weight is the embedding's."""

    def __init__(self, embedding: Embedding) -> None:
        self._embedding = embedding

    @property
    def kernel_weight(self) -> Any:
        """The packed matrix."""
        return self._embedding.weight.kernel_weight

    def pack(self) -> None:
        """After the embedding: a second copy where the back end has a layout of its own."""
        self._embedding.weight.pack_head()

    def __call__(self, x: Tensor, batch: Batch, rows: Tensor | None = None) -> Tensor:
        return self._embedding.weight.logits(x)


class ParallelHead(Composite):
    """A head of which each rank computes the logits of its part of the vocabulary; every rank gets
    them all, since every rank samples."""

    def __init__(self, head: Head, build: Build, vocab_size: int) -> None:
        part = build.shard.vocabulary(vocab_size)
        assert part is not None
        each = build.shard.each_of_vocabulary(vocab_size)
        self._head = head
        self._communicator = build.communicator
        self._vocab_size = vocab_size
        self._missing = each - part.length
        self._padded = each * build.shard.size > vocab_size

    def parts(self) -> Sequence[Part]:
        """The head."""
        return [self._head]

    def __call__(self, x: Tensor, batch: Batch, rows: Tensor | None = None) -> Tensor:
        logits = self._head(x, batch, rows)
        if self._missing:
            logits = torch.nn.functional.pad(logits, (0, self._missing))
        logits = self._communicator.all_gather(logits, 1)
        # what was padded lies behind the last rank's, as only the last ranks have less than others
        return logits[:, : self._vocab_size].contiguous() if self._padded else logits


class LMHead(Composite):
    """A head with what some families do around it: project to the embedding's size before, hold
    logits within +-`softcap` after."""

    def __init__(self, head: Head, projection: Linear | None, softcap: float | None) -> None:
        self._head = head
        self._projection = projection
        self._softcap = softcap

    def parts(self) -> Sequence[Part]:
        """The projection, if there is one, and the head."""
        return [self._head] if self._projection is None else [self._projection, self._head]

    def __call__(self, x: Tensor, batch: Batch, rows: Tensor | None = None) -> Tensor:
        if self._projection is not None:
            x = self._projection(x, batch, rows)
        logits = self._head(x, batch, rows)
        if self._softcap is None:
            return logits
        return logits.div_(self._softcap).tanh_().mul_(self._softcap)
