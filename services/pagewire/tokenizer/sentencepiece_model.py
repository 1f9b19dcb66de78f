"""Reads sentencepiece's `tokenizer.model` into one record. It does not know what a tokenizer does
with it.

Few fields of a protocol buffer are needed, so they are read here, without a library for either.
Layout: sentencepiece_model.proto (messages ModelProto, TrainerSpec, NormalizerSpec) and the
protocol buffers' wire format.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
VARINT = 0
FIXED64 = 1
BYTES = 2
FIXED32 = 5
KINDS: Final = {UNIGRAM: "unigram", BPE: "BPE", 3: "word", 4: "character"}

Value = int | bytes


class BadModel(ValueError):
    """The file is no sentencepiece model, or a damaged one."""


@dataclass(frozen=True)
class Model:
    """What the file holds. pieces[i], scores[i] and kinds[i] (NORMAL, CONTROL, ...) belong to id i.
    `bos`, `eos` and `unk` are -1 where there is none."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    model_type: int
    byte_fallback: bool
    unk: int
    bos: int
    eos: int
    charsmap: bytes
    """Normalization rules, compiled; empty for none."""
    dummy_prefix: bool
    remove_extra_spaces: bool


def read(path: Path) -> Model:
    """The model in a file. Raises BadModel, OSError."""
    try:
        return _model(path.read_bytes())
    except (ValueError, IndexError, struct.error) as error:
        raise BadModel(
            f"{path} is not a sentencepiece model, or damaged ({error}); fetch it again"
        ) from None


def _model(data: bytes) -> Model:
    pieces: list[tuple[str, float, int]] = []
    specs: dict[int, dict[int, Value]] = {}
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_piece(_bytes(value)))
        elif field in (2, 3):
            specs[field] = dict(_fields(_bytes(value)))
    if not pieces or len(specs) < 2:
        raise ValueError("it ends before its settings" if pieces else "it has no pieces")
    trained = specs[2]
    normalized = specs[3]
    texts, scores, kinds = (list(column) for column in zip(*pieces, strict=True))
    return Model(
        texts,
        scores,
        kinds,
        model_type=_int(trained, 3, UNIGRAM),
        byte_fallback=bool(_int(trained, 35, 0)),
        unk=_int(trained, 40, 0),
        bos=_int(trained, 41, 1),
        eos=_int(trained, 42, 2),
        charsmap=_bytes(normalized.get(2, b"")),
        dummy_prefix=bool(_int(normalized, 3, 1)),
        remove_extra_spaces=bool(_int(normalized, 4, 1)),
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, piece_type = "", 0.0, NORMAL
    for field, value in _fields(data):
        if field == 1:
            text = _bytes(value).decode()
        elif field == 2:
            score = struct.unpack("<f", _bytes(value))[0]
        elif field == 3 and isinstance(value, int):
            piece_type = value
    return text, score, piece_type


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field has another type than it should")
    return value


def _int(fields: dict[int, Value], field: int, default: int) -> int:
    """Negative numbers are written as their two's complement in 64 bits."""
    value = fields.get(field, default)
    if not isinstance(value, int):
        raise ValueError("a field has another type than it should")
    return value - (1 << 64) if value >> 63 else value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(number, value) of each field: an integer, or the bytes of everything else."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire_type == BYTES:
            size, position = _varint(data, position)
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
        else:
            raise ValueError(f"byte {position} begins no field")
        if position + size > len(data):
            raise ValueError(f"it ends at byte {len(data)} within a field")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position += 1
        shift += 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError(f"byte {position} continues a number that is too long")
