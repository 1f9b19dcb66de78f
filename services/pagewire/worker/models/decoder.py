"""The decoder that all families share: embedding, layers of attention and MLP, final norm, head.
Knows no checkpoint format.

A layer is one of four kinds of block (see Architecture.block). Within the layers, x is what the
last part gave, still to be added to `residual`, so that the sum and the norm after it are one
operation.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pagewire_kernels.backend import Ops
from pagewire_kernels.batch import Batch
from pagewire_protocol.agreed import SPARE_POSITIONS
from torch import Tensor

from . import native
from .architecture import Architecture
from .blocks import Attention, Mixture, Mlp, make_norm
from .layers import (
    Build,
    Embedding,
    Head,
    InputEmbedding,
    Linear,
    LMHead,
    Norm,
    Part,
    Places,
    RmsNorm,
    TiedHead,
)
from .single import SingleLayer, serves

Tap = Callable[[Callable[[Tensor], Tensor]], None]


class Layer:
    """The sequential block, and what the others have in common with it."""

    norms = ("input_layernorm", "post_attention_layernorm")

    def __init__(self, arch: Architecture, index: int, build: Build) -> None:
        name = f"model.layers.{index}"
        self.attention = Attention(arch, build, f"{name}.self_attn", index)
        dense = arch.moe is None or index in arch.moe.dense
        self.mlp = (
            Mlp(arch, build, f"{name}.mlp", arch.intermediate_size)
            if dense
            else Mixture(arch, build, f"{name}.mlp")
        )
        self.norms_made = [make_norm(arch, build, f"{name}.{norm}") for norm in self.norms]

    def parts(self) -> list[Part]:
        return [*self.attention.parts(), *self.mlp.parts(), *self.norms_made]

    def single(self, ops: Ops) -> SingleLayer | None:
        """This layer for one row alone, None where its kind has none."""
        first, second = self.norms_made if len(self.norms_made) == 2 else (None, None)
        if (
            not isinstance(self.mlp, Mlp)
            or not isinstance(first, RmsNorm)
            or not isinstance(second, RmsNorm)
        ):
            return None
        return SingleLayer(ops, self.attention, self.mlp, (first, second))

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, H]; cache [2, blocks, Hkv, block_size, D]. A residual of None: there is nothing to
        be added to yet."""
        first, second = self.norms_made
        x, residual = (first(x), x) if residual is None else first.add(x, residual)
        x, residual = second.add(self.attention(x, cos_sin, cache, batch), residual)
        return self.mlp(x), residual


class ParallelLayer(Layer):
    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        first, second = self.norms_made
        x, residual = (first(x), x) if residual is None else first.add(x, residual)
        mlp = self.mlp(second(residual).to(x.dtype))
        return mlp.add_(self.attention(x, cos_sin, cache, batch)), residual


class OneNormLayer(Layer):
    norms = ("input_layernorm",)

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        norm = self.norms_made[0]
        x, residual = (norm(x), x) if residual is None else norm.add(x, residual)
        return self.mlp(x).add_(self.attention(x, cos_sin, cache, batch)), residual


class SandwichLayer(Layer):
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        first, attended, second, fed = self.norms_made
        x, residual = (first(x), x) if residual is None else first.add(x, residual)
        x, residual = second.add(attended(self.attention(x, cos_sin, cache, batch)), residual)
        return fed(self.mlp(x)), residual


class PostNormLayer(Layer):
    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        first, second = self.norms_made
        x, _ = first.add(self.attention(x, cos_sin, cache, batch), x)
        x, _ = second.add(self.mlp(x), x)
        return x, None


def layer_kind(arch: Architecture) -> type[Layer]:
    if arch.block == "parallel":
        return OneNormLayer if arch.one_norm else ParallelLayer
    return {"sequential": Layer, "sandwich": SandwichLayer, "post": PostNormLayer}[arch.block]


