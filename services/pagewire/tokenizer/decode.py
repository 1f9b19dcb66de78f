"""Token ids back to text, one token at a time, never a broken character. It knows neither requests
nor stop strings.

For most tokenizers a token stands for fixed bytes, whatever stands around it; then decoding is a
table look-up, and only a token that is no whole UTF-8 by itself costs more (`TableDecoder`). For
the others (WordPiece, CTC, …) a window of tokens is decoded again at each step.
"""

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

SPACE: Final = "▁"
BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
REPLACEMENT: Final = "\ufffd"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the others for
    the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


BYTE_OF: Final = _byte_alphabet()


class Decoder(Protocol):
    """One request's decoding. `texts[token]` may be used in place of `step` while `clean`, unless
    it is None."""

    texts: list[str | None]
    clean: bool

    def step(self, token: int) -> str:
        """The text that is certain now."""
        ...

    def flush(self) -> str:
        """At the end: U+FFFD for an unfinished character."""
        ...


class TableDecoder:
    """`lead` is the number of spaces to take off the text's beginning."""

    __slots__ = ("_bytes", "_lead", "_pending", "clean", "texts")

    def __init__(self, texts: list[str | None], raw: list[bytes], lead: int = 0) -> None:
        self.texts, self._bytes, self._lead = texts, raw, lead
        self._pending = b""
        self.clean = not lead

    def step(self, token: int) -> str:
        data = self._bytes[token]
        if self._pending:
            data = self._pending + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        if self._lead and text:
            text, self._lead = text.removeprefix(" "), 0
        self.clean = not (self._pending or self._lead)
        return text

    def flush(self) -> str:
        text = codecs.utf_8_decode(self._pending, "replace", True)[0]
        self._pending = b""
        return text


class WindowDecoder:
    """Decodes the tokens since the last certain text twice, with and without the new one; the
    difference is the new text."""

    clean = False

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, joined: frozenset[int]) -> None:
        """`joined`: special tokens that get no space between each other."""
        self.texts: list[str | None] = []
        self._tokenizer, self._skip, self._joined = tokenizer, skip_special, joined
        self._ids: list[int] = []
        self._certain = 0
        self._last = -1

    def step(self, token: int) -> str:
        last, self._last = self._last, token
        self._ids.append(token)
        old, new = self._decode(self._ids[: self._certain]), self._decode(self._ids)
        if len(new) <= len(old) or new.endswith(REPLACEMENT):
            return ""
        self._ids = self._ids[self._certain :]
        self._certain = len(self._ids)
        if token in self._joined and last in self._joined:
            return self._tokenizer.id_to_token(token) or ""
        return new[len(old) :]

    def flush(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._certain])) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class Tables(NamedTuple):
    """By token id: the bytes it stands for, and its text, None where the bytes are no whole UTF-8.
    Shared by all requests."""

    raw: list[bytes]
    texts: list[str | None]


class Decoding:
    """Makes the decoders of requests. Without a tokenizer every text is empty."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder() if tokenizer else {}
        self.special = frozenset(token for token, entry in added.items() if entry.special)
        tokens = _tokens(tokenizer) if tokenizer else []
        steps = _flatten(_state(tokenizer.decoder)) if tokenizer else []
        self.tabled = tokenizer is None or _is_tabled(steps)
        self.lead = int(any(step["type"] == "Strip" or _strips(step) for step in steps))
        raw = (
            [_token_bytes(token, steps) for token in tokens]
            if self.tabled
            else [token.encode() for token in tokens]
        )
        self._all = Tables(raw, [_text(data) for data in raw])
        kept = [b"" if token in self.special else data for token, data in enumerate(raw)]
        self._without_special = Tables(kept, [_text(data) for data in kept])
        self._silent: Tables = Tables([b""] * len(raw), [""] * len(raw))

    @property
    def size(self) -> int:
        return len(self._all.raw)

    def grow(self, size: int) -> None:
        """A model may have more rows than its tokenizer has tokens; such padding has no text."""
        for raw, texts in (self._all, self._without_special, self._silent):
            missing = size - len(raw)
            raw.extend([b""] * missing)
            texts.extend([""] * missing)

    def start(
        self,
        *,
        silent: bool = False,
        skip_special: bool = True,
        spaces_between_special: bool = True,
        at_start: bool = False,
    ) -> Decoder:
        """`silent`: no text at all. `at_start`: nothing was said before, so a space that begins
        every text is taken off."""
        if silent:
            return TableDecoder(self._silent.texts, self._silent.raw)
        if not self.tabled and self._tokenizer:
            joined = frozenset() if spaces_between_special or skip_special else self.special
            return WindowDecoder(self._tokenizer, skip_special, joined)
        tables = self._without_special if skip_special else self._all
        return TableDecoder(tables.texts, tables.raw, self.lead if at_start else 0)

    def bytes_of(self, ids: NDArray[np.int32]) -> tuple[bytes, ...]:
        """What each token stands for, special ones included. Raises ValueError for an id beyond the
        vocabulary."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.size:
            raise ValueError(
                f"token ids from {ids.min()} to {ids.max()} with a vocabulary of {self.size}"
            )
        return tuple(map(self._all.raw.__getitem__, ids.tolist()))

    def is_start(self, ids: Iterable[int]) -> bool:
        """Whether a prompt says nothing: only then does the output begin a text."""
        return bool(self.lead) and all(token in self.special for token in ids)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """All at once, as a text of its own."""
        decoder = self.start(skip_special=skip_special, at_start=True)
        return "".join([decoder.step(token) for token in ids]) + decoder.flush()


def _tokens(tokenizer: Tokenizer) -> list[str]:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(vocab.values(), default=-1) + 1)
    for token, index in vocab.items():
        tokens[index] = token
    return tokens


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _state(decoder: Any) -> dict[str, Any]:
    return json.loads(decoder.__getstate__()) if decoder is not None else {"type": "None"}


def _flatten(state: dict[str, Any]) -> list[dict[str, Any]]:
    return (
        [inner for step in state["decoders"] for inner in _flatten(step)]
        if state["type"] == "Sequence"
        else [state]
    )


def _strips(step: dict[str, Any]) -> bool:
    return step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"


def _is_tabled(steps: list[dict[str, Any]]) -> bool:
    """Whether each step treats a token without regard to its neighbours, but for one space stripped
    off the whole text's start."""
    fused = False
    for step in steps:
        match step:
            case {"type": "ByteLevel" | "ByteFallback" | "Metaspace"} | {
                "type": "Replace",
                "pattern": {"String": _},
            }:
                if fused:
                    return False
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if fused:
                pass
            case _:
                return False
    return True


def _token_bytes(token: str, steps: list[dict[str, Any]]) -> bytes:
    for step in steps:
        match step["type"]:
            case "ByteLevel":
                known = [BYTE_OF.get(character, -1) for character in token]
                return token.encode() if -1 in known else bytes(known)
            case "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
            case "Metaspace":
                token = token.replace(step.get("replacement", SPACE), " ")
            case "ByteFallback" if found := BYTE_TOKEN.fullmatch(token):
                return bytes((int(found[1], 16),))
            case _:
                pass
    return token.encode()
