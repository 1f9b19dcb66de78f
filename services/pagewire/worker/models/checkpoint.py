"""From the tensors of a checkpoint to those of the decoder: other names, and matrices that are
joined or transposed there.

torch is imported when a tensor is there, so that a configuration can be judged without it. The
decoder's own names are Llama's as transformers saves them (see decoder.py and blocks.py). A
checkpoint's joined matrices are renamed to `….self_attn.qkv_proj` and `….mlp.gate_up_proj`, and
`split` cuts them. Matrices may come quantized (pagewire_kernels.quantized): they are cut alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from .architecture import Architecture, Unsupported

if TYPE_CHECKING:
    from torch import Tensor

Named: TypeAlias = "tuple[str, Tensor]"
Tensors = Callable[[str, "Tensor", Architecture], Iterator["Named"]]
"""(name and tensor of a checkpoint, architecture) -> tensors of the decoder: none for one that is
not needed, several for a joined one. A name that it does not know it passes on as it is, and
loading refuses it."""


@dataclass(frozen=True)
class Names:
    """How a checkpoint spells the decoder's names. `top` and `parts`: checkpoint -> decoder,
    without .weight and .bias; `parts` are those of a layer, which stand after `layers` and a
    number. `prefix` may be missing from a checkpoint."""

    layers: str
    top: dict[str, str]
    parts: dict[str, str]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    """Endings of names of buffers that follow from the configuration."""

    def __call__(self, name: str) -> str | None:
        """The decoder's name, None for one that is ignored."""
        if self.ignored and name.endswith(self.ignored):
            return None
        stem, _, suffix = name.removeprefix(self.prefix).rpartition(".")
        if stem in self.top:
            return f"{self.top[stem]}.{suffix}"
        number, _, part = stem.removeprefix(f"{self.layers}.").partition(".")
        if stem.startswith(f"{self.layers}.") and part in self.parts:
            return f"model.layers.{number}.{self.parts[part]}.{suffix}"
        return name


def renamed(names: Names, by_group: bool = False) -> Tensors:
    """The whole conversion where a checkpoint differs in names and joined matrices only."""

    def tensors(name: str, tensor: "Tensor", arch: Architecture) -> Iterator[Named]:
        ours = names(name)
        if ours is not None:
            yield from split(ours, tensor, arch, by_group)

    return tensors


def split(
    name: str, tensor: "Tensor", arch: Architecture, by_group: bool = False
) -> Iterator[Named]:
    """Cut the rows (or biases) of joined matrices; others pass. Queries, keys and values follow
    each other, or, `by_group`, those of each KV head: its query heads, its key, its value."""
    stem, joined, suffix = name.rpartition(".qkv_proj.")
    if joined:
        for letter, rows in zip("qkv", _heads(name, tensor, arch, by_group), strict=True):
            yield f"{stem}.{letter}_proj.{suffix}", rows
        return
    stem, joined, suffix = name.rpartition(".gate_up_proj.")
    if joined:
        half = tensor.shape[0] // 2
        yield f"{stem}.gate_proj.{suffix}", tensor.narrow(0, 0, half)
        yield f"{stem}.up_proj.{suffix}", tensor.narrow(0, half, half)
        return
    yield name, tensor


def _heads(name: str, tensor: "Tensor", arch: Architecture, by_group: bool) -> "list[Tensor]":
    q = arch.num_heads * arch.head_dim
    kv = arch.num_kv_heads * arch.head_dim
    total = q + 2 * kv
    if tensor.shape[0] != total:
        raise Unsupported(
            f"tensor {name} has shape {list(tensor.shape)} "
            f"where the configuration asks for {total} rows"
        )
    if not by_group:
        return [tensor.narrow(0, 0, q), tensor.narrow(0, q, kv), tensor.narrow(0, q + kv, kv)]
    import torch

    # One key head and one value head follow the query heads that share them.
    group = arch.num_heads // arch.num_kv_heads
    rows = torch.arange(total).view(arch.num_kv_heads, group + 2, arch.head_dim)
    return [tensor[heads.flatten()] for heads in rows.split((group, 1, 1), 1)]


def plus_one(name: str, tensor: "Tensor", arch: Architecture) -> Iterator[Named]:
    """For families that save their norms' weights as the difference from 1."""
    import torch

    yield (
        name,
        tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + 1
        if name.endswith("norm.weight")
        else tensor,
    )
