"""What the layers of a model keep between steps, in groups of layers that keep the same kind of
thing: how large a block of it is, how many blocks a request needs, which part of a finished prefix
serves another request.

Memory planning and the cache itself ask these questions here, so that a model with windows, states
or layers without a cache changes the answers and nothing that asks. Every model is one group of
`full` layers today, those with sliding windows included: their old keys stay where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from pagewire_kernels.kv_cache import FP8
from torch import Tensor

from .architecture import Architecture

CacheKind = Literal["full", "window", "state", "shared", "none"]
PAGED: Final = ("full", "window")
"""Kinds whose keys and values lie in blocks."""


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share block tables, or need none. dtype: of keys and values.

    full: keys and values of every token, in blocks. window: of the last `window` tokens only, in
    blocks. state: one record of `state_bytes` for each request and layer, whatever its length.
    shared: these layers read the cache of layer `shares_with`. none: nothing is kept.
    """

    kind: CacheKind
    layers: tuple[int, ...]
    num_kv_heads: int = 0
    head_dim: int = 0
    dtype: torch.dtype = torch.float32
    window: int = 0
    state_bytes: int = 0
    shares_with: int = -1

    def block_bytes(self, block_size: int) -> int:
        """Bytes of a block of `block_size` tokens in all layers of the group; 0 where there are no
        blocks."""
        if self.kind not in PAGED:
            return 0
        elements = self.num_kv_heads * block_size * self.head_dim
        return 2 * len(self.layers) * elements * self.dtype.itemsize

    def request_bytes(self) -> int:
        """Bytes that a request takes beside its blocks."""
        return self.state_bytes * len(self.layers) if self.kind == "state" else 0

    def table_width(self, tokens: int, block_size: int) -> int:
        """Most blocks that a request of `tokens` tokens holds at a time: the entries of its row of
        the block table. A window may begin and end within a block."""
        if self.kind not in PAGED:
            return 0
        whole = -(-tokens // block_size)
        if self.kind == "full":
            return whole
        return min(whole, -(-self.window // block_size) + 1)

    def blocks_for_prefix(self, tokens: int, block_size: int) -> range:
        """The blocks, by their number in the sequence, that another request must find cached to
        begin after the first `tokens` tokens (whole blocks) of this one. Raises ValueError for a
        state, which exists at the end of a sequence only."""
        if self.kind == "state":
            raise ValueError("a state has no prefix that another request could begin with")
        if self.kind not in PAGED:
            return range(0)
        end = tokens // block_size
        if self.kind == "full":
            return range(end)
        # the next token sees window - 1 tokens before itself
        return range(max(0, tokens - self.window + 1) // block_size, end)

    def allocate(self, num_blocks: int, block_size: int, device: str) -> Tensor:
        """Zeros [layers, 2, blocks, Hkv, block_size, D]: keys first. Raises ValueError for a group
        without blocks."""
        if self.kind not in PAGED:
            raise ValueError(f"layers of kind {self.kind!r} have no blocks")
        shape = (len(self.layers), 2, num_blocks, self.num_kv_heads, block_size, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class CacheSpec:
    """The groups of a model; every layer is in one of them."""

    groups: tuple[CacheGroup, ...]

    @property
    def num_layers(self) -> int:
        """Layers in all groups."""
        return sum(len(group.layers) for group in self.groups)

    @property
    def kv_type(self) -> str:
        """Of keys and values in words, where it is a type that models are not computed in."""
        codes = any(group.dtype == FP8 for group in self.groups)
        return "fp8 (e4m3)" if codes else ""

    @property
    def itemsize(self) -> int:
        """Bytes of an element of keys and values, the largest of all groups."""
        return max(group.dtype.itemsize for group in self.groups)

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block in all layers that have blocks."""
        return sum(group.block_bytes(block_size) for group in self.groups)

    def blocks_for(self, tokens: int, block_size: int) -> int:
        """Blocks that a request of `tokens` tokens holds at most; block numbers are common to all
        groups."""
        return max(group.table_width(tokens, block_size) for group in self.groups)

    def layer_caches(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The cache of each layer [2, blocks, Hkv, block_size, D], views of what each group with
        blocks has allocated, in the order of the groups. Layers that share see their layer's;
        layers without blocks have an empty tensor."""
        allocated = iter(tensors)
        caches: dict[int, Tensor] = {}
        for group in self.groups:
            if group.kind in PAGED:
                caches.update(zip(group.layers, next(allocated), strict=True))
        for group in self.groups:
            if group.kind == "shared":
                caches.update(dict.fromkeys(group.layers, caches[group.shares_with]))
        empty = torch.empty(0)
        return [caches.get(layer, empty) for layer in range(self.num_layers)]


def cache_spec(arch: Architecture, dtype: torch.dtype) -> CacheSpec:
    """What the layers of `arch` keep: the keys and values of all tokens, in all layers, as
    `dtype`."""
    layers = tuple(range(arch.num_layers))
    return CacheSpec((CacheGroup("full", layers, arch.num_kv_heads, arch.head_dim, dtype),))
