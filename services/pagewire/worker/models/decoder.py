"""The decoder that all families share: embedding, layers of attention and MLP, final norm, head.
Knows no checkpoint format.

A layer is one of four kinds of block (see Architecture.block). Within the layers, x is what the
last part gave, still to be added to `residual`, so that the sum and the norm after it are one
operation. On several ranks x is this rank's share of it: the norm after it adds the others'.

A pipeline stage is a decoder with some of the layers: `embed`, `run_layers` and `logits` are the
parts of a forward pass, of which the first stage has the first one and the last stage the last.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from pagewire_kernels.batch import Batch
from torch import Tensor

from . import native, single
from .architecture import Architecture
from .blocks import Attention, Mixture, Mlp, SumInput, make_norm
from .input_norm import InputNorm
from .layers import (
    Build,
    Embedding,
    Head,
    InputEmbedding,
    LearnedPositions,
    LMHead,
    MadeOfParts,
    Norm,
    ParallelEmbedding,
    ParallelHead,
    Part,
    TiedHead,
)
from .linear_method import InputReader
from .ranks import of_rank
from .single import SingleLayer

LogitsHook = Callable[[Callable[[Tensor], Tensor]], None]
"""Called at the end of a forward pass with a function from token numbers [R] int64 to their logits
[R, V]: for those who look at many tokens, a few at a time."""
LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blk)\.(\d+)\.")
"""A tensor of a layer, in any family's names and in GGUF's."""
BEFORE_LAYERS: Final = ("model.embed_tokens.", "model.embed_positions.", "model.project_in.")
AFTER_LAYERS: Final = ("model.norm.", "model.project_out.", "lm_head.")


class HiddenStates(NamedTuple):
    """What one layer hands to the next: x [T, H], still to be added to residual [T, H], unless that
    is None. On several ranks of a stage x is this rank's share."""

    x: Tensor
    residual: Tensor | None = None


class Layer:
    """The sequential block, and what the others have in common with it."""

    norm_names = ("input_layernorm", "post_attention_layernorm")
    sums: tuple[SumInput, ...] = ("add", "add")
    """Of each norm."""

    def __init__(self, arch: Architecture, index: int, build: Build) -> None:
        name = f"model.layers.{index}"
        self.attention = Attention(arch, build, f"{name}.self_attn", index)
        dense = arch.moe is None or index in arch.moe.dense_layers
        self.mlp = (
            Mlp(arch, build, f"{name}.mlp", arch.intermediate_size)
            if dense
            else Mixture(arch, build, f"{name}.mlp")
        )
        self.norms = [
            make_norm(arch, build, f"{name}.{norm}", sums)
            for norm, sums in zip(self.norm_names, self.sums, strict=True)
        ]
        self.input_norms = [
            InputNorm(build.ops, norm, readers)
            for norm, readers in zip(self.norms, self.readers(), strict=True)
        ]

    def readers(self) -> Sequence[Sequence[InputReader]]:
        """For each norm, all that reads its result; none where it must be a tensor."""
        return self.attention.readers, self.mlp.readers

    def parts(self) -> Sequence[Part]:
        """Those with weights."""
        return [*self.attention.parts(), *self.mlp.parts(), *self.norms]

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, H]; cache [2, blocks, Hkv, block_size, D]. A residual of None: there is nothing to
        be added to yet."""
        before_attention, before_mlp = self.input_norms
        normed, residual = before_attention(x, residual)
        normed, residual = before_mlp(self.attention(normed, cos_sin, cache, batch), residual)
        return self.mlp(normed, batch), residual


class ParallelLayer(Layer):
    """The parallel block: attention and MLP read the same hidden states."""

    sums = ("add", "none")

    def readers(self) -> Sequence[Sequence[InputReader]]:
        """See Layer."""
        return self.attention.readers, ()

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        normed, residual = self.input_norms[0](x, residual)
        mlp = self.mlp(self.norms[1](residual).to(normed.dtype), batch)
        return mlp.add_(self.attention(normed, cos_sin, cache, batch)), residual


class SharedNormLayer(Layer):
    """The parallel block whose attention and MLP read the same normed input."""

    norm_names = ("input_layernorm",)
    sums = ("add",)

    def readers(self) -> Sequence[Sequence[InputReader]]:
        """See Layer."""
        return ([*self.attention.readers, *self.mlp.readers],)

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        normed, residual = self.input_norms[0](x, residual)
        mlp = self.mlp(normed, batch)
        return mlp.add_(self.attention(normed, cos_sin, cache, batch)), residual


class SandwichLayer(Layer):
    """The sequential block with norms on what attention and MLP give, too."""

    norm_names = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    sums = ("none", "call", "none", "call")

    def readers(self) -> Sequence[Sequence[InputReader]]:
        """See Layer."""
        return self.attention.readers, (), self.mlp.readers, ()

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        before_attention, _, before_mlp, _ = self.input_norms
        _, attended, _, fed = self.norms
        normed, residual = before_attention(x, residual)
        normed, residual = before_mlp(
            attended(self.attention(normed, cos_sin, cache, batch)), residual
        )
        return fed(self.mlp(normed, batch)), residual


class PostNormLayer(Layer):
    """The block that normalises sums instead of inputs."""

    def readers(self) -> Sequence[Sequence[InputReader]]:
        """See Layer; results are residuals too."""
        return (), ()

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        first, second = self.norms
        x, _ = first.add(self.attention(x, cos_sin, cache, batch), x)
        x, _ = second.add(self.mlp(x, batch), x)
        return x, None


def layer_kind(arch: Architecture) -> type[Layer]:
    """The class of the architecture's layers."""
    if arch.block == "parallel":
        return SharedNormLayer if arch.shared_norm else ParallelLayer
    return {"sequential": Layer, "sandwich": SandwichLayer, "post": PostNormLayer}[arch.block]


