"""Which GGUF files make up a model: one, or the parts that llama.cpp's gguf-split made of it, whose
names end in -00001-of-00003.gguf. Knows names only."""

import re
from pathlib import Path
from typing import Final

from .errors import Unsupported

_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
STRAY: Final = ("mmproj", "imatrix")
"""In the name of a file that is no language model: an image encoder, statistics for quantizing."""


def parts(path: Path) -> list[Path]:
    """The files of the model that `path` belongs to, in their order. Raises Unsupported when one is
    not there."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    total = int(match[3])
    names = [f"{match[1]}-{n:05d}-of-{total:05d}.gguf" for n in range(1, total + 1)]
    paths = [path.with_name(name) for name in names]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise Unsupported(
            f"{path.parent} lacks {len(missing)} of the {total} parts of this GGUF model, among them {missing[0]}; fetch it again"
        )
    return paths


def first_part(path: Path) -> Path:
    """The file that has the metadata of the model that `path` belongs to."""
    match = _PART.fullmatch(path.name)
    return path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf") if match else path


def find(directory: Path) -> Path | None:
    """The GGUF model in `directory`, its first part; None where there is none. Raises Unsupported
    when there are several."""
    files = [
        path
        for path in directory.glob("*.gguf")
        if not any(word in path.name.lower() for word in STRAY)
    ]
    models = sorted({first_part(path) for path in files})
    if len(models) > 1:
        raise Unsupported(
            f"{directory} has {len(models)} GGUF models; give one of them, for example {models[0]}"
        )
    return models[0] if models else None
