"""Which tokens the grammars of a worker's slots allow next: the worker's side of its matcher process
(grammar/). Knows no tensors and no model.

Each admission is a stream with a key of its own. The matcher is told the stream's tokens as they are
sampled, and answers with the mask for the next one; a mask is used for that stream and that position
and for nothing else. Where a grammar leaves a single token, the answer brings it, and further ones
after it: a forced run, behind which the mask is. A row whose mask is not there when it would be sampled brings no token, and
nobody else waits for it. When the process ends or hangs, a new one gets every stream as it is.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from pagewire_protocol.grammar import Grammar
from pagewire_protocol.messages import Step

from ...config import ModelConfig
from ...grammar.child import MatcherGone, MatcherProcess
from ...grammar.messages import Advance, Close, Failed, FromMatcher, Masks, Open, Start

log = logging.getLogger("pagewire.worker")
WAIT_S: Final = 0.005
"""How long the rows of a step that need no mask may be held up by those that do."""
WAIT_ALONE_S: Final = 0.05
"""The same of a step in which every row needs one."""
WAIT_RUNS_S: Final = 0.001
"""How long a step in which every row has a grammar waits for its forced runs before it is computed."""
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
NO_KEY: Final = 0
NO_TOKEN: Final = -1

Ints = NDArray[np.signedinteger[Any]]
Bools = NDArray[np.bool_]
Keys = NDArray[np.uint64]


class Stream:
    """One admission: its grammar and all its output tokens."""

    __slots__ = ("deaths", "died_at", "forced", "grammar", "key", "output", "slot")

    def __init__(self, key: int, slot: int, grammar: Grammar, output: list[int]) -> None:
        self.key = key
        self.slot = slot
        self.grammar = grammar
        self.output = output
        self.forced: list[int] = []
        """The forced run that follows `output`: the matcher has taken it already."""
        self.deaths = 0
        """Processes in a row that ended while they worked for this stream alone."""
        self.died_at = 0
        """How many output tokens it had when the last one did."""


class GrammarMasks:
    """Of `count` slots of a model with `vocab_size` tokens that ends at `eos`. Without a request that
    has a grammar there is no process, and nothing costs anything."""

    def __init__(
        self,
        count: int,
        model: ModelConfig,
        vocab_size: int,
        eos: tuple[int, ...],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        start_process: Callable[[Start], MatcherProcess] = MatcherProcess,
    ) -> None:
        self._start_process = start_process
        self._start = Start(model, vocab_size, eos, count)
        self._clock = clock
        self._sleep = sleep
        self._process: MatcherProcess | None = None
        self._streams: dict[int, Stream] = {}
        """By key."""
        self._key_of = np.full(count, NO_KEY, np.uint64)
        """By slot: the key of its stream."""
        self._mask_at = np.full(count, -1, np.int64)
        """By slot: the output position that the slot's mask is for; -1: it has none."""
        self._forced = np.full(count, NO_TOKEN, np.int64)
        """By slot: the first token of the forced run at that position; NO_TOKEN: there is none, and
        the mask is what the matcher has written."""
        self._failed = np.zeros(count, np.bool_)
        self._last_key = NO_KEY
        self._suspects: deque[int] = deque()
        """Streams at whose work a process has ended, by key: opened one after the other."""
        self._owed: dict[int, float] = {}
        """Keys that an answer is due for, and since when."""
        self._next_start = 0.0
        self._pause_s = RESTART_S[0]
        self._failed_starts = 0

    # --- the slots' requests ---

    def admit(self, slot: int, grammar: Grammar | None, output: NDArray[np.int32]) -> None:
        """`slot` holds a new request, with the output so far."""
        self.retire(slot)
        if grammar is None:
            return
        self._last_key += 1
        stream = Stream(self._last_key, slot, grammar, output.tolist())
        self._streams[stream.key] = stream
        self._key_of[slot] = stream.key
        if self._process is None:
            self._restart()
        else:
            self._open(stream)

    def retire(self, slot: int) -> None:
        """The slot's request is over."""
        key = int(self._key_of[slot])
        if key == NO_KEY:
            return
        self._key_of[slot] = NO_KEY
        self._mask_at[slot] = -1
        self._forced[slot] = NO_TOKEN
        self._failed[slot] = False
        del self._streams[key]
        self._answered(key)
        if self._process is not None:
            self._process.send(Close((key,)))

    def follow(self, step: Step) -> None:
        """The requests that `step` retires and admits."""
        if not self._streams and not any(a.grammar is not None for a in step.admit):
            return
        for slot in np.frombuffer(step.retire, np.int32).tolist():
            self.retire(slot)
        for admission in step.admit:
            self.admit(admission.slot, admission.grammar, np.frombuffer(admission.output, np.int32))

    def clear(self) -> None:
        """No slot holds a request."""
        for slot in np.flatnonzero(self._key_of != NO_KEY).tolist():
            self.retire(slot)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def concerns(self, slots: Ints) -> Bools:
        """[R]: which of `slots` [R] have a grammar."""
        return self._key_of[slots] != NO_KEY

    @property
    def any(self) -> bool:
        """Some slot has a grammar."""
        return bool(self._streams)

    def keys(self, slots: Ints) -> Keys:
        """[R]: the streams in `slots` [R], NO_KEY for those without a grammar. By its key a token
        reaches the request that it was sampled for, whoever has the slot by then."""
        return self._key_of[slots]

    def append(self, keys: Keys, tokens: NDArray[np.int32]) -> None:
        """`tokens` [R] were sampled for the streams `keys` [R]; those that are over are passed
        over."""
        rows = [row for row, key in enumerate(keys.tolist()) if key in self._streams]
        if not rows:
            return
        keys = keys[rows]
        values = tokens[rows].astype(np.int32)
        now = self._clock()
        news = np.ones(len(keys), np.bool_)
        for row, (key, token) in enumerate(zip(keys.tolist(), values.tolist(), strict=True)):
            stream = self._streams[key]
            if stream.forced:
                news[row] = False
                self._say_forced(stream, token)
                continue
            stream.output.append(token)
            self._mask_at[stream.slot] = -1
            self._owed[key] = now
        if self._process is not None and news.any():
            self._process.send(Advance(keys[news].tobytes(), values[news].tobytes()))

    def _say_forced(self, stream: Stream, token: int) -> None:
        """`token` was sampled where there is a forced run, so that it is its first one; any other
        comes of logits that were not finite."""
        stream.output.append(token)
        if token == stream.forced.pop(0):
            self._at_forced(stream)
        else:
            stream.forced.clear()
            self._mask_at[stream.slot] = -1
            self._forced[stream.slot] = NO_TOKEN
            if self._process is not None:
                self._open(stream)

    def _at_forced(self, stream: Stream) -> None:
        """The next position of `stream` has a mask, by what is left of its forced run or behind
        it."""
        self._mask_at[stream.slot] = len(stream.output)
        self._forced[stream.slot] = stream.forced[0] if stream.forced else NO_TOKEN

    # --- forced runs ---

    def allow_runs(self, most: int) -> int:
        """Before the first request: runs have `most` tokens at most. Returns how many they will
        have; 0: there will be none."""
        self._start = replace(self._start, max_forced=most)
        return most

    def take_runs(self, slots: Ints, most: Ints) -> list[list[int]]:
        """Of each of `slots` [R], the forced run that follows its output, as far as it is known, and
        at most most[i] tokens of it. From now on these are output."""
        self._receive()
        if self.concerns(slots).all():
            end = self._clock() + WAIT_RUNS_S
            while self._awaits_any(slots) and (left := end - self._clock()) > 0:
                self._wait(left)
                self._receive()
        runs: list[list[int]] = []
        for slot, limit in zip(slots.tolist(), most.tolist(), strict=True):
            if self._forced[slot] == NO_TOKEN or limit <= 0:
                runs.append([])
                continue
            stream = self._streams[int(self._key_of[slot])]
            runs.append(stream.forced[:limit])
            stream.output += runs[-1]
            del stream.forced[:limit]
            self._at_forced(stream)
        return runs

    def _awaits_any(self, slots: Ints) -> bool:
        return bool(((self._mask_at[slots] < 0) & ~self._failed[slots]).any())

    # --- masks ---

    def ready(self, slots: Ints, positions: Ints) -> Bools:
        """[R]: which of `slots` [R] can be sampled at the output positions `positions` [R]: those
        without a grammar, and those whose masks are there. Waits a little for the others."""
        concerned = self.concerns(slots)
        if not concerned.any():
            return np.ones(len(slots), np.bool_)
        end = self._clock() + (WAIT_ALONE_S if concerned.all() else WAIT_S)
        while True:
            self._receive()
            there = ~concerned | (self._mask_at[slots] == positions) | self._failed[slots]
            left = end - self._clock()
            if there.all() or left <= 0:
                return there
            self._wait(left)

    def failed(self, slots: Ints) -> Bools:
        """[R]: which of `slots` [R] can have no token: their grammars are too costly, or no token
        continues their texts."""
        return self._failed[slots]

    def rows(self, slots: Ints) -> NDArray[np.uint32]:
        """[R, words]: the masks of `slots` [R], all of which are ready: bit i % 32 of word i // 32 is
        set where token i may come."""
        assert self._process is not None
        masks = self._process.masks[slots]
        for row in np.flatnonzero(self._forced[slots] != NO_TOKEN).tolist():
            word, bit = divmod(int(self._forced[slots[row]]), 32)
            masks[row] = 0
            masks[row, word] = 1 << bit
        return masks

    # --- the process ---

    def _wait(self, seconds: float) -> None:
        if self._process is None:
            self._sleep(min(seconds, max(0.0, self._next_start - self._clock())))
        else:
            self._process.wait(seconds)

    def _receive(self) -> None:
        if self._process is None:
            self._restart()
            return
        try:
            messages = self._process.receive()
        except MatcherGone as gone:
            self._lost(f"has ended: it {gone}")
            return
        for message in messages:
            self._take(message)
        self._look()

    def _take(self, message: FromMatcher) -> None:
        match message:
            case Masks():
                keys = np.frombuffer(message.keys, np.uint64).tolist()
                positions = np.frombuffer(message.positions, np.int32).tolist()
                runs = _forced_runs(message, len(keys))
                for key, position, run in zip(keys, positions, runs, strict=True):
                    stream = self._streams.get(key)
                    if stream is not None and len(stream.output) + len(run) == position:
                        stream.forced = run
                        self._at_forced(stream)
                        if position > stream.died_at:
                            stream.deaths = 0
                        self._answered(key)
            case Failed():
                stream = self._streams.get(message.key)
                if stream is not None:
                    log.warning("a grammar cannot be held any further: %s", message.message)
                    self._failed[stream.slot] = True
                    self._answered(message.key)
            case _:
                pass

    def _answered(self, key: int) -> None:
        """No answer for `key` is due any more."""
        self._owed.pop(key, None)
        self._pause_s = RESTART_S[0]
        if self._suspects and self._suspects[0] == key:
            self._suspects.popleft()
            self._open_suspect()

    def _look(self) -> None:
        """End a process that hangs."""
        if not self._owed or self._process is None:
            return
        limit = HANG_S if self._process.is_ready else LOAD_S
        oldest = next(iter(self._owed.values()))
        if self._clock() - max(oldest, self._process.ready_at) > limit:
            self._process.close()
            self._lost(f"has not answered for {limit:.0f} s")

    def _lost(self, why: str) -> None:
        log.warning(
            "the matcher process %s; %d requests with grammars go on with a new one",
            why,
            len(self._streams),
        )
        if self._process is not None:
            was_ready = self._process.is_ready
            self._process.close()
            self._process = None
            self._failed_starts = 0 if was_ready else self._failed_starts + 1
            if was_ready:
                self._blame()
            elif self._failed_starts >= MAX_FAILED_STARTS:
                self._give_up()
        self._mask_at[:] = -1
        self._forced[:] = NO_TOKEN
        for stream in self._streams.values():
            stream.forced = []
        self._next_start = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, RESTART_S[1])

    def _blame(self) -> None:
        """Whatever the process worked for may be what ended it. Which of several it was shows when
        they are opened one by one."""
        alone = len(self._owed) == 1 or bool(self._suspects)
        blamed = [self._suspects[0]] if self._suspects else list(self._owed)
        for key in blamed:
            stream = self._streams.get(key)
            if stream is None:
                continue
            stream.deaths += alone
            stream.died_at = len(stream.output)
            if stream.deaths >= MAX_DEATHS:
                log.error("a grammar has ended %d matcher processes; it is given up", stream.deaths)
                self._failed[stream.slot] = True
                if self._suspects:
                    self._suspects.popleft()
            elif key not in self._suspects:
                self._suspects.append(key)

    def _give_up(self) -> None:
        log.error(
            "%d matcher processes could not start; requests with grammars fail", self._failed_starts
        )
        for stream in self._streams.values():
            self._failed[stream.slot] = True

    def _restart(self) -> None:
        """A new process, with every stream as it is."""
        if self._clock() < self._next_start:
            return
        self._process = self._start_process(self._start)
        self._owed.clear()
        self._suspects = deque(key for key in self._suspects if key in self._streams)
        for stream in list(self._streams.values()):
            if stream.key not in self._suspects and not self._failed[stream.slot]:
                self._open(stream)
        self._open_suspect()

    def _open_suspect(self) -> None:
        while self._suspects and self._suspects[0] not in self._streams:
            self._suspects.popleft()
        if self._suspects and self._process is not None:
            self._open(self._streams[self._suspects[0]])

    def _open(self, stream: Stream) -> None:
        assert self._process is not None
        output = np.array(stream.output, np.int32).tobytes()
        self._owed.setdefault(stream.key, self._clock())
        self._process.send(Open(stream.key, stream.slot, stream.grammar, output))


def _forced_runs(message: Masks, rows: int) -> list[list[int]]:
    """The forced run of each row."""
    if not message.forced_counts:
        return [[] for _ in range(rows)]
    counts = np.frombuffer(message.forced_counts, np.int32)
    tokens = np.frombuffer(message.forced_tokens, np.int32)
    return [run.tolist() for run in np.split(tokens, np.cumsum(counts)[:-1])]
