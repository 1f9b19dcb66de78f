"""All matcher processes of a worker: how many there are, which stream each has, what they are told
and what they answer (grammar/shared.py).

Masks for many rows take longer than a forward pass. So where there are processors enough, a matcher
that has many streams gets another one beside it, and streams are spread over those that are ready,
though over no more than they need: each that has any wakes several times a step.
"""

import itertools
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ...grammar.child import wait_for_any
from ...grammar.messages import Start, mask_words
from ...grammar.shared import NO_POSITION, SharedMasks, num_places, positions_of
from ...process import processors
from ...process.fence import fence
from ...process.timers import sleep_precisely
from .matched_stream import NO_PLACE, Ints, Stream
from .matcher import NOTHING_OWED, Matcher, StartProcess

CROWDED: Final = 8
"""Streams of each matcher from which on there are more of them. One takes some 0.05 ms for a
mask."""
MAX_MATCHERS: Final = 32
"""And no more than processors."""

HELD_UP_S: Final = 0.1
"""When a mask has been due for so long, its process is held up: other streams go elsewhere."""
LOOK_EVERY_S: Final = 0.5
"""How often it is looked whether a process hangs."""
NO_MATCHER: Final = -1


class MatcherPool:
    """Of a worker with so many slots, `rows`. start: what all processes have in common. on_failed,
    on_lost: see Matcher."""

    def __init__(
        self,
        rows: int,
        start: Start,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        start_process: StartProcess,
        on_failed: Callable[[Stream], None],
        on_lost: Callable[[list[Stream]], None],
    ) -> None:
        self.start_process = start_process
        self._clock = clock
        self._sleep = sleep
        self._on_failed = on_failed
        self._on_lost = on_lost
        self._max_matchers = max_matchers()
        self._openings = itertools.count(1)
        self._num_ready = 0
        """Matchers that were ready when streams were last spread."""
        self._next_look = 0.0
        self._is_precise = False
        self._at = np.full(rows, NO_MATCHER, np.int64)
        """By slot: the index of its stream's matcher."""
        self.place_of = np.full(rows, NO_PLACE, np.int64)
        """By slot: its stream's place among those of all matchers; NO_PLACE: it has none."""
        self._opening_of = np.zeros(rows, np.uint64)
        """By slot: Stream.opening."""
        self.version = 0
        """Another number whenever one of these two columns has changed."""
        self._owed = np.full(rows, NOTHING_OWED)
        """See Matcher."""
        self.restart_with(start)

    def restart_with(self, start: Start) -> None:
        """Before the first stream; `shared` is another one then."""
        places = num_places(len(self.place_of), self._max_matchers)
        words = mask_words(start.vocab_size)
        self._shared = SharedMasks(places, words, self._max_matchers, start.max_forced)
        self._begin_with(replace(start, places=places, processes=self._max_matchers))

    def _begin_with(self, start: Start) -> None:
        self._start = start
        self.matchers: list[Matcher] = []
        self._add_matcher()

    def let_device_tell(self) -> None:
        """Before the first stream: a device writes tokens to `shared` too."""
        self._begin_with(replace(self._start, device_tells=True))

    def _add_matcher(self) -> None:
        matcher = Matcher(
            replace(self._start, index=len(self.matchers)),
            self._shared,
            self._owed,
            self._openings,
            self._clock,
            lambda start, shared: self.start_process(start, shared),
            self._on_failed,
            self._on_lost,
        )
        self.matchers.append(matcher)

    def close(self) -> None:
        """End the processes."""
        for matcher in self.matchers:
            matcher.close()

    def match(self, stream: Stream, streams: int) -> None:
        """From its output on. There are `streams` in all."""
        if not self._is_precise:
            self._is_precise = True
            sleep_precisely()  # who waits for masks is this thread
        self._hand(stream)
        wanted = self._num_wanted(streams)
        while len(self.matchers) < wanted:
            self._add_matcher()
        for matcher in self.matchers[:wanted]:
            if matcher.process is None:  # it may have ended while it had no streams
                self._restart(matcher)

    def _restart(self, matcher: Matcher) -> None:
        matcher.restart()
        self._note_openings(matcher)

    def _note_openings(self, matcher: Matcher) -> None:
        self.version += 1
        for stream in matcher.streams.values():
            self._opening_of[stream.slot] = stream.opening

    def remove(self, stream: Stream) -> None:
        """It is over."""
        at = self._at[stream.slot]
        if at != NO_MATCHER:
            self.matchers[at].remove(stream)
            self._at[stream.slot] = NO_MATCHER
            self.place_of[stream.slot] = NO_PLACE
            self._opening_of[stream.slot] = 0
            self._note_openings(self.matchers[at])

    def open_again(self, stream: Stream) -> None:
        """Match it from its output on once more."""
        at = self._at[stream.slot]
        if at != NO_MATCHER:
            self.matchers[at].open(stream)
            self._opening_of[stream.slot] = stream.opening
            self.version += 1

    # --- tokens and masks ---

    def tell(self, slots: Ints, positions: Ints, tokens: NDArray[np.int32]) -> None:
        """The next tokens [R] of the streams in `slots` [R], whose positions in their outputs are
        `positions` [R], and for which there were masks."""
        if not len(slots):
            return
        self.told(slots)
        self._shared.tell(self.place_of[slots], self._opening_of[slots], positions, tokens)
        concerned = np.bincount(self._at[slots], minlength=len(self.matchers))
        for matcher, rows in zip(self.matchers, concerned.tolist(), strict=True):
            if rows and matcher.process is not None:
                matcher.process.look()

    def told(self, slots: Ints) -> None:
        """The matchers of `slots` [R] have been told their next tokens, or are being told."""
        self._owed[slots] = self._clock()

    def positions(self, slots: Ints) -> NDArray[np.int64]:
        """[R]: the output positions that the masks of `slots` [R] are for; NO_POSITION where there
        is none."""
        places, openings = self.place_of[slots], self._opening_of[slots]
        there = (places != NO_PLACE) & (openings != 0)
        tags = self._shared.tags[places]
        positions = np.where(there, positions_of(tags, openings), NO_POSITION)
        fence()  # masks are read behind it
        return positions

    def openings(self, slots: Ints) -> NDArray[np.uint64]:
        """[R]: the keys by which the matchers of `slots` [R] know their streams; 0: none does."""
        return self._opening_of[slots]

    @property
    def shared(self) -> SharedMasks:
        """Where processes write: the same one from the first stream on."""
        return self._shared

    def masks(self, slots: Ints) -> NDArray[np.uint32]:
        """[R, words]: of `slots` [R], for which there are some."""
        return self._shared.masks[self.place_of[slots]]

    def num_forced(self, slots: Ints) -> NDArray[np.int32]:
        """[R]: tokens of the forced runs before the positions of these masks."""
        return self._shared.forced_counts[self.place_of[slots]]

    def forced(self, slot: int) -> list[int]:
        """The run before the position of its mask."""
        place = self.place_of[slot]
        return self._shared.forced[place, : self._shared.forced_counts[place]].tolist()

    def answered(self, slots: Ints, stream_in: Callable[[int], Stream]) -> None:
        """The masks of `slots` [R] have come."""
        self._owed[slots] = NOTHING_OWED
        for i, matcher in enumerate(self.matchers):
            if matcher.is_troubled:
                own = slots[self._at[slots] == i].tolist()
                if own:
                    matcher.answered(list(map(stream_in, own)))
                    self._note_openings(matcher)

    def _ready_matchers(self) -> list[Matcher]:
        return [matcher for matcher in self.matchers if matcher.is_ready]

    def wait(self, seconds: float) -> None:
        """So long, or until a process says something, which is then taken. Masks are not said."""
        if any(matcher.process is not None for matcher in self.matchers):
            self._receive(seconds)
            return
        wanted = (matcher.next_start for matcher in self.matchers if matcher.streams)
        due = min(wanted, default=self._clock() + seconds)
        self._sleep(min(seconds, max(0.0, due - self._clock())))
        self.receive()

    def receive(self) -> None:
        """Take what processes have said; start those that are due; spread streams over new ones."""
        for matcher in self.matchers:
            if matcher.process is None and matcher.streams:
                self._restart(matcher)
        self._receive(0.0)
        ready = self._ready_matchers()
        if len(ready) > max(1, self._num_ready):
            self._spread(ready)
        self._num_ready = len(ready)

    @property
    def is_look_due(self) -> bool:
        """It is time for `look`."""
        return self._clock() >= self._next_look

    def look(self) -> None:
        """End processes that hang. Once the masks that have come are taken: it may have been long
        since anybody looked."""
        self._next_look = self._clock() + LOOK_EVERY_S
        for matcher in self.matchers:
            matcher.look()
            self._note_openings(matcher)

    def owed_since(self, slots: Ints) -> NDArray[np.float64]:
        """[R]: since when masks of `slots` [R] are due; minus infinity where nobody computes one."""
        owed = self._owed[slots]
        return np.where((owed == NOTHING_OWED) | (self.place_of[slots] == NO_PLACE), -np.inf, owed)

    def _receive(self, seconds: float) -> None:
        matcher_of: dict[Any, Matcher] = {
            m.process: m for m in self.matchers if m.process is not None
        }
        for process in wait_for_any(list(matcher_of), seconds) if matcher_of else ():
            matcher_of[process].receive()
            self._note_openings(matcher_of[process])

    def _spread(self, ready: list[Matcher]) -> None:
        """Those that have more streams than others hand some on: a process makes a stream's state
        again from its output. What may end a process stays where it is."""
        streams = sum(len(matcher.streams) for matcher in ready)
        share = -(-streams // max(1, min(len(ready), self._num_wanted(streams))))
        for matcher in ready:
            surplus = max(0, len(matcher.streams) - share)
            for stream in matcher.harmless()[:surplus]:
                self.remove(stream)
                self._on_lost([stream])
                self._hand(stream)

    def _num_wanted(self, streams: int) -> int:
        """How many matchers so many streams are for."""
        return min(self._max_matchers, -(-streams // CROWDED))

    def _hand(self, stream: Stream) -> None:
        """To the least busy matcher that has a place for it: of those that are ready and not held
        up, as far as that many are wanted, or else of all that are ready, or of the others, which
        may still load, or else to one more. All that there can be have places enough for all
        slots."""
        open_ones = [matcher for matcher in self.matchers if not matcher.is_full]
        if not open_ones:
            self._add_matcher()
            open_ones = self.matchers[-1:]
        streams = 1 + sum(len(matcher.streams) for matcher in self.matchers)
        ready = [matcher for matcher in open_ones if matcher.is_ready]
        held_up = set(self._at[self._owed < self._clock() - HELD_UP_S].tolist())
        prompt = [m for m in ready if self.matchers.index(m) not in held_up] or ready
        least = min(
            prompt[: self._num_wanted(streams)] or open_ones,
            key=lambda matcher: len(matcher.streams),
        )
        self._at[stream.slot] = at = self.matchers.index(least)
        least.add(stream)
        self.place_of[stream.slot] = at * self._shared.places + stream.place
        self._note_openings(least)


def max_matchers() -> int:
    """Of a worker, on this machine."""
    return max(1, min(MAX_MATCHERS, processors.usable()))
