"""Which tokens the grammars of a worker's slots allow next: the worker's side of its matcher
processes (grammar/). Knows no tensors and no model.

Each admission is a stream with a key of its own. A matcher is told the stream's tokens as they are
sampled, and answers with the mask for the next one; a mask is used for that stream and that
position and for nothing else. Where a grammar leaves a single token, the answer brings it, and
further ones after it: a forced run, behind which the mask is. A row whose mask is not there when it
would be sampled brings no token, and nobody else waits for it.

Masks for many rows take longer than a forward pass. So where there are processors enough, a matcher
that has many streams gets another one beside it, and streams are spread over those that are ready.
"""

import heapq
import os
import time
from collections.abc import Callable
from typing import Final

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from pagewire_protocol.grammar import Grammar
from pagewire_protocol.messages import Step

from ...config import ModelConfig
from ...grammar.child import MatcherProcess, wait_for_any
from ...grammar.messages import Start, mask_words
from .matcher import Ints, Keys, Matcher, Stream, key_for, slots_of

WAIT_S: Final = 0.005
"""How long the rows of a step that need no mask may be held up by those that do."""
LOOK_S: Final = 0.0002
"""Between two looks at whether a step is computed."""
WAIT_ALONE_S: Final = 0.05
"""The same of a step in which every row needs one."""
WAIT_RUNS_S: Final = 0.001
"""How long a step in which every row has a grammar waits for its forced runs before it is
computed."""
CROWDED: Final = 16
"""Streams of each matcher from which on there are more of them. One takes some 0.05 ms for a
mask."""
MAX_MATCHERS: Final = 16
CORES_A_MATCHER: Final = 2
"""Processors that there must be for each."""
NO_KEY: Final = 0
NO_TOKEN: Final = -1

Bools = NDArray[np.bool_]