class Decoder(MadeOfParts):
    """Weights are uninitialised until every one of `weight_slots` is filled; `pack` then makes the
    model ready to run."""

    def __init__(self, arch: Architecture, build: Build) -> None:
        stage = build.stage
        self.arch = arch
        self.rank_arch = of_rank(arch, build.shard.size, stage)
        """The same with the sizes that this rank has."""
        self._build = build
        self._layer_numbers = stage.layers(arch.num_layers)
        self._tokens: Embedding | None = None
        """The table of embeddings, which a tied head multiplies with."""
        self.embedding: Embedding | InputEmbedding | None = None
        self.norm: Norm | None = None
        self.head: Head | None = None
        if stage.is_first or (stage.is_last and arch.tie_word_embeddings):
            kind = Embedding if build.shard.whole else ParallelEmbedding
            width = arch.embedding_size or arch.hidden_size
            self._tokens = kind(build, "model.embed_tokens", arch.vocab_size, width)
        if stage.is_first:
            assert self._tokens is not None
            self.embedding = make_embedding(arch, build, self._tokens)
        self.layers = [layer_kind(arch)(arch, i, build) for i in self._layer_numbers]
        if stage.is_last:
            if arch.block != "post":
                sums = "none" if arch.block == "sandwich" else "add"
                self.norm = make_norm(arch, build, "model.norm", sums)
            self.head = make_head(arch, build, self._tokens)
        self._singles: list[SingleLayer] = []
        self._native: native.Native | None = None

    def parts(self) -> Iterator[Part]:
        """Everything with weights, in the order in which it is packed: a tied head comes after the
        embedding."""
        table = self._tokens if self.embedding is None else self.embedding
        if table is not None:
            yield table
        for layer in self.layers:
            yield from layer.parts()
        if self.norm is not None:
            yield self.norm
        if self.head is not None:
            yield self.head

    def is_elsewhere(self, name: str) -> bool:
        """Whether the tensor of this name, a checkpoint's or the decoder's, is of another pipeline
        stage. Tensors beside the layers are known by the decoder's names only."""
        stage = self._build.stage
        if stage.is_whole:
            return False
        layer = LAYER.search(name)
        if layer is not None:
            number = int(layer[1])
            return number < self.arch.num_layers and number not in self._layer_numbers
        if name.startswith("model.embed_tokens.") and self._tokens is not None:
            return False
        if name.startswith(BEFORE_LAYERS):
            return not stage.is_first
        return name.startswith(AFTER_LAYERS) and not stage.is_last

    def pack(self) -> Iterator[float]:
        """Put each matrix into the form that it is multiplied in; yields the share done."""
        parts = list(self.parts())
        for done, part in enumerate(parts):
            part.pack()
            yield done / len(parts)
        if not self._build.shard.whole or not self._build.stage.is_whole:
            # both add a layer's results to the residual by themselves, before other ranks' come,
            # and know no residual that another stage has begun
            return
        assert self.head is not None
        self._native = native.make(self.arch, self.layers, self.norm, self.head)
        self._singles = single.make(self.arch, self._build.ops, self.layers)

    def __call__(
        self,
        ids: Tensor,
        cos_sin: list[Tensor],
        caches: list[Tensor],
        batch: Batch,
        logits_indices: Tensor | None,
        tick: Callable[[], None],
        logits_hook: LogitsHook | None = None,
    ) -> Tensor:
        """ids [T] int64 -> logits [R, V] of the tokens `logits_indices` [R] int64 (None: of all).
        cos_sin and caches: one for each layer. `tick` is called after every layer; `logits_hook`,
        before the end."""
        hidden = self.embed(ids, batch)
        if (
            self._native is not None
            and logits_hook is None
            and len(ids) <= self._native.most_tokens
        ):
            return self._native(hidden.x, cos_sin, caches, batch, logits_indices, tick)
        hidden = self.run_layers(hidden, cos_sin, caches, batch, tick)
        return self.logits(hidden, batch, logits_indices, logits_hook)

    def embed(self, ids: Tensor, batch: Batch) -> HiddenStates:
        """ids [T] int64 -> what the first layer is given."""
        assert self.embedding is not None
        return HiddenStates(self.embedding(ids, batch))

    def run_layers(
        self,
        hidden: HiddenStates,
        cos_sin: list[Tensor],
        caches: list[Tensor],
        batch: Batch,
        tick: Callable[[], None],
    ) -> HiddenStates:
        """Through the layers that are here; arguments as for a whole forward pass. May overwrite
        `hidden`."""
        x, residual = hidden
        layers = self._singles if self._singles and len(x) == 1 else self.layers
        for layer, factors, cache in zip(layers, cos_sin, caches, strict=True):
            x, residual = layer(x, residual, factors, cache, batch)
            tick()
        return HiddenStates(x, residual)

    def logits(
        self,
        hidden: HiddenStates,
        batch: Batch,
        logits_indices: Tensor | None,
        logits_hook: LogitsHook | None = None,
    ) -> Tensor:
        """From what the last layer gave: arguments and result as of a whole forward pass."""
        if logits_hook is not None:
            logits_hook(lambda rows: self._logits(hidden, batch, rows))
        return self._logits(hidden, batch, logits_indices)

    def _logits(self, hidden: HiddenStates, batch: Batch, logits_indices: Tensor | None) -> Tensor:
        x, residual = hidden
        if logits_indices is not None:
            x = x[logits_indices]
            residual = None if residual is None else residual[logits_indices]
        if self.norm is not None:
            x = self.norm(x) if residual is None else self.norm.add(x, residual)[0]
        assert self.head is not None
        return self.head(x, batch, logits_indices)