class Decoder:
    """Weights are uninitialised until every one of `places` is filled; `pack` then makes the model
    ready to run."""

    def __init__(self, arch: Architecture, build: Build) -> None:
        self.arch, self._ops = arch, build.ops
        self.keeps_quantized = build.quantized
        embedding = Embedding(
            build, "model.embed_tokens", arch.vocab_size, arch.embedding_size or arch.hidden_size
        )
        self.entrance = _entrance(arch, build, embedding)
        self.layers = [layer_kind(arch)(arch, i, build) for i in range(arch.num_layers)]
        self.norm: Norm | None = (
            None if arch.block == "post" else make_norm(arch, build, "model.norm")
        )
        self.head = _exit(arch, build, embedding)
        self._singles: list[SingleLayer] = []
        self._native: native.Native | None = None

    def parts(self) -> Iterator[Part]:
        yield self.entrance
        for layer in self.layers:
            yield from layer.parts()
        if self.norm is not None:
            yield self.norm
        yield self.head

    def places(self) -> Places:
        """Every checkpoint tensor the model wants, with the memory it goes to."""
        for part in self.parts():
            yield from part.places()

    def packed(self) -> Iterator[Any]:
        """The matrices as the back end has them, once they are packed."""
        for part in self.parts():
            yield from part.packed()

    def pack(self) -> Iterator[float]:
        """Put each matrix into the back end's layout; yields the share done."""
        parts = list(self.parts())
        for done, part in enumerate(parts):
            part.pack()
            yield done / len(parts)
        self._native = native.make(self)
        if serves(self.arch, self._ops):
            singles = [layer.single(self._ops) for layer in self.layers]
            self._singles = [single for single in singles if single is not None]

    def __call__(
        self,
        ids: Tensor,
        cos_sin: list[Tensor],
        caches: list[Tensor],
        batch: Batch,
        wanted: Tensor | None,
        tick: Callable[[], None],
        tap: Tap | None = None,
    ) -> Tensor:
        """ids [T] int64 -> logits [R, V] of the tokens `wanted` [R] int64 (None: of all). cos_sin
        and caches: one for each layer. `tick` is called after every layer; `tap`, before the end,
        with a function from such a `wanted` to logits, for those who look at many tokens, a few at
        a time."""
        if self._native is not None and tap is None and len(ids) <= self._native.most_tokens:
            return self._native(self.entrance(ids, batch), cos_sin, caches, batch, wanted, tick)
        x, residual = self.entrance(ids, batch), None
        layers = self._singles if self._singles and len(ids) == 1 else self.layers
        for layer, factors, cache in zip(layers, cos_sin, caches, strict=True):
            x, residual = layer(x, residual, factors, cache, batch)
            tick()
        if tap is not None:
            hidden, rest = x, residual
            tap(lambda rows: self._logits(hidden, rest, rows))
        return self._logits(x, residual, wanted)

    def _logits(self, x: Tensor, residual: Tensor | None, wanted: Tensor | None) -> Tensor:
        if wanted is not None:
            x, residual = x[wanted], residual[wanted] if residual is not None else None
        if self.norm is not None:
            x = self.norm(x) if residual is None else self.norm.add(x, residual)[0]
        return self.head(x)


def _entrance(arch: Architecture, build: Build, embedding: Embedding) -> Embedding | InputEmbedding:
    if arch.embedding_scale == 1 and not arch.learned_positions and not arch.embedding_size:
        return embedding
    project = (
        Linear(build, {"model.project_in": arch.hidden_size}, arch.embedding_size, False)
        if arch.embedding_size
        else None
    )
    positions = (
        Positions(build, "model.embed_positions", arch.max_position, arch.hidden_size)
        if arch.learned_positions
        else None
    )
    return InputEmbedding(embedding, arch.embedding_scale, project, positions)


def _exit(arch: Architecture, build: Build, embedding: Embedding) -> Head:
    width = arch.embedding_size or arch.hidden_size
    head: Head = (
        TiedHead(build, embedding)
        if arch.tied
        else Linear(build, {"lm_head": arch.vocab_size}, width, arch.head_bias, wide=True)
    )
    if arch.logit_cap is None and not arch.embedding_size:
        return head
    project = (
        Linear(build, {"model.project_out": width}, arch.hidden_size, False)
        if arch.embedding_size
        else None
    )
    return LMHead(head, project, arch.logit_cap)


class Positions(Embedding):
    def __init__(self, build: Build, name: str, rows: int, columns: int) -> None:
        super().__init__(replace(build, quantized=False), name, rows + SPARE_POSITIONS, columns)
        self._rows = rows
        self.weight[rows:].zero_()

    def places(self) -> Places:
        yield f"{self._name}.weight", self.weight[: self._rows]
