"""Text that comes in pieces, for a reader that is written as if it had all of it: a generator that
waits, in a bare `yield`, for more. Knows no formats."""

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import Final, TypeVar

T = TypeVar("T")
Wait = Generator[None, None, T]
SPACE: Final = " \t\n\r"


class Ended(Exception):
    """There is no more text, and something was expected."""


class Markers:
    """Some texts to look for, none of which begins another one."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        longest_first = sorted(texts, key=len, reverse=True)
        self._search = re.compile("|".join(map(re.escape, longest_first)) or "(?!)").search
        self._prefixes = frozenset(text[:n] for text in texts for n in range(1, len(text)))
        self._most = max(map(len, texts), default=1) - 1
        self._last = frozenset(prefix[-1] for prefix in self._prefixes)

    def find(self, text: str, start: int = 0) -> re.Match[str] | None:
        """The first one in `text` that begins at `start` or later."""
        return self._search(text, start)

    def next_start(self, length: int) -> int:
        """Where the next search begins in a text of which `length` characters held none."""
        return max(0, length - self._most)

    def held(self, text: str) -> int:
        """How many characters at the end of `text` may become one."""
        if not text or text[-1] not in self._last:
            return 0
        for count in range(min(self._most, len(text)), 0, -1):
            if text[-count:] in self._prefixes:
                return count
        return 0


@lru_cache(maxsize=256)
def markers(*texts: str) -> Markers:
    """Those of the texts that are not empty."""
    return Markers(tuple(text for text in texts if text))


class Reader:
    """The text that has come and was not taken yet."""

    __slots__ = ("_record", "has_ended", "text")

    def __init__(self) -> None:
        self.text = ""
        self.has_ended = False
        self._record: list[str] | None = None

    def record(self) -> None:
        """Keep what is taken from now on."""
        self._record = []

    def recorded(self) -> str:
        """What was taken since `record`, which ends here."""
        pieces = self._record or []
        self._record = None
        return "".join(pieces)

    def take(self, count: int) -> str:
        """The next `count` characters, which are there."""
        taken = self.text[:count]
        self.text = self.text[count:]
        if self._record is not None:
            self._record.append(taken)
        return taken

    def give_back(self, text: str) -> None:
        """The text that was taken last is to come again."""
        self.text = text + self.text
        if self._record:
            self._record[-1] = self._record[-1].removesuffix(text)

    def wait(self) -> Wait[None]:
        """Until there is more text. Raises Ended."""
        before = len(self.text)
        while len(self.text) == before:
            if self.has_ended:
                raise Ended
            yield

    def space(self) -> Wait[str]:
        """Take whitespace; the character after it, empty at the end of the text."""
        while True:
            stripped = self.text.lstrip(SPACE)
            self.take(len(self.text) - len(stripped))
            if stripped:
                return stripped[0]
            if self.has_ended:
                return ""
            yield

    def up_to(self, wanted: Markers) -> Wait[tuple[str, str]]:
        """Take the text up to a marker, and the marker; both. Raises Ended."""
        start = 0
        while True:
            match = wanted.find(self.text, start)
            if match is not None:
                before = self.take(match.start())
                return before, self.take(len(match.group()))
            if self.has_ended:
                raise Ended
            start = wanted.next_start(len(self.text))
            yield

    def pass_on(self, wanted: Markers, show: Callable[[str], None]) -> Wait[str]:
        """Show the text up to the next marker, as soon as it is certain; that marker. Raises
        Ended when the rest was shown."""
        while True:
            text = self.text
            match = wanted.find(text)
            if match is not None:
                show(self.take(match.start()))
                return self.take(len(match.group()))
            if self.has_ended:
                show(self.take(len(text)))
                raise Ended
            show(self.take(len(text) - wanted.held(text)))
            yield

    def starts_with(self, text: str) -> Wait[bool]:
        """Whether `text` comes next; nothing is taken."""
        while len(self.text) < len(text) and text.startswith(self.text) and not self.has_ended:
            yield
        return self.text.startswith(text)
