"""Reading PyTorch's own checkpoints (pytorch_model.bin, one or sharded), for models that were never
saved as safetensors.

Such a file is a program that builds objects; torch's restricted loader runs only what builds
tensors, and refuses everything else.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.errors import Unsupported
from ...checkpoint.weight_files import Weights
from .sources import pytorch_files


@dataclass(frozen=True)
class PytorchFiles:
    """The .bin files of a model, all of which are there."""

    directory: Path
    weights: Weights

    @classmethod
    def of(cls, directory: Path) -> "PytorchFiles":
        """Those of the model in `directory`. Raises Unsupported when there are none, or not all."""
        return cls(directory, pytorch_files(directory))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name; one file is open at a time. Raises Unsupported for a broken
        file."""
        owners: dict[str, Path] = {}
        for path in self.weights.paths:
            tensors = _load(path)
            for name in self.weights.pick(path, tensors, owners):
                yield name, tensors[name]


def _load(path: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # the loader raises errors of many kinds
        raise Unsupported(_why(path, error)) from None
    if not isinstance(found, dict) or not all(
        isinstance(value, Tensor) for value in found.values()
    ):
        raise Unsupported(
            f"{path} holds something else than named tensors; convert the checkpoint to safetensors"
        )
    return found


def _why(path: Path, error: Exception) -> str:
    if "Unsupported global" in str(error) or "Unsupported class" in str(error):
        return f"{path} holds more than tensors, which could run code: it is not loaded; convert the checkpoint to safetensors"
    return f"{path} ({path.stat().st_size:,} bytes) is broken or its download incomplete; fetch it again"
