"""One matcher process of a worker and the streams that it matches: starts it, tells it of streams,
ends it when it hangs, and starts the next one with every stream as it is. Knows no slots but as the
rows of its masks.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...grammar.child import MatcherGone, MatcherProcess
from ...grammar.messages import Advance, Close, Failed, FromMatcher, Masks, Open, Start
from .matched_stream import Ints, Keys, Stream, slots_of

log = logging.getLogger("pagewire.worker")
HANG_S: Final = 10.0
"""A process that is ready and owes an answer for so long is ended."""
LOOK_EVERY_S: Final = 0.5
"""How often it is looked whether one hangs."""
LOAD_S: Final = 300.0
"""The same of one that loads its vocabulary, which may have to be downloaded."""
RESTART_S: Final = (0.1, 5.0)
"""How long after the end of a process the next one starts: at first, and at most. Doubled with each
that ends before it has answered anything."""
MAX_FAILED_STARTS: Final = 5
"""Processes in a row that end before they are ready, after which no grammar is held."""
MAX_DEATHS: Final = 3
"""A stream at whose work alone so many processes ended gets no further masks."""
NOTHING_OWED: Final = np.inf


class Matcher:
    """`on_masks(self, keys, positions, runs)`: masks have come for these streams [R], output positions
    [R] and forced runs before them (None: there are none); returns the keys of those that they are
    still for. `on_failed(stream)`: there will be none any more. `on_lost(streams)`: their masks and
    forced runs are gone."""

    def __init__(
        self,
        start: Start,
        clock: Callable[[], float],
        start_process: Callable[[Start], MatcherProcess],
        on_masks: "OnMasks",
        on_failed: Callable[[Stream], None],
        on_lost: Callable[[list[Stream]], None],
    ) -> None:
        self._start_process = start_process
        self._start = start
        self._clock = clock
        self._on_masks = on_masks
        self._on_failed = on_failed
        self._on_lost = on_lost
        self._failed: set[int] = set()
        """Keys of streams that are given up."""
        self.process: MatcherProcess | None = None
        """What `restart` starts, and `receive` when it is due."""
        self.streams: dict[int, Stream] = {}
        """By key."""
        self._suspects: deque[int] = deque()
        """Streams at whose work a process has ended, by key: opened one after the other."""
        self._blamed: set[int] = set()
        """Keys of streams at whose work alone processes have ended, and that got no further yet."""
        self._owed = np.full(start.rows, NOTHING_OWED)
        """By slot: since when an answer is due for its stream, NOTHING_OWED where none is."""
        self._next_look = 0.0
        self.next_start = 0.0
        self._pause_s = RESTART_S[0]
        self._failed_starts = 0

    @property
    def is_ready(self) -> bool:
        """A process is there, and its vocabulary is loaded."""
        return self.process is not None and self.process.is_ready

    # --- streams ---

    def add(self, stream: Stream) -> None:
        """Match `stream` from its output on."""
        self.streams[stream.key] = stream
        if stream.deaths:
            self._blamed.add(stream.key)
        if self.process is None:
            self.restart()
        else:
            self.open(stream)

    def remove(self, stream: Stream) -> None:
        """It is over, or goes to another matcher."""
        del self.streams[stream.key]
        self._failed.discard(stream.key)
        self._blamed.discard(stream.key)
        self._answered(np.array([stream.key], np.uint64))
        if self.process is not None:
            self.process.send(Close((stream.key,)))

    def harmless(self) -> list[Stream]:
        """The streams that are neither given up nor suspected of having ended a process."""
        return [
            stream
            for key, stream in self.streams.items()
            if key not in self._failed and key not in self._suspects
        ]

    def open(self, stream: Stream) -> None:
        """Tell the process of it once more, as it is."""
        if self.process is None:
            return
        output = np.array(stream.output, np.int32).tobytes()
        self._owed[stream.slot] = min(self._owed[stream.slot], self._clock())
        self.process.send(Open(stream.key, stream.slot, stream.grammar, output))

    def advance(self, keys: Keys, tokens: NDArray[np.int32]) -> None:
        """The streams' next tokens [R], which are put into their outputs before anything else."""
        self._owed[slots_of(keys)] = self._clock()
        if self.process is not None:
            self.process.send(Advance(keys.tobytes(), tokens.tobytes()))

    # --- the process ---

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.close()
            self.process = None

    def receive(self) -> None:
        """Take what has arrived; start a process where there is none and one is due."""
        if self.process is None:
            if self.streams:
                self.restart()
            return
        try:
            messages = self.process.receive()
        except MatcherGone as gone:
            self._lost(f"has ended: it {gone}")
            return
        for message in messages:
            self._take(message)
        self._look()

    def restart(self) -> None:
        """A new process, with every stream as it is."""
        if self._clock() < self.next_start:
            return
        self.process = self._start_process(self._start)
        self._owed[:] = NOTHING_OWED
        self._suspects = deque(key for key in self._suspects if key in self.streams)
        for stream in list(self.streams.values()):
            if stream.key not in self._suspects and stream.key not in self._failed:
                self.open(stream)
        self._open_suspect()

    def _take(self, message: FromMatcher) -> None:
        match message:
            case Masks():
                keys = np.frombuffer(message.keys, np.uint64)
                positions = np.frombuffer(message.positions, np.int32)
                current = self._on_masks(self, keys, positions, _forced_runs(message))
                if self._blamed:
                    self._forgive(keys, positions, current)
                self._answered(current)
            case Failed():
                stream = self.streams.get(message.key)
                if stream is not None:
                    log.warning("a grammar cannot be held any further: %s", message.message)
                    self._fail(stream)
                    self._answered(np.array([message.key], np.uint64))
            case _:
                pass

    def _forgive(self, keys: Keys, positions: Ints, current: Keys) -> None:
        """Streams that got further than where a process ended did not end it."""
        got = dict(zip(keys.tolist(), positions.tolist(), strict=True))
        for key in self._blamed.intersection(current.tolist()):
            stream = self.streams[key]
            if got[key] > stream.died_at:
                stream.deaths = 0
                self._blamed.discard(key)

    def _answered(self, keys: Keys) -> None:
        """No answer for `keys` [R] is due any more."""
        if not len(keys):
            return
        self._owed[slots_of(keys)] = NOTHING_OWED
        self._pause_s = RESTART_S[0]
        if self._suspects and self._suspects[0] in keys.tolist():
            self._suspects.popleft()
            self._open_suspect()

    def _look(self) -> None:
        """End a process that hangs."""
        now = self._clock()
        if now < self._next_look or self.process is None:
            return
        self._next_look = now + LOOK_EVERY_S
        limit = HANG_S if self.process.is_ready else LOAD_S
        if now - max(float(self._owed.min()), self.process.ready_at) > limit:
            self.process.close()
            self._lost(f"has not answered for {limit:.0f} s")

    def _lost(self, why: str) -> None:
        log.warning(
            "the matcher process %s; %d requests with grammars go on with a new one",
            why,
            len(self.streams),
        )
        if self.process is not None:
            was_ready = self.process.is_ready
            self.process.close()
            self.process = None
            self._failed_starts = 0 if was_ready else self._failed_starts + 1
            if was_ready:
                self._blame()
            elif self._failed_starts >= MAX_FAILED_STARTS:
                self._give_up()
        self._on_lost(list(self.streams.values()))
        self.next_start = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, RESTART_S[1])

    def _blame(self) -> None:
        """Whatever the process worked for may be what ended it. Which of several it was shows when
        they are opened one by one."""
        owed = [key for key, s in self.streams.items() if self._owed[s.slot] < NOTHING_OWED]
        alone = len(owed) == 1 or bool(self._suspects)
        blamed = [self._suspects[0]] if self._suspects else owed
        for key in blamed:
            stream = self.streams.get(key)
            if stream is None:
                continue
            stream.deaths += alone
            if alone:
                self._blamed.add(key)
            stream.died_at = len(stream.output)
            if stream.deaths >= MAX_DEATHS:
                log.error("a grammar has ended %d matcher processes; it is given up", stream.deaths)
                self._fail(stream)
                if self._suspects:
                    self._suspects.popleft()
            elif key not in self._suspects:
                self._suspects.append(key)

    def _give_up(self) -> None:
        log.error(
            "%d matcher processes could not start; requests with grammars fail", self._failed_starts
        )
        for stream in self.streams.values():
            self._fail(stream)

    def _fail(self, stream: Stream) -> None:
        self._failed.add(stream.key)
        self._on_failed(stream)

    def _open_suspect(self) -> None:
        while self._suspects and self._suspects[0] not in self.streams:
            self._suspects.popleft()
        if self._suspects and self.process is not None:
            self.open(self.streams[self._suspects[0]])


def _forced_runs(message: Masks) -> list[list[int]] | None:
    """The forced run of each row; None where there are none."""
    if not message.forced_counts:
        return None
    counts = np.frombuffer(message.forced_counts, np.int32)
    tokens = np.frombuffer(message.forced_tokens, np.int32)
    return [run.tolist() for run in np.split(tokens, np.cumsum(counts)[:-1])]


OnMasks = Callable[[Matcher, Keys, Ints, list[list[int]] | None], Keys]
"""See Matcher."""
