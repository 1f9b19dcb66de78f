"""Which sizes of steps with prompts have a graph, and when the others get theirs.

A start captures one in three, and the largest of each number of rows; a step whose own size has no
graph yet replays the next larger one. The rest is captured when nothing is to be done, one at a
time, or once it has been missed often. Knows no model: a graph is what `capture` returns.
"""

from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

FIRST: Final = 3
"""Of so many sizes that follow each other, one is captured at start."""
MISSES: Final = 32
"""Steps that replayed a larger graph, after which a size gets its own: a capture holds up all
requests for some 50 ms, and padding costs more than that by then."""

Graph = TypeVar("Graph")
Key = tuple[int, int]
"""Numbers of tokens and of rows."""


class MixedGraphs(Generic[Graph]):
    """By Key. All ranks of a group do the same, since they are asked for the same steps."""

    def __init__(self, capture: Callable[[int, int], Graph]) -> None:
        self._capture = capture
        self._graphs: dict[Key, Graph] = {}
        self._misses: dict[Key, int] = {}
        """Of the sizes that have no graph yet, from large to small."""

    def start(
        self, sizes: Sequence[Sequence[Key]], progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """`sizes`: by number of rows, token counts falling. progress: how many are captured."""
        first = [key for keys in sizes for key in keys[::FIRST]]
        for done, key in enumerate(first):
            progress(done)
            self._graphs[key] = self._capture(*key)
        self._misses = {key: 0 for keys in sizes for key in keys if key not in self._graphs}

    @staticmethod
    def count_at_start(sizes: Sequence[Sequence[Key]]) -> int:
        """How many graphs `start` captures."""
        return sum(len(keys[::FIRST]) for keys in sizes)

    def find(self, key: Key) -> Graph | None:
        """The graph of this size, or of the next larger one with as many rows."""
        if key in self._graphs:
            return self._graphs[key]
        if key in self._misses:
            self._misses[key] += 1
            if self._misses[key] > MISSES:
                return self.own(key)
        tokens, rows = key
        larger = [size for size, count in self._graphs if count == rows and size >= tokens]
        return self._graphs[min(larger), rows] if larger else None

    def own(self, key: Key) -> Graph | None:
        """The graph of this size, captured now if need be; None for one that is to have none."""
        if key in self._misses:
            del self._misses[key]
            self._graphs[key] = self._capture(*key)
        return self._graphs.get(key)

    def capture_next(self) -> bool:
        """Capture one that is missing; whether there was any."""
        key = next(iter(self._misses), None)
        if key is not None:
            self.own(key)
        return key is not None