class GrammarMasks:
    """Of `count` slots of a model with `vocab_size` tokens that ends at `eos`. Without a request
    that has a grammar there is no process, and nothing costs anything."""

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
        self._max_matchers = max_matchers()
        self._matchers = [self._new_matcher()]
        self._num_ready = 0
        """Matchers that were ready when streams were last spread."""
        self._streams: dict[int, Stream] = {}
        """By slot."""
        self._key_of = np.full(count, NO_KEY, np.uint64)
        """By slot: the key of its stream."""
        self._num_output = np.zeros(count, np.int64)
        """By slot: output tokens of its stream."""
        self._mask_at = np.full(count, -1, np.int64)
        """By slot: the output position that the slot's mask is for; -1: it has none."""
        self._forced = np.full(count, NO_TOKEN, np.int64)
        """By slot: the first token of the forced run at that position; NO_TOKEN: there is none, and
        the mask is what the matcher has written."""
        self._matcher_at = np.zeros(count, np.int64)
        """By slot: the index of its stream's matcher."""
        self._failed = np.zeros(count, np.bool_)
        self._mirror: NDArray[np.uint32] | None = None
        self._mirror_row = np.zeros(count, np.int64)
        """By slot."""
        self._free_rows = list(range(count))
        """Of the mirror; a heap."""
        self._admissions = 0

    def _new_matcher(self) -> Matcher:
        return Matcher(
            self._start,
            self._clock,
            lambda start: self._start_process(start),
            self._on_masks,
            self._fail,
            self._lose,
        )

    # --- the slots' requests ---

    def admit(self, slot: int, grammar: Grammar | None, output: NDArray[np.int32]) -> None:
        """`slot` holds a new request, with the output so far."""
        self.retire(slot)
        if grammar is None:
            return
        self._admissions += 1
        stream = Stream(key_for(slot, self._admissions), slot, grammar, output.tolist())
        self._streams[slot] = stream
        self._key_of[slot] = stream.key
        self._num_output[slot] = len(output)
        self._mirror_row[slot] = heapq.heappop(self._free_rows)
        self._match(stream)

    def retire(self, slot: int) -> None:
        """The slot's request is over."""
        stream = self._streams.pop(slot, None)
        if stream is None:
            return
        heapq.heappush(self._free_rows, int(self._mirror_row[slot]))
        self._key_of[slot] = NO_KEY
        self._mask_at[slot] = -1
        self._forced[slot] = NO_TOKEN
        self._failed[slot] = False
        if stream.matcher is not None:
            stream.matcher.remove(stream)

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
        for slot in list(self._streams):
            self.retire(slot)

    def close(self) -> None:
        """End the processes."""
        for matcher in self._matchers:
            matcher.close()

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
        slots = slots_of(keys)
        wanted = (self._key_of[slots] == keys) & (keys != NO_KEY)
        forced = wanted & (self._forced[slots] != NO_TOKEN)
        for row in np.flatnonzero(forced).tolist():
            self._say_forced(self._streams[int(slots[row])], int(tokens[row]))
        rows = np.flatnonzero(wanted & ~forced)
        keys, slots, tokens = keys[rows], slots[rows], tokens[rows]
        self._mask_at[slots] = -1
        self._num_output[slots] += 1
        at = np.where(self._failed[slots], -1, self._matcher_at[slots])
        for i, matcher in enumerate(self._matchers):
            own = np.flatnonzero(at == i)
            if len(own):
                matcher.advance(keys[own], tokens[own])
        # While the matchers compute.
        for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
            self._streams[slot].output.append(token)

    def _say_forced(self, stream: Stream, token: int) -> None:
        """`token` was sampled where there is a forced run, so that it is its first one; any other
        comes of logits that were not finite."""
        stream.output.append(token)
        self._num_output[stream.slot] += 1
        if token == stream.forced.pop(0):
            self._at_forced(stream)
        else:
            self._lose([stream])
            if stream.matcher is not None:
                stream.matcher.open(stream)

    def _at_forced(self, stream: Stream) -> None:
        """The next position of `stream` has a mask, by what is left of its forced run or behind
        it."""
        self._mask_at[stream.slot] = self._num_output[stream.slot] = len(stream.output)
        self._forced[stream.slot] = stream.forced[0] if stream.forced else NO_TOKEN

    # --- forced runs ---

    def allow_runs(self, most: int) -> int:
        """Before the first request: runs have `most` tokens at most. Returns how many they will
        have; 0: there will be none."""
        self._start = replace(self._start, max_forced=most)
        self._matchers = [self._new_matcher()]
        return most

    def take_runs(self, slots: Ints, most: Ints) -> list[list[int]]:
        """Of each of `slots` [R], the forced run that follows its output, as far as it is known,
        and at most most[i] tokens of it. From now on these are output."""
        self._receive()
        if self.concerns(slots).all():
            end = self._clock() + WAIT_RUNS_S
            while self._awaits_any(slots) and (left := end - self._clock()) > 0:
                self._wait(left)
        runs: list[list[int]] = []
        for slot, limit in zip(slots.tolist(), most.tolist(), strict=True):
            if self._forced[slot] == NO_TOKEN or limit <= 0:
                runs.append([])
                continue
            stream = self._streams[slot]
            runs.append(stream.forced[:limit])
            stream.output += runs[-1]
            del stream.forced[:limit]
            self._at_forced(stream)
        return runs

    def _awaits_any(self, slots: Ints) -> bool:
        return bool(((self._mask_at[slots] < 0) & ~self._failed[slots]).any())

    # --- masks ---

    def _on_masks(
        self, matcher: Matcher, keys: Keys, positions: Ints, runs: list[list[int]] | None
    ) -> Keys:
        """`matcher` has written masks of the streams `keys` [R]. Those that have another matcher by
        now, or other tokens, have no use for them."""
        slots = slots_of(keys)
        known = self._num_output[slots]
        if runs is not None:
            known = known + [len(run) for run in runs]
        at = self._matchers.index(matcher)
        current = (
            (self._key_of[slots] == keys) & (self._matcher_at[slots] == at) & (known == positions)
        )
        slots = slots[current]
        if self._mirror is not None and matcher.process is not None:
            self._write_mirror(slots, matcher.process.masks[slots])
        if runs is None:
            self._mask_at[slots] = positions[current]
            return keys[current]
        for slot, row in zip(slots.tolist(), np.flatnonzero(current).tolist(), strict=True):
            stream = self._streams[slot]
            stream.forced = runs[row]
            self._at_forced(stream)
        return keys[current]

    def ready(
        self, slots: Ints, positions: Ints, computed: Callable[[], bool] | None = None
    ) -> Bools:
        """[R]: which of `slots` [R] can be sampled at the output positions `positions` [R]: those
        without a grammar, and those whose masks are there. Waits a little for the others; where
        some rows need no mask, only until the step's logits are `computed`, and where all do, no
        longer from then on than it is worth."""
        concerned = self.concerns(slots)
        if not concerned.any():
            return np.ones(len(slots), np.bool_)
        alone = bool(concerned.all())
        began = self._clock()
        end = began + (WAIT_ALONE_S if alone else WAIT_S)
        computed_at = 0.0
        self._receive()
        while True:
            there = ~concerned | (self._mask_at[slots] == positions) | self._failed[slots]
            now = self._clock()
            left = end - now
            if there.all() or left <= 0:
                return there
            if computed is None:
                self._wait(left)
                continue
            if computed_at or computed():
                if not alone:
                    return there
                computed_at = computed_at or now
                end = min(end, computed_at + self._worth_s(there, computed_at - began))
            self._wait(max(0.0, min(left, LOOK_S)))

    def _worth_s(self, there: Bools, computing_s: float) -> float:
        """How long a step that took `computing_s` waits for the masks of rows that are not `there`
        yet: as long as it would take to compute so many of its rows again. For all of them, as long
        as one may."""
        if not there.any():
            return WAIT_ALONE_S
        return float(np.mean(~there)) * max(computing_s, LOOK_S)

    def failed(self, slots: Ints) -> Bools:
        """[R]: which of `slots` [R] can have no token: their grammars are too costly, or no token
        continues their texts."""
        return self._failed[slots]

    def rows(self, slots: Ints) -> NDArray[np.uint32]:
        """[R, words]: the masks of `slots` [R], all of which are ready: bit i % 32 of word i // 32
        is set where token i may come."""
        masks = np.zeros((len(slots), mask_words(self._start.vocab_size)), np.uint32)
        at = self._matcher_at[slots]
        for i, matcher in enumerate(self._matchers):
            own = np.flatnonzero(at == i)
            if len(own) and matcher.process is not None:
                masks[own] = matcher.process.masks[slots[own]]
        for row in np.flatnonzero(self._forced[slots] != NO_TOKEN).tolist():
            word, bit = divmod(int(self._forced[slots[row]]), 32)
            masks[row] = 0
            masks[row, word] = 1 << bit
        return masks

    def mirror(self, words: NDArray[np.uint32]) -> None:
        """Before the first request, and where there are no forced runs: each mask is written to
        `words` [slots, words] too, as soon as it comes. A row is written no more from when its mask
        is ready until a token has been said, or the request is over."""
        self._mirror = words

    def mirror_rows(self, slots: Ints) -> Ints:
        """[R]: where in there the masks of `slots` [R] are: in the lowest rows that were free when
        they were admitted."""
        return self._mirror_row[slots]

    def _write_mirror(self, slots: Ints, masks: NDArray[np.uint32]) -> None:
        if self._mirror is not None:
            self._mirror[self._mirror_row[slots]] = masks

    # --- the matchers ---

    def _match(self, stream: Stream) -> None:
        """By the least busy matcher that is ready; by the first one where none is."""
        self._hand(stream, self._ready_matchers() or self._matchers[:1])
        wanted = min(self._max_matchers, -(-len(self._streams) // CROWDED))
        while len(self._matchers) < wanted:
            self._matchers.append(self._new_matcher())
        for matcher in self._matchers[:wanted]:
            if matcher.process is None:  # it may have ended while it had no streams
                matcher.restart()

    def _ready_matchers(self) -> list[Matcher]:
        return [matcher for matcher in self._matchers if matcher.is_ready]

    def _wait(self, seconds: float) -> None:
        """So long, or until something arrives, which is then taken."""
        matcher_of = {m.process: m for m in self._matchers if m.process is not None}
        if matcher_of:
            for process in wait_for_any(list(matcher_of), seconds):
                matcher_of[process].receive()
            return
        due = min(matcher.next_start for matcher in self._matchers)
        self._sleep(min(seconds, max(0.0, due - self._clock())))
        self._receive()

    def _receive(self) -> None:
        for matcher in self._matchers:
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
                self._lose([stream])
                self._hand(stream, ready)

    def _hand(self, stream: Stream, matchers: list[Matcher]) -> None:
        """To the least busy of `matchers`."""
        least = min(matchers, key=lambda matcher: len(matcher.streams))
        self._matcher_at[stream.slot] = self._matchers.index(least)
        least.add(stream)

    def _fail(self, stream: Stream) -> None:
        self._failed[stream.slot] = True

    def _lose(self, streams: list[Stream]) -> None:
        """Their masks and forced runs are gone."""
        for stream in streams:
            stream.forced = []
            self._mask_at[stream.slot] = -1
            self._forced[stream.slot] = NO_TOKEN


def max_matchers() -> int:
    """Of a worker, on this machine."""
    return max(1, min(MAX_MATCHERS, len(os.sched_getaffinity(0)) // CORES_A_MATCHER))
