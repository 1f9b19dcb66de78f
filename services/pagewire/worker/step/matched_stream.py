"""One admission that has a grammar: a stream of tokens that a matcher process follows."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pagewire_protocol.grammar import Grammar

SLOT_BITS: Final = 16
"""Of a key: the lowest ones say the slot."""
NO_PLACE: Final = -1

Ints = NDArray[np.signedinteger[Any]]
Keys = NDArray[np.uint64]


def key_for(slot: int, count: int) -> int:
    """The `count`th one, of a stream in `slot`; above 0 where `count` is."""
    return count << SLOT_BITS | slot


def slots_of(keys: Keys) -> Ints:
    """[R]: the slots of the streams `keys` [R]."""
    return (keys & np.uint64((1 << SLOT_BITS) - 1)).astype(np.int64)


class Stream:
    """One admission: its grammar and all its output tokens."""

    __slots__ = (
        "deaths",
        "died_at",
        "forced",
        "grammar",
        "key",
        "opening",
        "output",
        "place",
        "slot",
    )

    def __init__(self, key: int, slot: int, grammar: Grammar, output: list[int]) -> None:
        self.key = key
        self.opening = 0
        """The key by which its matcher process knows it, another one each time it is told of it; 0:
        none does."""
        self.slot = slot
        self.place = NO_PLACE
        """The one that it has among those of its matcher."""
        self.grammar = grammar
        self.output = output
        self.forced: list[int] = []
        """The forced run that follows `output`: the matcher has taken it already."""
        self.deaths = 0
        """Processes in a row that ended while they worked for this stream alone."""
        self.died_at = 0
        """How many output tokens it had when the last one did."""
