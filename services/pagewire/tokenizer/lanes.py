"""Which long text a thread encodes next. It does not know what the work is.

Two lanes: one thread takes short work only, so that however many long texts wait, a short one need
not. Where several wait, those that arrived earlier go first, except that a long text lets pass what
is shorter and arrives not much later.
"""

import heapq
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Final, Generic, Protocol, TypeVar

SHORT: Final = 65_536
"""Characters of work up to which it is short: about 30 ms."""
PATIENCE_S: Final = 2e-6
"""For each of its characters, so many seconds of arrivals after it may overtake a text."""


class Work(Protocol):
    """What waits in a lane."""

    size: int
    """Characters to be encoded."""
    cancelled: bool
    """Nobody wants it any more."""


W = TypeVar("W", bound=Work)


class Lanes(Generic[W]):
    """The work that waits, for two threads or more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._short: list[tuple[float, int, W]] = []
        self._long: list[tuple[float, int, W]] = []
        self._numbers = count()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, work: W) -> None:
        """`work` waits for a thread."""
        order = self._clock() + PATIENCE_S * work.size
        lane = self._short if work.size <= SHORT else self._long
        with self._changed:
            heapq.heappush(lane, (order, next(self._numbers), work))
            self._changed.notify_all()

    def take(self, short_only: bool) -> W | None:
        """The next work that is still wanted; waits for some. None when the lanes were closed."""
        with self._changed:
            while not self._closed:
                work = self._next(short_only)
                if work is not None:
                    return work
                self._changed.wait()
        return None

    def close(self) -> None:
        """Nothing is taken any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next(self, short_only: bool) -> W | None:
        while True:
            lanes = [lane for lane in (self._short, self._long) if lane]
            if short_only:
                lanes = [self._short] if self._short else []
            if not lanes:
                return None
            *_, work = heapq.heappop(min(lanes, key=lambda lane: lane[0][:2]))
            if not work.cancelled:
                return work
