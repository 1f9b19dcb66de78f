"""How a model is divided among the ranks of a tensor-parallel group: which numbers of ranks it can
have, and the sizes that one of them is left with."""

from dataclasses import replace
from typing import Final

from .architecture import Architecture, Unsupported

MOST_RANKS: Final = 64


def check_ranks(arch: Architecture, size: int) -> None:
    """Raises Unsupported, with the numbers that would do, for a model that cannot be divided among
    `size` ranks."""
    obstacle = _obstacle(arch, size)
    if obstacle:
        possible = possible_sizes(arch)
        raise Unsupported(
            f"--tensor-parallel-size {size}: {obstacle} cannot be divided among {size} ranks; this "
            f"{arch.model_type} model can run on {', '.join(map(str, possible))}"
        )


def check_undivided(model_type: str, size: int) -> None:
    """Raises Unsupported where a model that runs through transformers is to be divided."""
    if size > 1:
        raise Unsupported(
            f"--tensor-parallel-size {size} is not supported for models that run through "
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


def of_rank(arch: Architecture, size: int) -> Architecture:
    """`arch` with the heads, inner sizes and vocabulary that each of `size` ranks has, of those that
    can be divided: for the arithmetic of memory and time."""
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
