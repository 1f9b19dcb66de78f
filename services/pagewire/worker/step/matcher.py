"""One matcher process of a worker and the streams that it matches: starts it, tells it of streams,
ends it when it hangs, and starts the next one with every stream as it is. Tokens and masks are the
pool's business.
"""

import heapq
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...grammar.child import MatcherGone, MatcherProcess
from ...grammar.messages import Close, Failed, FromMatcher, Open, Start
from ...grammar.shared import SharedMasks
from .matched_stream import NO_PLACE, Stream

log = logging.getLogger("pagewire.worker")
HANG_S: Final = 10.0
"""A process that is ready and owes an answer for so long is ended."""
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
    """`on_failed(stream)`: there will be no masks for it any more. `on_lost(streams)`: their masks
    and forced runs are gone. `owed`: by slot, since when an answer is due for its stream,
    NOTHING_OWED where none is. `openings`: keys above 0 that no other opening has; see
    Stream.opening."""

    def __init__(
        self,
        start: Start,
        shared: SharedMasks,
        owed: NDArray[np.float64],
        openings: Iterator[int],
        clock: Callable[[], float],
        start_process: "StartProcess",
        on_failed: Callable[[Stream], None],
        on_lost: Callable[[list[Stream]], None],
    ) -> None:
        self._start_process = start_process
        self._start = start
        self._shared = shared
        self._owed = owed
        self._openings = openings
        self._clock = clock
        self._on_failed = on_failed
        self._on_lost = on_lost
        self._failed: set[int] = set()
        """Keys of streams that are given up."""
        self.process: MatcherProcess | None = None
        """What `restart` starts, and `receive` when it is due."""
        self.streams: dict[int, Stream] = {}
        """By key."""
        self._free = list(range(shared.places))
        """Places that no stream has, as a heap: with few streams, few are ever written."""
        self._suspects: deque[int] = deque()
        """Streams at whose work a process has ended, by key: opened one after the other."""
        self._blamed: set[int] = set()
        """Keys of streams at whose work alone processes have ended, and that got no further yet."""
        self.next_start = 0.0
        self._pause_s = RESTART_S[0]
        self._failed_starts = 0

    @property
    def is_ready(self) -> bool:
        """A process is there, and its vocabulary is loaded."""
        return self.process is not None and self.process.is_ready

    # --- streams ---

    @property
    def is_full(self) -> bool:
        """Every place has a stream."""
        return not self._free

    def add(self, stream: Stream) -> None:
        """Match `stream` from its output on. There is a free place."""
        stream.place = heapq.heappop(self._free)
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
        self._owed[stream.slot] = NOTHING_OWED
        self._close_opening(stream)
        heapq.heappush(self._free, stream.place)
        stream.place = NO_PLACE
        if self._suspects and self._suspects[0] == stream.key:
            self._suspects.popleft()
            self._open_suspect()

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
        self._close_opening(stream)
        stream.opening = next(self._openings)
        output = np.array(stream.output, np.int32).tobytes()
        self._owed[stream.slot] = min(self._owed[stream.slot], self._clock())
        self.process.send(Open(stream.opening, stream.place, stream.grammar, output))

    def _close_opening(self, stream: Stream) -> None:
        if stream.opening and self.process is not None:
            self.process.send(Close((stream.opening,)))
        stream.opening = 0

    # --- the process ---

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.close()
            self.process = None
        self._forget()

    def _forget(self) -> None:
        """What the process has said, and what it has been told: it is no more."""
        self._shared.forget(self._start.index)
        for stream in self.streams.values():
            stream.opening = 0

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

    def restart(self) -> None:
        """A new process, with every stream as it is."""
        if self._clock() < self.next_start:
            return
        self.process = self._start_process(self._start, self._shared)
        self._owed[[stream.slot for stream in self.streams.values()]] = NOTHING_OWED
        self._suspects = deque(key for key in self._suspects if key in self.streams)
        for stream in list(self.streams.values()):
            if stream.key not in self._suspects and stream.key not in self._failed:
                self.open(stream)
        self._open_suspect()

    def _take(self, message: FromMatcher) -> None:
        if not isinstance(message, Failed):
            return
        for stream in list(self.streams.values()):
            if stream.opening == message.key:
                log.warning("a grammar cannot be held any further: %s", message.message)
                self._fail(stream)
                self.answered([stream])

    def answered(self, streams: list[Stream]) -> None:
        """The process has masks for them, or has said why it has none: they did not end it, unless
        it ends there again."""
        self._pause_s = RESTART_S[0]
        for stream in streams:
            if stream.key in self._blamed and len(stream.output) > stream.died_at:
                stream.deaths = 0
                self._blamed.discard(stream.key)
            if self._suspects and self._suspects[0] == stream.key:
                self._suspects.popleft()
                self._open_suspect()

    @property
    def is_troubled(self) -> bool:
        """A process has ended, so that `answered` has something to do."""
        return bool(self._suspects or self._blamed) or self._pause_s > RESTART_S[0]

    def look(self) -> None:
        """End a process that hangs."""
        if self.process is None or not self.streams:
            return
        limit = HANG_S if self.process.is_ready else LOAD_S
        oldest = float(self._owed[[stream.slot for stream in self.streams.values()]].min())
        if self._clock() - max(oldest, self.process.ready_at) > limit:
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
        self._forget()
        self._on_lost(list(self.streams.values()))
        self.next_start = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, RESTART_S[1])

    def _blame(self) -> None:
        """Whatever the process worked for may be what ended it. Which of several it was shows when
        they are opened one by one."""
        owed = [key for key, stream in self.streams.items() if self._is_owed(stream)]
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

    def _is_owed(self, stream: Stream) -> bool:
        """An answer is due for it, perhaps to a token that only a device has told so far."""
        if self._owed[stream.slot] < NOTHING_OWED:
            return True
        place = self._shared.of_process(self._start.index).start + stream.place
        return stream.key not in self._failed and self._shared.is_told(place)

    def _give_up(self) -> None:
        log.error(
            "%d matcher processes could not start; requests with grammars fail", self._failed_starts
        )
        for stream in self.streams.values():
            self._fail(stream)

    def _fail(self, stream: Stream) -> None:
        self._failed.add(stream.key)
        self._owed[stream.slot] = NOTHING_OWED
        self._on_failed(stream)

    def _open_suspect(self) -> None:
        while self._suspects and self._suspects[0] not in self.streams:
            self._suspects.popleft()
        if self._suspects and self.process is not None:
            self.open(self.streams[self._suspects[0]])


StartProcess = Callable[[Start, SharedMasks], MatcherProcess]
"""As MatcherProcess."""
