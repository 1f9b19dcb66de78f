"""Reads the key-value part of a GGUF file, and nothing of its tensors. It does not know what the
keys mean.

The `gguf` package builds a numpy view for every string, which takes seconds for a vocabulary; a
tokenizer needs plain lists. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
(little-endian, versions 2 and 3).
"""

import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

MAGIC: Final = b"GGUF"
STRING: Final = 8
ARRAY: Final = 9
SCALARS: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

Buffer = mmap.mmap
Result = TypeVar("Result")
_length = struct.Struct("<Q").unpack_from


class BadGguf(ValueError):
    """The file is no GGUF file, or a damaged one."""


def read_metadata(path: Path) -> dict[str, Any]:
    """All keys with their values: str, int, float, bool, or a list or tuple of these. Raises
    BadGguf, OSError."""
    return _read(path, lambda pairs: dict(pairs))


def architecture(path: Path) -> Any:
    """`general.architecture`, which stands at the beginning; None where there is none. Raises
    BadGguf, OSError."""
    return _read(
        path,
        lambda pairs: next((value for key, value in pairs if key == "general.architecture"), None),
    )


def _read(path: Path, take: Callable[[Iterator[tuple[str, Any]]], Result]) -> Result:
    with path.open("rb") as file:
        head = file.read(4)
        if head != MAGIC:
            raise BadGguf(
                f"{path.name} is not a GGUF file: {f'it begins with {head!r}' if head else 'it is empty'}"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            try:
                return take(_pairs(buffer))
            except (struct.error, UnicodeDecodeError, KeyError) as error:
                raise BadGguf(f"{path.name} is damaged: {error}") from None


def _pairs(buffer: Buffer) -> Iterator[tuple[str, Any]]:
    """Each key with its value, in the order of the file."""
    version, _tensors, keys = struct.unpack_from("<IQQ", buffer, 4)
    if version not in (2, 3):
        raise BadGguf(f"GGUF version {version} is not supported, only 2 and 3")
    position = 24
    for _ in range(keys):
        key, position = _read_string(buffer, position)
        (value_type,) = struct.unpack_from("<I", buffer, position)
        value, position = _read_value(buffer, value_type, position + 4)
        yield key, value


def _read_string(buffer: Buffer, position: int) -> tuple[str, int]:
    end = position + 8 + _length(buffer, position)[0]
    return buffer[position + 8 : end].decode(), end


def _read_value(buffer: Buffer, value_type: int, position: int) -> tuple[Any, int]:
    if value_type == STRING:
        return _read_string(buffer, position)
    if value_type == ARRAY:
        return _read_array(buffer, position)
    layout = struct.Struct("<" + SCALARS[value_type])
    return layout.unpack_from(buffer, position)[0], position + layout.size


def _read_array(buffer: Buffer, position: int) -> tuple[Any, int]:
    value_type, count = struct.unpack_from("<IQ", buffer, position)
    position += 12
    if value_type in SCALARS:
        layout = struct.Struct(f"<{count}{SCALARS[value_type]}")
        return layout.unpack_from(buffer, position), position + layout.size
    values: list[Any] = []
    if value_type == ARRAY:
        for _ in range(count):
            value, position = _read_array(buffer, position)
            values.append(value)
        return values, position
    for _ in range(count):  # one frame for the whole array: vocabularies have 100,000s of strings
        end = position + 8 + _length(buffer, position)[0]
        values.append(buffer[position + 8 : end].decode())
        position = end
    return values, position
