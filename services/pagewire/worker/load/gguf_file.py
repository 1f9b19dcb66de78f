"""Reading a GGUF file: its metadata as a configuration, its tensors by the names of a Hugging Face
checkpoint.

The header is parsed here, skipping the vocabulary (the library's reader takes seconds over it);
dequantization is the `gguf` library's. Format: the GGUF specification in ggml's documentation.
"""

import contextlib
import functools
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from ...checkpoint import end_tokens, gguf_files, model_types
from ..models.architecture import Config, Unsupported
from ..models.rope import DEFAULT_THETA
from . import gguf_architectures, gguf_quantized
from .gguf_architectures import GgufArchitecture
from .gguf_quantized import InFile

SCALARS: Final = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING: Final = 8
ARRAY: Final = 9
TYPE_SIZES: Final = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}  # fmt: skip
"""The usual types: name, values of a block, its bytes. Others are looked up in the `gguf` library,
which takes a while to import."""
LONG_FACTORS: Final = "rope_factors_long.weight"
SHORT_FACTORS: Final = "rope_factors_short.weight"
ROTATION: Final = ("rope_freqs.weight", LONG_FACTORS, SHORT_FACTORS)
"""Tensors that are no weights."""
MATRIX_DIMENSIONS: Final = (2, 3)
"""Of a matrix, and of all experts' together."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: shape as in torch, ggml type number, offset within the data of `part`."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    part: "_Part"

    @property
    def matrices(self) -> int:
        """How many: those of all experts are one tensor."""
        return self.shape[0] if len(self.shape) == 3 else 1


class Place(NamedTuple):
    """One weight: the tensor of the file that has it, its name in a Hugging Face checkpoint, and of
    a tensor of all experts the number of the one."""

    tensor: str
    name: str
    expert: int = 0


class _Part:
    """One file of a GGUF model, open. Raises Unsupported when it is no GGUF file, or of a version
    before 2."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 24
        # as a plain array: each part of a memmap costs microseconds
        self.bytes = np.memmap(path, np.uint8, "r").view(np.ndarray)
        self._view = self.bytes.data
        if len(self._view) < 24 or bytes(self._view[:4]) != b"GGUF":
            raise Unsupported(f"{path} is not a GGUF file")
        version, tensors, pairs = struct.unpack_from("<IQQ", self._view, 4)
        if version not in (2, 3):
            raise Unsupported(f"{path} is GGUF version {version}; versions 2 and 3 are supported")
        self.metadata: dict[str, Any] = {}
        self._vocabulary_at = 0
        for _ in range(pairs):
            name = self._string()
            value_type = self._scalar(4)
            if name == "tokenizer.ggml.tokens":
                self._vocabulary_at = self._at
            self.metadata[name] = self._value(value_type)
        self.entries = dict(self._entry() for _ in range(tensors))
        alignment = int(self.metadata.get("general.alignment", 32))
        self.data = -(-self._at // alignment) * alignment

    def find_tokens(self, texts: Iterable[str]) -> dict[str, int]:
        """Those of `texts` that the vocabulary has, with their ids."""
        if not self._vocabulary_at:
            return {}
        encoded = {text.encode(): text for text in texts}
        lengths = {len(text) for text in encoded}
        unpack = struct.Struct("<Q").unpack_from
        view = self._view
        (count,) = unpack(view, self._vocabulary_at + 4)
        offset = self._vocabulary_at + 12
        ids = dict[str, int]()
        for token in range(count):
            (length,) = unpack(view, offset)
            offset += 8 + length
            if length in lengths and (text := encoded.get(bytes(view[offset - length : offset]))):
                ids[text] = token
        return ids

    def _scalar(self, value_type: int) -> Any:
        (value,) = struct.unpack_from(SCALARS[value_type], self._view, self._at)
        self._at += struct.calcsize(SCALARS[value_type])
        return value

    def _string(self) -> str:
        length = self._scalar(10)
        self._at += length
        return str(self._view[self._at - length : self._at], "utf-8", "replace")

    def _value(self, value_type: int) -> Any:
        if value_type == STRING:
            return self._string()
        if value_type != ARRAY:
            return self._scalar(value_type)
        item = self._scalar(4)
        count = self._scalar(10)
        if item != STRING:
            return (
                [self._value(item) for _ in range(count)]
                if count <= 64
                else self._skip(count * struct.calcsize(SCALARS[item]))
            )
        unpack = struct.Struct("<Q").unpack_from
        view = self._view
        offset = self._at
        for _ in range(count):
            offset += 8 + unpack(view, offset)[0]
        self._at = offset
        return None

    def _skip(self, length: int) -> None:
        self._at += length

    def _entry(self) -> tuple[str, Entry]:
        name = self._string()
        dimensions = self._scalar(4)
        shape = tuple(self._scalar(10) for _ in range(dimensions))[::-1]
        return name, Entry(shape, self._scalar(4), self._scalar(10), self)


class Gguf:
    """An open GGUF model, of which `path` is the file or one part. Raises Unsupported when a part
    is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self._parts = [_Part(part) for part in gguf_files.parts(path)]
        self.metadata = self._parts[0].metadata
        self.entries: dict[str, Entry] = {}
        for part in self._parts:
            self.entries |= part.entries
        count = self.metadata.get("split.tensors.count")
        if count is not None and count != len(self.entries):
            raise Unsupported(
                f"the {len(self._parts)} parts of {path} hold {len(self.entries)} tensors, not {count}: they are of different models"
            )

    def tensor(self, name: str) -> np.ndarray:
        """The dequantized tensor, float32, in torch's shape. Raises Unsupported for a type that
        cannot be dequantized."""
        entry = self.entries[name]
        with self._read_errors(name):
            type_name, _, raw = self._raw(name)
            return np.require(_full(type_name, entry.ggml_type, raw), np.float32, "W").reshape(
                entry.shape
            )

    @contextlib.contextmanager
    def _read_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (NotImplementedError, ValueError, KeyError) as error:
            raise Unsupported(
                f"tensor {name} of {self.entries[name].part.path} (ggml type {self.entries[name].ggml_type}) cannot be read: {error}"
            ) from None

    def _raw(self, name: str) -> tuple[str, int, np.ndarray]:
        """(the type's name, bytes of a block, [..., bytes of a row] uint8)."""
        entry = self.entries[name]
        type_name, block, size = _type_of(entry.ggml_type)
        row = entry.shape[-1] // block * size
        first = entry.part.data + entry.offset
        last = first + row * int(np.prod(entry.shape[:-1]))
        source = entry.part.bytes
        if last > len(source):
            raise ValueError(
                f"it ends at byte {last:,} of a file of {len(source):,}: the download is incomplete; fetch it again"
            )
        return type_name, size, source[first:last].reshape(*entry.shape[:-1], row)

    def type_counts(self) -> dict[str, int]:
        """How many weights have which of ggml's types."""
        counts: dict[str, int] = {}
        for entry in self.entries.values():
            if len(entry.shape) not in MATRIX_DIMENSIONS:
                continue
            with contextlib.suppress(ValueError):
                type_name, _, _ = _type_of(entry.ggml_type)
                counts[type_name] = counts.get(type_name, 0) + entry.matrices
        return counts

    def count_bytes(self, kept: Mapping[str, float], itemsize: int) -> int:
        """Of all weights in memory: `kept` says how many bytes a number of some types takes, any
        other takes `itemsize`."""
        total = 0.0
        for entry in self.entries.values():
            with contextlib.suppress(ValueError):
                name, _, _ = _type_of(entry.ggml_type)
                total += float(np.prod(entry.shape)) * (
                    kept.get(name, itemsize) if len(entry.shape) in MATRIX_DIMENSIONS else itemsize
                )
        return int(total)

    def _field(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{name}", default)

    @functools.cached_property
    def architecture(self) -> GgufArchitecture:
        """Raises Unsupported for one that is not built."""
        name = self.metadata.get("general.architecture")
        model_types.check_gguf(name)
        return gguf_architectures.of(str(name), self._field)

    def config(self) -> Config:
        """The metadata under the names of a config.json."""
        field = self._field
        heads = field("attention.head_count")
        config = {
            "model_type": self.architecture.family,
            "vocab_size": self.entries["token_embd.weight"].shape[0],
            "hidden_size": field("embedding_length"),
            "intermediate_size": field("feed_forward_length"),
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": field("attention.head_count_kv", heads),
            "head_dim": field("attention.key_length") or field("embedding_length") // heads,
            "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": field("context_length"),
            "tie_word_embeddings": "output.weight" not in self.entries,
            "rope_parameters": self._rope(field),
        }
        config |= self.architecture.settings(field, config)
        return {name: value for name, value in config.items() if value is not None}

    def _rope(self, field: Any) -> Config:
        """A factor without a type scales linearly; files from before there were types call it
        `scale_linear`."""
        factor = field("rope.scaling.factor") or field("rope.scale_linear") or 1.0
        scaling = field("rope.scaling.type", "linear" if factor != 1.0 else "none")
        rope: Config = {
            "rope_theta": field("rope.freq_base", DEFAULT_THETA),
            "rope_type": "default" if scaling == "none" else scaling,
            "factor": factor,
        }
        rope["original_max_position_embeddings"] = field("rope.scaling.original_context_length")
        rope["beta_fast"] = field("rope.scaling.yarn_beta_fast")
        rope["beta_slow"] = field("rope.scaling.yarn_beta_slow")
        if "rope_freqs.weight" in self.entries:
            rope |= {"rope_type": "default", "divisors": self.tensor("rope_freqs.weight").tolist()}
        if LONG_FACTORS in self.entries:
            rope |= {
                "rope_type": "longrope",
                "factor": None,  # the contexts' quotient; the factor for sines is given
                "attention_factor": field("rope.scaling.attn_factor"),
                "long_factor": self.tensor(LONG_FACTORS).tolist(),
                "short_factor": self.tensor(SHORT_FACTORS).tolist(),
            }
        return rope

    def eos_token_ids(self, tokenizer: Path | None, template: str = "") -> tuple[int, ...]:
        """The ids that end a text, in rising order: see `end_tokens`. `tokenizer`: where it is, if
        not in the file. `template`: the source of a chat template in place of the file's own."""
        vocab_size = self.entries["token_embd.weight"].shape[0]
        return end_tokens.of_gguf(
            self.metadata, self._parts[0].find_tokens, vocab_size, tokenizer, template
        )

    def places(self) -> Iterator[Place]:
        """Of every weight."""
        for name, entry in self.entries.items():
            if name in ROTATION:
                continue
            if gguf_architectures.holds_experts(name):
                for expert in range(entry.matrices):
                    yield Place(name, gguf_architectures.expert_name(name, expert), expert)
            else:
                yield Place(name, gguf_architectures.checkpoint_name(name, self.architecture))

    def weight(
        self, place: Place, config: Config, quantized: bool = False
    ) -> torch.Tensor | InFile:
        """In torch's shape, with the rows of Llama's queries and keys back in the order of the
        checkpoint: float32, or where `quantized` and the type can stay so, as it is in the file."""
        name = place.tensor
        value = self._quantized(place) if quantized else None
        if value is None:
            value = torch.from_numpy(self._full(place))
        matrix = name.split(".")[-2]
        if self.architecture.permuted and matrix in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if matrix == "attn_q" else "num_key_value_heads"]
            rows = torch.from_numpy(unpermute(np.arange(value.shape[0]), heads))
            return value[rows] if isinstance(value, torch.Tensor) else value.take(rows)
        if matrix in gguf_architectures.ONE_ROW and isinstance(value, torch.Tensor):
            return value.view(1, -1)
        return value

    def _quantized(self, place: Place) -> InFile | None:
        """None where the tensor is no matrix, or of another type."""
        if len(self.entries[place.tensor].shape) not in MATRIX_DIMENSIONS:
            return None
        with self._read_errors(place.tensor):
            type_name, size, raw = self._raw(place.tensor)
            if type_name not in gguf_quantized.TYPES:
                return None
            rows = raw[place.expert] if raw.ndim == 3 else raw
            return gguf_quantized.in_file(type_name, rows, size)

    def _full(self, place: Place) -> np.ndarray:
        """Dequantized, float32."""
        entry = self.entries[place.tensor]
        if len(entry.shape) < 3:
            return self.tensor(place.tensor)
        with self._read_errors(place.tensor):
            type_name, _, raw = self._raw(place.tensor)
            full = _full(type_name, entry.ggml_type, raw[place.expert])
            return np.require(full, np.float32, "W").reshape(entry.shape[1:])


def _type_of(number: int) -> tuple[str, int, int]:
    """(name, values of a block, its bytes) of ggml's type `number`. Raises ValueError."""
    if number not in TYPE_SIZES:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        ggml_type = GGMLQuantizationType(number)
        return ggml_type.name, *GGML_QUANT_SIZES[ggml_type]
    return TYPE_SIZES[number]


def _full(type_name: str, number: int, raw: np.ndarray) -> np.ndarray:
    """Dequantized."""
    if type_name == "F32":
        return raw.view(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(raw, GGMLQuantizationType(number))


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores Llama's queries and keys for a rotation of neighbours (i, i+1); the rotation here
    pairs i with i + D/2."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
