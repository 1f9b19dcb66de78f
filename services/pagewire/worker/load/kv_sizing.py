"""The arithmetic of memory: what the weights take, how many KV blocks there is room for, how long a
context fits. Allocates nothing.

Works on numbers alone, so that it can be tested and printed before anything large happens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..device.gpus import Gpu
from ..models.architecture import Architecture
from ..models.cache_spec import CacheSpec
from ..models.ranks import WHOLE_MODEL, PipelineStage

MIB: Final = 1 << 20
GIB: Final = 1 << 30
WORKSPACE: Final = 256 * MIB
"""Activations, gathered blocks and logits of one step on a CPU; generous, so that a start that
succeeds keeps running."""


class DoesNotFit(ValueError):
    """The memory is too small; the message has the numbers and what to change."""


@dataclass(frozen=True)
class Sizing:
    """Bytes and counts. gpu: what was seen before anything was allocated, None on a CPU. head:
    human-readable lines, in place of the first. kv_type: of the KV cache in words, where it is not
    the model's."""

    weight_bytes: int
    block_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int
    workspace: int = WORKSPACE
    gpu: Gpu | None = None
    head: tuple[str, ...] = ()
    note: str = ""
    kv_type: str = ""

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV blocks."""
        return self.num_blocks * self.block_bytes

    def lines(self) -> list[str]:
        """The same in words."""
        tokens = self.num_blocks * self.block_size
        kind = f" in {self.kv_type}" if self.kv_type else ""
        lines = [
            *(self.head or (f"weights {self.weight_bytes / MIB:,.0f} MiB",)),
            f"KV cache {self.kv_bytes / MIB:,.0f} MiB{kind}: {self.num_blocks:,} blocks of {self.block_size} tokens and "
            f"{self.block_bytes / 1024:,.0f} KiB, {tokens:,} tokens in all",
            f"longest context {self.max_model_len:,} tokens, of which {tokens / self.max_model_len:,.1f} fit at a time",
        ]
        return [*lines, self.note] if self.note else lines


def weight_bytes(
    arch: Architecture, itemsize: int, head_copy: bool, stage: PipelineStage = WHOLE_MODEL
) -> int:
    """Of the layers of `stage`, which `arch` describes, and what it has beside them. `head_copy`: a
    tied head is kept a second time, in the back end's own layout."""
    table = arch.vocab_size * arch.hidden_size
    is_tied = arch.tie_word_embeddings
    extra = table if is_tied and head_copy and stage.is_last else 0
    if not stage.is_whole:
        # one with the embedding, one with the head
        extra -= (1 if is_tied else 2) * table - (stage.is_first + stage.is_last) * table
    return (arch.parameters + extra) * itemsize


def rank_share(
    weights: int, arch: Architecture, rank_arch: Architecture, stage: PipelineStage
) -> int:
    """Of `weights`, the bytes of a whole model whose weights are not all of one size, about what a
    rank of `stage` has, whose part is `rank_arch`: by the number of its parameters."""
    of_rank = weight_bytes(rank_arch, 1, head_copy=False, stage=stage)
    return weights * of_rank // weight_bytes(arch, 1, head_copy=False)


def context(arch: Architecture, holds: int, asked: int, fit: bool) -> tuple[int, str]:
    """(the longest context, a line where it is shorter than users may expect), of a cache that
    holds `holds` tokens. asked 0: the model's own, or what is held; more than is held: what is held
    if `fit`, else itself, which the caller refuses. Raises DoesNotFit."""
    if asked > arch.longest_position:
        raise DoesNotFit(
            f"--max-model-len {asked:,} is more than the {arch.longest_position:,} positions this model was made for"
        )
    longest = asked or arch.max_position
    if holds >= longest or not holds:
        return max(longest if holds else asked, 1), ""
    if asked and not fit:
        return asked, ""
    of = f"the {asked:,} of --max-model-len" if asked else f"the model's {longest:,}"
    return holds, f"the context is cut to the {holds:,} tokens that memory holds, from {of}"


def size(
    arch: Architecture,
    cache: CacheSpec,
    *,
    weights: int,
    available: int,
    kv_bytes: int,
    blocks: int,
    block_size: int,
    max_model_len: int,
    fit: bool = False,
) -> Sizing:
    """Split `available` bytes of a CPU's memory. cache: what the layers keep. weights: bytes that
    they take. kv_bytes: what KV blocks may take; blocks: how many to have instead (0: as many as
    that holds). max_model_len, fit: as for `context`. Raises DoesNotFit."""
    each = cache.block_bytes(block_size)
    count = blocks or kv_bytes // each
    _check_memory(weights, count * each, available)
    length, note = context(arch, count * block_size, max_model_len, fit)
    if count * block_size < length:
        needed = cache.blocks_for(length, block_size)
        raise DoesNotFit(
            f"a context of {length:,} tokens needs {needed:,} KV blocks ({needed * each / GIB:.2f} GiB), there is room for {count:,} "
            f"({count * each / GIB:.2f} GiB); raise --cpu-kv-cache-gb or --num-kv-blocks, or lower --max-model-len{_to(count * block_size)}"
        )
    return Sizing(weights, each, count, block_size, length, note=note, kv_type=cache.kv_type)


def _to(fitting: int) -> str:
    return f" to {fitting:,} (--fit does so by itself)" if fitting else ""


def _check_memory(weights: int, cache: int, available: int) -> None:
    total = weights + cache + WORKSPACE
    if total > available:
        raise DoesNotFit(
            f"the model needs {total / GIB:.2f} GiB (weights {weights / GIB:.2f}, KV cache {cache / GIB:.2f}, workspace "
            f"{WORKSPACE / GIB:.2f}) but {available / GIB:.2f} GiB is free; lower --cpu-kv-cache-gb or --num-kv-blocks, use a smaller "
            f"model or --dtype bfloat16"
        )


def available_memory() -> int:
    """Bytes this process may still take: what the kernel calls available, or what is left of the
    control group's limit if less."""
    free = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)