def make_embedding(
    arch: Architecture, build: Build, tokens: Embedding
) -> Embedding | InputEmbedding:
    """What turns token ids into hidden states, around the table `tokens`."""
    if arch.embedding_scale == 1 and not arch.learned_positions and not arch.embedding_size:
        return tokens
    projection = positions = None
    if arch.embedding_size:
        projection = build.replicated("model.project_in", arch.hidden_size, arch.embedding_size)
    if arch.learned_positions:
        positions = LearnedPositions(
            build, "model.embed_positions", arch.max_position, arch.hidden_size
        )
    return InputEmbedding(tokens, arch.embedding_scale, projection, positions)


def make_logits(arch: Architecture, build: Build, tokens: Embedding | None, width: int) -> Head:
    """The head's matrix alone, which reads `width` features."""
    head: Head
    if arch.tie_word_embeddings:
        assert tokens is not None
        head = TiedHead(tokens)
    else:
        head = build.vocabulary_parallel("lm_head", arch.vocab_size, width, arch.head_bias)
    return head if build.shard.whole else ParallelHead(head, build, arch.vocab_size)


def make_head(arch: Architecture, build: Build, tokens: Embedding | None) -> Head:
    """What turns hidden states into logits; `tokens`: the table that a tied head multiplies
    with."""
    width = arch.embedding_size or arch.hidden_size
    head = make_logits(arch, build, tokens, width)
    if arch.final_logit_softcapping is None and not arch.embedding_size:
        return head
    projection = None
    if arch.embedding_size:
        projection = build.replicated("model.project_out", width, arch.hidden_size)
    return LMHead(head, projection, arch.final_logit_softcapping)
