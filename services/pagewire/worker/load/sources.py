"""Where the weights of a model come from, by its files and --load-format. Knows names, not what is
in the files: torch is not needed for that."""

from pathlib import Path
from typing import Literal, NamedTuple

from ...checkpoint import gguf_files
from ...checkpoint.errors import Unsupported
from ...checkpoint.weight_files import PYTORCH, SAFETENSORS, Weights


class Location(NamedTuple):
    """`path`: a GGUF file, else the directory of the configuration. `load_format`: of the
    weights."""

    load_format: Literal["gguf", "safetensors", "pt", "dummy"]
    path: Path

    def check(self) -> None:
        """Raises Unsupported when a file of the weights is not there."""
        match self.load_format:
            case "gguf":
                gguf_files.parts(self.path)
            case "safetensors":
                safetensors_files(self.path)
            case "pt":
                pytorch_files(self.path)
            case "dummy":
                pass


def locate(path: Path, load_format: str) -> Location:
    """The weights of the model at `path`, a directory or a GGUF file. PyTorch's own files are taken
    only where they are asked for, or where there is nothing else. Raises Unsupported."""
    if path.is_dir() and (
        load_format == "gguf" or (load_format == "auto" and not SAFETENSORS.weights(path))
    ):
        path = gguf_files.find(path) or path
    if path.suffix == ".gguf":
        if load_format == "safetensors":
            raise Unsupported(f"{path.name} is a GGUF file, but --load-format is safetensors")
        return Location("dummy" if load_format == "dummy" else "gguf", path)
    match load_format:
        case "gguf":
            raise Unsupported(f"{path} has no .gguf file, but --load-format is gguf")
        case "dummy":
            return Location("dummy", path)
        case "pt":
            return Location("pt", path)
        case "auto" if not SAFETENSORS.weights(path) and PYTORCH.weights(path):
            return Location("pt", path)
        case _:
            return Location("safetensors", path)


def safetensors_files(directory: Path) -> Weights:
    """The files of the model in `directory`, all of which are there. Raises Unsupported."""
    return _all_there(
        SAFETENSORS.weights(directory),
        f"{directory} has no .safetensors file; convert the checkpoint, or use --load-format dummy",
    )


def pytorch_files(directory: Path) -> Weights:
    """The .bin files of the model in `directory`, all of which are there. Raises Unsupported."""
    return _all_there(
        PYTORCH.weights(directory),
        f"{directory} has no .safetensors and no pytorch_model.bin file; "
        "convert the checkpoint to safetensors",
    )


def _all_there(weights: Weights | None, missing: str) -> Weights:
    """`weights`, whose files are all there. Raises Unsupported, with `missing` where there are
    none."""
    if weights is None:
        raise Unsupported(missing)
    weights.check()
    return weights
