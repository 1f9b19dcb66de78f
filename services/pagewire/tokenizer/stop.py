"""Stop strings in a text that comes in pieces. It knows no tokens.

The outcome does not depend on how the text is cut: the stop string that ends first wins, of those
that end together the longest.
"""

import re


class Matcher:
    """Holds back the longest end of the text that could become a stop string, and no more. O(1)
    amortized per character and stop string: each stop string has Knuth, Morris and Pratt's failure
    table."""

    __slots__ = ("_first", "_held", "_include", "_states", "_stops", "_tables", "matched")

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        """`include`: the stop string itself is part of the text."""
        self.matched: str | None = None
        """The stop string that was hit."""
        self._stops = stops
        self._include = include
        self._first = re.compile("[" + "".join({re.escape(stop[0]) for stop in stops}) + "]")
        self._tables = [_failures(stop) for stop in stops]
        self._states = [0] * len(stops)
        self._held = ""

    @property
    def held(self) -> str:
        """The end of the text that could become a stop string."""
        return self._held

    def feed(self, text: str) -> str:
        """The text that may be shown now. After a match, `matched` names the stop string and the
        rest is dropped."""
        begin = 0
        if not self._held:
            first = self._first.search(text)
            if first is None:
                return text
            begin = first.start()
        whole = self._held + text
        end = self._scan(text, begin)
        if self.matched is not None:
            cut = len(self._held) + end
            self._held = ""
            return whole[: cut if self._include else cut - len(self.matched)]
        keep = len(whole) - max(self._states)
        self._held = whole[keep:]
        return whole[:keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held = self._held
        self._held = ""
        return held

    def _scan(self, text: str, begin: int) -> int:
        """Sets `matched` and returns where the stop string ends in `text`."""
        states = self._states
        for position in range(begin, len(text)):
            character = text[position]
            for which, stop in enumerate(self._stops):
                state = states[which]
                while state and stop[state] != character:
                    state = self._tables[which][state - 1]
                states[which] = state = state + (stop[state] == character)
                if state == len(stop) and (self.matched is None or state > len(self.matched)):
                    self.matched = stop
            if self.matched is not None:
                return position + 1
        return len(text)


def _failures(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper end that is also its beginning."""
    table = [0] * len(stop)
    length = 0
    for position in range(1, len(stop)):
        while length and stop[length] != stop[position]:
            length = table[length - 1]
        length += stop[length] == stop[position]
        table[position] = length
    return table
