"""Which files of a directory hold the weights. Knows names and indices, not what is in the files.

By the rules of those who save checkpoints: an index names the file of each tensor; without one
there is a single file; a repository may have further files of the same format beside them (the
weights in another layout, adapters, an old copy), which count for nothing.
"""

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import Unsupported

STRAY: Final = ("consolidated*", "adapter_*", "optimizer*", "scheduler*", "training_args*")
"""Names that are never a model's weights by themselves."""
_NUMBERED: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.[a-z]+")


@dataclass(frozen=True)
class Weights:
    """The files that hold a model's weights. `shards`: the file of each tensor, where an index says
    so; a tensor that it puts elsewhere or does not name is not the model's."""

    paths: tuple[Path, ...]
    shards: Mapping[str, str] | None = None

    def is_complete(self) -> bool:
        """Whether all files are there."""
        return all(path.is_file() for path in self.paths)

    def check(self) -> None:
        """Raises Unsupported when a file is not there."""
        missing = [path for path in self.paths if not path.is_file()]
        if missing:
            raise Unsupported(
                f"{missing[0].parent} lacks {len(missing)} of the {len(self.paths)} files of its weights, among them {missing[0].name}: "
                "the download is incomplete"
            )

    def has(self, tensor: str, path: Path) -> bool:
        """Whether `tensor` in file `path` is one of the model's."""
        return self.shards is None or Path(self.shards.get(tensor, "")).name == path.name

    def pick(self, path: Path, tensors: Iterable[str], owners: dict[str, Path]) -> Iterator[str]:
        """Those of the `tensors` in file `path` that are the model's. `owners`: the file of each
        tensor so far. Raises Unsupported for a tensor that two files have, where no index says
        which of them counts."""
        for tensor in tensors:
            if not self.has(tensor, path):
                continue
            if tensor in owners:
                raise Unsupported(
                    f"{owners[tensor].name} and {path.name} in {path.parent} both have a tensor {tensor}, and no index says which "
                    "file counts; move away the file that is not the model's"
                )
            owners[tensor] = path
            yield tensor


@dataclass(frozen=True)
class WeightFormat:
    """How files of one format are named."""

    index: str
    single: str
    """The one file of a checkpoint without an index."""
    pattern: str
    """Files that may hold weights where neither is there."""

    def weights(self, directory: Path) -> Weights | None:
        """Those of `directory`, also such as are named but not there; None where there are none.
        Raises Unsupported for an index that cannot be read."""
        shards = self.shards(directory)
        if shards is not None:
            return Weights(tuple(directory / name for name in sorted(set(shards.values()))), shards)
        names = self.choose(path.name for path in directory.iterdir())
        return Weights(tuple(directory / name for name in names)) if names else None

    def is_conventional(self, directory: Path) -> bool:
        """Whether there is an index or the one usual file, not both: transformers knows these two
        forms, and takes the one file first."""
        return (directory / self.index).is_file() != (directory / self.single).is_file()

    def shards(self, directory: Path) -> Mapping[str, str] | None:
        """The file of each tensor by the index, None where there is no index. Raises
        Unsupported."""
        index = directory / self.index
        if not index.is_file():
            return None
        try:
            shards = json.loads(index.read_text())["weight_map"]
            return {tensor: str(name) for tensor, name in shards.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unsupported(
                f"{index} is no index of weights ({type(error).__name__}: {error}); fetch it again"
            ) from None

    def choose(self, names: Iterable[str]) -> list[str]:
        """Of the `names` in a directory without an index, the files with weights."""
        names = [
            name
            for name in fnmatch.filter(sorted(names), self.pattern)
            if not any(fnmatch.fnmatch(name, stray) for stray in STRAY)
        ]
        return [self.single] if self.single in names else _numbered(names) or names


def _numbered(names: list[str]) -> list[str]:
    """The files of a set like model-00001-of-00002, of which one that is missing is named too; none
    where there is no such set."""
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match:
            suffix = name.rpartition(".")[2]
            stem = match[1]
            total = int(match[3])
            return [f"{stem}-{n:05d}-of-{total:05d}.{suffix}" for n in range(1, total + 1)]
    return []


SAFETENSORS: Final = WeightFormat(
    "model.safetensors.index.json", "model.safetensors", "*.safetensors"
)
PYTORCH: Final = WeightFormat(
    "pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"
)
