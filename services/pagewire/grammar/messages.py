"""What a service and its matcher process say to each other, over the socket that the process
inherits: frames of MessagePack, each after its length. Knows neither llguidance nor tokens.

Masks themselves do not travel: the process writes them into memory that both have, one row for each
slot, and says which it has written.
"""

import struct
from typing import Final

import msgspec
from pagewire_protocol.grammar import Grammar

from ..config import ModelConfig

HEAD: Final = struct.Struct("<I")


class Part(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all of them."""


class Start(Part, frozen=True):
    """The first one: what the process matches for. `rows`: rows of the memory for masks, each of
    `mask_words` uint32; 0: it only checks. `max_forced`: most tokens of a forced run."""

    model: ModelConfig
    vocab_size: int
    eos: tuple[int, ...]
    rows: int
    max_forced: int = 0


class Check(Part, frozen=True):
    """Is this a grammar? Answered by Checked."""

    key: int
    grammar: Grammar


class Open(Part, frozen=True):
    """A request with the output so far (int32 column), whose masks go to `row`. Answered by Masks
    or Failed."""

    key: int
    row: int
    grammar: Grammar
    output: bytes


class Advance(Part, frozen=True):
    """The next token of each of these requests: keys (uint64 column), tokens (int32 column).
    Answered as Open is."""

    keys: bytes
    tokens: bytes


class Close(Part, frozen=True):
    """These requests are over: nothing is written to their rows any more."""

    keys: tuple[int, ...]


class Ready(Part, frozen=True):
    """The vocabulary is loaded."""


class Checked(Part, frozen=True):
    """`message` is empty where the grammar is one. `ignored`: keywords that a lenient schema has
    and that are not held."""

    key: int
    message: str
    ignored: tuple[str, ...] = ()


class Masks(Part, frozen=True):
    """The masks of these requests (uint64 column) for output position i (int32 column) are in their
    rows. The last `forced_counts[i]` tokens (int32 column; empty: none) before that position were
    forced: they are those of `forced_tokens` (int32 column), in order, and the service has not said
    them."""

    keys: bytes
    positions: bytes
    forced_counts: bytes = b""
    forced_tokens: bytes = b""


class Failed(Part, frozen=True):
    """This request has no further masks, and why."""

    key: int
    message: str


ToMatcher = Start | Check | Open | Advance | Close
FromMatcher = Ready | Checked | Masks | Failed
encode: Final = msgspec.msgpack.Encoder().encode
decode_to_matcher: Final = msgspec.msgpack.Decoder(ToMatcher).decode
decode_from_matcher: Final = msgspec.msgpack.Decoder(FromMatcher).decode


def mask_words(vocab_size: int) -> int:
    """uint32 of one mask: bit i % 32 of word i // 32 is set where token i may come."""
    return -(-vocab_size // 32)


def framed(message: ToMatcher | FromMatcher) -> bytes:
    """With its length before it."""
    data = encode(message)
    return HEAD.pack(len(data)) + data
