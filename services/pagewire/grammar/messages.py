"""What a service and its matcher process say to each other, over the socket that the process
inherits: frames of MessagePack, each after its length. Knows neither llguidance nor tokens.

Tokens and masks do not travel so: see shared.py.
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
    """The first one: what the process matches for. `places`: of its streams, 0: it only checks.
    `max_forced`: most tokens of a forced run. `processes`: of the worker, of which this is number
    `index`. `device_tells`: tokens may be told without a Look."""

    model: ModelConfig
    vocab_size: int
    eos: tuple[int, ...]
    places: int = 0
    max_forced: int = 0
    processes: int = 1
    index: int = 0
    device_tells: bool = False


class Check(Part, frozen=True):
    """Is this a grammar? Answered by Checked."""

    key: int
    grammar: Grammar


class Open(Part, frozen=True):
    """A stream with the output so far (int32 column), whose masks go to this place of the
    process in shared.SharedMasks; its tokens are told there. Answered there, or by Failed."""

    key: int
    place: int
    grammar: Grammar
    output: bytes


class Look(Part, frozen=True):
    """Something was told."""


class Close(Part, frozen=True):
    """These streams are over: their places are free."""

    keys: tuple[int, ...]


class Ready(Part, frozen=True):
    """The vocabulary is loaded."""


class Checked(Part, frozen=True):
    """`message` is empty where the grammar is one. `ignored`: keywords that a lenient schema has
    and that are not held."""

    key: int
    message: str
    ignored: tuple[str, ...] = ()


class Failed(Part, frozen=True):
    """This stream has no further masks, and why."""

    key: int
    message: str


ToMatcher = Start | Check | Open | Look | Close
FromMatcher = Ready | Checked | Failed
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
