"""Token ids back to text, one token at a time, never a broken character. It knows neither requests
nor stop strings.

For most tokenizers a token stands for fixed bytes, whatever stands around it; then decoding is a
table look-up, and only a token that is no whole UTF-8 by itself costs more (`TableDecoder`). For
the others (WordPiece, CTC, …) a window of tokens is decoded again at each step.
"""

import codecs
from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .token_bytes import (
    bytes_of_token,
    decoder_steps,
    is_context_free,
    strips_first_space,
    text_of,
    tokens_by_id,
)

REPLACEMENT: Final = "\ufffd"


class Decoder(Protocol):
    """The decoding of one request. While `can_look_up`, the next token's text may be taken from
    `texts` instead of calling `step`, unless it is None there."""

    texts: list[str | None]
    """By token id; None for a token that is no whole UTF-8 by itself."""
    can_look_up: bool
    """Nothing is held back that the next token's text depends on."""
    lead: int
    """Characters of the last step's text that stand for earlier tokens: bytes that no character
    came of. The last token's own text begins behind them."""

    def step(self, token: int) -> str:
        """The text that is certain now."""
        ...

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an unfinished character."""
        ...


class TableDecoder:
    """Decodes by a table of each token's bytes."""

    __slots__ = ("_bytes", "_pending", "_strips_space", "can_look_up", "lead", "texts")

    def __init__(
        self, texts: list[str | None], raw: list[bytes], strips_space: bool = False
    ) -> None:
        """`raw`: by token id, the bytes. `strips_space`: a space that begins the text is not
        shown."""
        self.texts = texts
        self._bytes = raw
        self._strips_space = strips_space
        self._pending = b""
        """The first bytes of a character whose others have not come yet."""
        self.can_look_up = not strips_space
        self.lead = 0

    def step(self, token: int) -> str:
        data = self._bytes[token]
        self.lead = 0
        if self._pending:
            self.lead = _broken_characters(self._pending, data)
            data = self._pending + data
        # Bytes that can never become a character are replaced now; an unfinished character waits.
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        if self._strips_space and text:
            text = text.removeprefix(" ")
            self._strips_space = False
        self.can_look_up = not (self._pending or self._strips_space)
        return text

    def flush(self) -> str:
        text = codecs.utf_8_decode(self._pending, "replace", True)[0]
        self._pending = b""
        return text


def _broken_characters(pending: bytes, data: bytes) -> int:
    """How many U+FFFD stand for `pending`, the first bytes of a character that `data` does not
    continue; 0 where it does."""
    is_continued = not data or data[0] & 0xC0 == 0x80
    return 0 if is_continued else len(pending.decode("utf-8", "replace"))


class WindowDecoder:
    """Decodes the last tokens twice, with and without the new one; the difference is the new text.

    The window `_ids` begins with the `_shown` tokens whose text was shown last, since the text of
    the tokens after them may depend on those (a space between two words, for example). Earlier
    tokens have no influence and are dropped.
    """

    can_look_up = False
    lead = 0

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool, unspaced: frozenset[int] = frozenset()
    ) -> None:
        """`unspaced`: tokens that get no space between each other."""
        self.texts: list[str | None] = []
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._unspaced = unspaced
        self._ids: list[int] = []
        self._shown = 0
        self._last_token = -1

    def step(self, token: int) -> str:
        last_token = self._last_token
        self._last_token = token
        self._ids.append(token)
        shown = self._decode(self._ids[: self._shown])
        whole = self._decode(self._ids)
        # A replacement character at the end is most likely the beginning of a character: wait.
        if len(whole) <= len(shown) or whole.endswith(REPLACEMENT):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        if token in self._unspaced and last_token in self._unspaced:
            return self._tokenizer.id_to_token(token) or ""
        return whole[len(shown) :]

    def flush(self) -> str:
        shown = self._decode(self._ids[: self._shown])
        return self._decode(self._ids)[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)


class Tables(NamedTuple):
    """By token id: the bytes it stands for, and its text, None where the bytes are no whole UTF-8.
    Shared by all requests."""

    raw: list[bytes]
    texts: list[str | None]


def _tables(raw: list[bytes]) -> Tables:
    return Tables(raw, [text_of(data) for data in raw])


class Decoding:
    """Makes the decoders of requests. Without a tokenizer every text is empty."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.special: frozenset[int] = frozenset()
        """Ids of special tokens, which have no text unless a request asks for them."""
        self.is_tabled = True
        """Each token stands for fixed bytes: requests get a TableDecoder."""
        self.strips_first_space = False
        """The space that the first word of every text begins with is not shown."""
        raw: list[bytes] = []
        if tokenizer is not None:
            added = tokenizer.get_added_tokens_decoder()
            self.special = frozenset(token for token, entry in added.items() if entry.special)
            steps = decoder_steps(tokenizer)
            self.is_tabled = is_context_free(steps)
            self.strips_first_space = strips_first_space(steps)
            names = tokens_by_id(tokenizer)
            # Without tables the bytes serve log-probabilities alone: a token's name, as it is.
            raw = [
                bytes_of_token(name, steps) if self.is_tabled else name.encode() for name in names
            ]
        self._all = _tables(raw)
        self._without_special = _tables(
            [b"" if token in self.special else data for token, data in enumerate(raw)]
        )
        self._silent = Tables([b""] * len(raw), [""] * len(raw))

    @property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._all.raw), default=0)

    @property
    def raw(self) -> list[bytes]:
        """By token id: the bytes it stands for, special ones included; a token's name where tokens
        stand for no fixed bytes."""
        return self._all.raw

    @property
    def size(self) -> int:
        """Token ids below this have bytes and text."""
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
        """A decoder for one request. `silent`: no text at all. `at_start`: the output begins a
        text, so its first space may have to go."""
        if silent:
            return TableDecoder(self._silent.texts, self._silent.raw)
        if not self.is_tabled and self._tokenizer:
            if spaces_between_special or skip_special:
                return WindowDecoder(self._tokenizer, skip_special)
            return WindowDecoder(self._tokenizer, skip_special, self.special)
        tables = self._without_special if skip_special else self._all
        return TableDecoder(tables.texts, tables.raw, self.strips_first_space and at_start)

    def bytes_of(self, ids: NDArray[np.int32]) -> tuple[bytes, ...]:
        """What each token stands for, special ones included. Raises ValueError for an id beyond the
        vocabulary."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.size:
            raise ValueError(
                f"token ids from {ids.min()} to {ids.max()} with a vocabulary of {self.size}"
            )
        return tuple(map(self._all.raw.__getitem__, ids.tolist()))

    def begins_text(self, prompt: Iterable[int]) -> bool:
        """Whether the output after `prompt` begins a text, so that its first space goes: the prompt
        has special tokens alone. Always False for tokenizers whose texts begin with no such
        space."""
        return self.strips_first_space and all(token in self.special for token in prompt)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """All at once, as a text of its own."""
        decoder = self.start(skip_special=skip_special, at_start=True)
        return "".join([decoder.step(token) for token in ids]) + decoder.flush()

    def offsets(self, ids: Iterable[int], skip_special: bool = True) -> list[int]:
        """Where each token begins in the text of `decode`, in characters."""
        decoder = self.start(skip_special=skip_special, at_start=True)
        offsets: list[int] = []
        length = 0
        for token in ids:
            text = decoder.step(token)
            offsets.append(length + decoder.lead)
            length += len(text)
        return offsets
