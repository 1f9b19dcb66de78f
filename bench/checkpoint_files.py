"""Shards of a safetensors checkpoint and their index, as the Hugging Face libraries save them, from
tensors that are never whole in memory. Knows no models and no formats of weights.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from byte_pool import Pool

TYPES: Final = {
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}
"""Names of types in headers, in the order in which the library puts them into a file."""
HEADER_ALIGNMENT: Final = 8


@dataclass(frozen=True)
class RandomValues:
    """Contents from a pool of `count` elements, which `make` makes: count, generator -> [count],
    which becomes dtype."""

    dtype: torch.dtype
    count: int
    make: Callable[[int, torch.Generator], torch.Tensor]

    def pool(self) -> Pool:
        elements = self.make(self.count, torch.Generator().manual_seed(self.count))
        return Pool(_bytes(elements.to(self.dtype)))


Contents = RandomValues | torch.Tensor


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    contents: Contents

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.contents.dtype.itemsize


def write_shards(directory: Path, entries: list[Tensor], most: float) -> int:
    """Files of at most `most` bytes of data where a single tensor is not more, and their index:
    bytes of all tensors. Raises OSError."""
    shards = _shards_of(entries, most)
    pools: dict[RandomValues, Pool] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (directory / name).open("wb") as file:
            _write_shard(file, shard, pools)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    size = sum(tensor.nbytes for tensor in entries)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    return size


def _shards_of(entries: list[Tensor], most: float) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in entries:
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shard(file: BinaryIO, shard: list[Tensor], pools: dict[RandomValues, Pool]) -> None:
    """The length of the header, the header and the data. The library's own function would need
    every tensor whole in memory."""
    order = list(TYPES)
    shard = sorted(shard, key=lambda tensor: (order.index(tensor.contents.dtype), tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": TYPES[tensor.contents.dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for tensor in shard:
        if isinstance(tensor.contents, torch.Tensor):
            file.write(_bytes(tensor.contents))
            continue
        if tensor.contents not in pools:
            pools[tensor.contents] = tensor.contents.pool()
        pools[tensor.contents].write(file, tensor.nbytes)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Of a tensor of one dimension."""
    return tensor.view(torch.uint8).numpy().data


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As config.json and the index are written. Raises OSError."""
    path.write_text(json.dumps(value, indent=2) + "\n")
