"""All matcher processes of a worker: how many there are, which stream each has, and what they say.

Masks for many rows take longer than a forward pass. So where there are processors enough, a matcher
that has many streams gets another one beside it, and streams are spread over those that are ready.
"""

import os
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...grammar.child import MatcherProcess, wait_for_any
from ...grammar.messages import Start
from .matched_stream import Ints, Keys, Stream
from .matcher import Matcher, OnMasks

CROWDED: Final = 8
"""Streams of each matcher from which on there are more of them. One takes some 0.05 ms for a
mask."""
MAX_MATCHERS: Final = 16
CORES_A_MATCHER: Final = 2
"""Processors that there must be for each."""

NO_MATCHER: Final = -1


class MatcherPool:
    """Of streams with `start.rows` slots. on_masks, on_failed, on_lost: see Matcher."""

    def __init__(
        self,
        start: Start,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        start_process: Callable[[Start], MatcherProcess],
        on_masks: OnMasks,
        on_failed: Callable[[Stream], None],
        on_lost: Callable[[list[Stream]], None],
    ) -> None:
        self.start_process = start_process
        self._start = start
        self._clock = clock
        self._sleep = sleep
        self._on_masks = on_masks
        self._on_failed = on_failed
        self._on_lost = on_lost
        self._max_matchers = max_matchers()
        self.matchers = [self._new_matcher()]
        self._num_ready = 0
        """Matchers that were ready when streams were last spread."""
        self._at = np.full(start.rows, NO_MATCHER, np.int64)
        """By slot: the index of its stream's matcher."""

    def _new_matcher(self) -> Matcher:
        return Matcher(
            self._start,
            self._clock,
            lambda start: self.start_process(start),
            self._on_masks,
            self._on_failed,
            self._on_lost,
        )

    def restart_with(self, start: Start) -> None:
        """Before the first stream."""
        self._start = start
        self.matchers = [self._new_matcher()]

    def close(self) -> None:
        """End the processes."""
        for matcher in self.matchers:
            matcher.close()

    def match(self, stream: Stream, streams: int) -> None:
        """By the least busy matcher that is ready; by the first one where none is. There are
        `streams` in all."""
        self._hand(stream, self._ready_matchers() or self.matchers[:1])
        wanted = min(self._max_matchers, -(-streams // CROWDED))
        while len(self.matchers) < wanted:
            self.matchers.append(self._new_matcher())
        for matcher in self.matchers[:wanted]:
            if matcher.process is None:  # it may have ended while it had no streams
                matcher.restart()

    def remove(self, stream: Stream) -> None:
        """It is over."""
        at = self._at[stream.slot]
        if at != NO_MATCHER:
            self.matchers[at].remove(stream)
            self._at[stream.slot] = NO_MATCHER

    def open_again(self, stream: Stream) -> None:
        """Match it from its output on once more."""
        at = self._at[stream.slot]
        if at != NO_MATCHER:
            self.matchers[at].open(stream)

    def advance(self, slots: Ints, keys: Keys, tokens: NDArray[np.int32]) -> None:
        """The next tokens [R] of the streams `keys` [R], which are in `slots` [R]."""
        at = self._at[slots]
        for i, matcher in enumerate(self.matchers):
            own = np.flatnonzero(at == i)
            if len(own):
                matcher.advance(keys[own], tokens[own])

    def have(self, matcher: Matcher, slots: Ints) -> NDArray[np.bool_]:
        """[R]: of which of `slots` [R] `matcher` has the streams."""
        return self._at[slots] == self.matchers.index(matcher)

    def rows(self, slots: Ints, out: NDArray[np.uint32]) -> None:
        """Put the masks of `slots` [R], as they were written last, into `out` [R, words]."""
        at = self._at[slots]
        for i, matcher in enumerate(self.matchers):
            own = np.flatnonzero(at == i)
            if len(own) and matcher.process is not None:
                out[own] = matcher.process.masks[slots[own]]

    def _ready_matchers(self) -> list[Matcher]:
        return [matcher for matcher in self.matchers if matcher.is_ready]

    def wait(self, seconds: float) -> None:
        """So long, or until something arrives, which is then taken."""
        matcher_of = {m.process: m for m in self.matchers if m.process is not None}
        if matcher_of:
            for process in wait_for_any(list(matcher_of), seconds):
                matcher_of[process].receive()
            return
        due = min(matcher.next_start for matcher in self.matchers)
        self._sleep(min(seconds, max(0.0, due - self._clock())))
        self.receive()

    def receive(self) -> None:
        """Take what has arrived; start processes that are due; spread streams over new ones."""
        for matcher in self.matchers:
            matcher.receive()
        ready = self._ready_matchers()
        if len(ready) > max(1, self._num_ready):
            self._spread(ready)
        self._num_ready = len(ready)

    def _spread(self, ready: list[Matcher]) -> None:
        """Those that have more streams than others hand some on: a process makes a stream's state
        again from its output. What may end a process stays where it is."""
        share = -(-sum(len(matcher.streams) for matcher in ready) // len(ready))
        for matcher in ready:
            surplus = max(0, len(matcher.streams) - share)
            for stream in matcher.harmless()[:surplus]:
                matcher.remove(stream)
                self._on_lost([stream])
                self._hand(stream, ready)

    def _hand(self, stream: Stream, matchers: list[Matcher]) -> None:
        """To the least busy of `matchers`."""
        least = min(matchers, key=lambda matcher: len(matcher.streams))
        self._at[stream.slot] = self.matchers.index(least)
        least.add(stream)


def max_matchers() -> int:
    """Of a worker, on this machine."""
    return max(1, min(MAX_MATCHERS, len(os.sched_getaffinity(0)) // CORES_A_MATCHER))
