"""How a model is divided among the ranks of a group: by its layers among pipeline stages, and each
stage among the ranks of a tensor-parallel group. Which numbers of either it can have, and the sizes
that one rank is left with."""

from dataclasses import dataclass, replace
from typing import Final

from .architecture import Architecture, Unsupported

MOST_RANKS: Final = 64
MOST_STAGES: Final = 16
"""What the flags take."""


@dataclass(frozen=True)
class PipelineStage:
    """The layers of a model that a process has: those of stage `index` of `count`, in their order.
    The first stage has the embedding beside them, the last one the final norm and the head. The
    default is the whole model."""

    index: int = 0
    count: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether there is one stage only."""
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """It is given tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """It gives logits."""
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """Its part of so many layers. Where stages cannot be alike, those before the last one have
        one more: the last one has the head's work."""
        each, more = divmod(num_layers, self.count)
        longer_from = self.count - 1 - more
        first = self.index * each + max(0, self.index - longer_from)
        is_longer = longer_from <= self.index < self.count - 1
        return range(first, first + each + is_longer)


WHOLE_MODEL: Final = PipelineStage()


def check_ranks(arch: Architecture, size: int, stages: int = 1) -> None:
    """Raises Unsupported, with the numbers that would do, for a model that cannot be divided among
    so many pipeline `stages` of `size` ranks each."""
    obstacle = _obstacle(arch, size)
    if obstacle:
        possible = possible_sizes(arch)
        raise Unsupported(
            f"--tensor-parallel-size {size}: {obstacle} cannot be divided among {size} ranks; this "
            f"{arch.model_type} model can run on {', '.join(map(str, possible))}"
        )
    if stages > arch.num_layers:
        raise Unsupported(
            f"--pipeline-parallel-size {stages}: {arch.num_layers} layers cannot be divided among "
            f"{stages} stages; this {arch.model_type} model can have 1 to {arch.num_layers}"
        )


def check_undivided(model_type: str, size: int, stages: int = 1) -> None:
    """Raises Unsupported where a model that runs through transformers is to be divided."""
    for flag, number in (("tensor", size), ("pipeline", stages)):
        if number > 1:
            raise Unsupported(
                f"--{flag}-parallel-size {number} is not supported for models that run through "
                f"transformers, as {model_type}"
            )


def possible_sizes(arch: Architecture) -> list[int]:
    """Numbers of ranks that a model can be divided among."""
    return [size for size in range(1, MOST_RANKS + 1) if not _obstacle(arch, size)]


def _obstacle(arch: Architecture, size: int) -> str:
    """What of a model cannot be divided; empty where all can."""
    if arch.num_heads % size:
        return f"{arch.num_heads} attention heads"
    if arch.num_kv_heads % size and size % arch.num_kv_heads:
        return f"{arch.num_kv_heads} KV heads"
    if _has_dense_layers(arch) and arch.intermediate_size % size:
        return f"an intermediate size of {arch.intermediate_size}"
    moe = arch.moe
    if moe is not None and moe.intermediate_size % size:
        return f"experts with an intermediate size of {moe.intermediate_size}"
    if moe is not None and moe.shared_size % size:
        return f"a shared expert with an intermediate size of {moe.shared_size}"
    if arch.vocab_size < size * size:
        return f"a vocabulary of {arch.vocab_size}"
    return ""


def _has_dense_layers(arch: Architecture) -> bool:
    return arch.moe is None or bool(arch.moe.dense_layers)


def of_rank(arch: Architecture, size: int, stage: PipelineStage = WHOLE_MODEL) -> Architecture:
    """`arch` with the layers of `stage`, and the heads, inner sizes and vocabulary that each of its
    `size` ranks has, of those that can be divided: for the arithmetic of memory and time."""
    if not stage.is_whole:
        arch = _of_stage(arch, stage)
    if size == 1:
        return arch
    moe = arch.moe
    if moe is not None:
        moe = replace(
            moe,
            intermediate_size=moe.intermediate_size // size,
            shared_size=moe.shared_size // size,
        )
    return replace(
        arch,
        num_heads=arch.num_heads // size,
        num_kv_heads=max(1, arch.num_kv_heads // size),
        intermediate_size=arch.intermediate_size // size,
        vocab_size=-(-arch.vocab_size // size),
        moe=moe,
    )


def _of_stage(arch: Architecture, stage: PipelineStage) -> Architecture:
    layers = stage.layers(arch.num_layers)
    moe = arch.moe
    if moe is not None:
        dense = frozenset(layer - layers.start for layer in moe.dense_layers if layer in layers)
        moe = replace(moe, dense_layers=dense)
    return replace(
        arch,
        num_layers=len(layers),
        windows=arch.windows[layers.start : layers.stop],
        scales=arch.scales[layers.start : layers.stop],
        moe=moe,
    )
