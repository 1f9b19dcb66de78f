"""Which tokens the grammars of a worker's slots allow next: the worker's side of its matcher
processes (grammar/). Knows no tensors and no model.

Each admission is a stream with a key of its own. A matcher is told the stream's tokens as they are
sampled, each once the mask that it was sampled under is there, by this process or by the device that
has sampled it, and answers with the mask for the next one; a mask is used for that stream and that
position and for nothing else. Where a grammar
leaves a single token, the answer brings it, and further ones after it: a forced run, behind which
the mask is. A row whose mask is not there when it would be sampled brings no token, and nobody else
waits for it.
"""

import time
from collections.abc import Callable
from typing import Final

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from pagewire_protocol.grammar import Grammar
from pagewire_protocol.messages import Step

from ...config import ModelConfig
from ...grammar.child import MatcherProcess
from ...grammar.messages import Start
from ...grammar.shared import NO_POSITION, SharedMasks, tag_of
from .mask_mirror import MaskMirror
from .matched_stream import Ints, Keys, Stream, key_for, slots_of
from .matcher import StartProcess
from .matcher_pool import MatcherPool

WAIT_S: Final = 0.005
"""How long the rows of a step that need no mask may be held up by those that do."""
WAIT_ALONE_S: Final = 0.05
"""The same of a step in which every row needs one."""
LOOK_S: Final = 0.00005
"""At least between two looks at masks, and at whether a step is computed."""
LOOKS: Final = 24
"""In as long as has been waited."""
LOOK_EVERY_S: Final = 0.005
"""How often it is looked at masks and processes that nobody waits for."""
WAIT_RUNS_S: Final = 0.001
"""How long a step in which every row has a grammar waits for its forced runs before it is
computed."""
SLOW_S: Final = 0.01
"""After which a mask that is due is not expected any moment."""
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
        start_process: StartProcess = MatcherProcess,
    ) -> None:
        self._start = Start(model, vocab_size, eos)
        self._clock = clock
        self._pool = MatcherPool(
            count, self._start, clock, sleep, start_process, self._fail, self._lose
        )
        self._streams: dict[int, Stream] = {}
        """By slot."""
        self._key_of = np.full(count, NO_KEY, np.uint64)
        """By slot: the key of its stream."""
        self._num_output = np.zeros(count, np.int64)
        """By slot: output tokens of its stream."""
        self._mask_at = np.full(count, -1, np.int64)
        """By slot: the output position that the slot's mask is for; -1: it has none."""
        self._awaiting = np.zeros(count, np.bool_)
        """By slot: a mask has yet to come."""
        self._forced = np.full(count, NO_TOKEN, np.int64)
        """By slot: the first token of the forced run at that position; NO_TOKEN: there is none, and
        the mask is what the matcher has written."""
        self._failed = np.zeros(count, np.bool_)
        self.mirror = MaskMirror(count)
        self._admissions = 0
        self._next_look = 0.0

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
        self.mirror.take(slot)
        self._match(stream)

    def retire(self, slot: int) -> None:
        """The slot's request is over."""
        stream = self._streams.pop(slot, None)
        if stream is None:
            return
        self.mirror.give_back(slot)
        self._key_of[slot] = NO_KEY
        self._awaiting[slot] = False
        self._mask_at[slot] = -1
        self._forced[slot] = NO_TOKEN
        self._failed[slot] = False
        self._pool.remove(stream)

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
        self._pool.close()

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

    def append(
        self,
        keys: Keys,
        tokens: NDArray[np.int32],
        openings: NDArray[np.uint64] | None = None,
        by_device: Bools | None = None,
    ) -> None:
        """`tokens` [R] were sampled for the streams `keys` [R]; those that are over are passed
        over. openings [R]: as what their matchers knew the streams when the step was launched; None:
        as they do now. by_device [R]: a device has told the matchers these tokens, if they still know
        the streams so; None: none of them."""
        slots = slots_of(keys)
        wanted = (self._key_of[slots] == keys) & (keys != NO_KEY)
        known = self._pool.openings(slots)
        stayed = np.ones(len(keys), np.bool_) if openings is None else openings == known
        told = np.zeros(len(keys), np.bool_)
        if by_device is not None:
            told = by_device & stayed & (known != 0)
        if not told.all():
            self._take()  # a device may have taken masks that nobody has looked at here
        forced = wanted & (self._forced[slots] != NO_TOKEN)
        for row in np.flatnonzero(forced).tolist():
            self._say_forced(self._streams[int(slots[row])], int(tokens[row]))
        rows = np.flatnonzero(wanted & ~forced)
        slots, tokens = slots[rows], tokens[rows]
        positions = self._num_output[slots]
        held = ~self._failed[slots]
        is_told = held & told[rows]
        # Of one that was lost meanwhile, the matcher has yet to hear all of its output. So has that of
        # one that has gone elsewhere: there, steps under way may still tell what they sample for the
        # stream that had the place before.
        to_tell = held & ~is_told & stayed[rows] & (self._mask_at[slots] == positions)
        self._mask_at[slots] = -1
        self._num_output[slots] += 1
        self._awaiting[slots] = held
        self._pool.tell(slots[to_tell], positions[to_tell], tokens[to_tell])
        self._pool.told(slots[is_told])
        # While the matchers compute.
        for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
            self._streams[slot].output.append(token)
        self._open_again(slots[held & ~to_tell & ~is_told])

    def _open_again(self, slots: Ints) -> None:
        """Their matchers hear all of the output once more."""
        for slot in slots.tolist():
            self._pool.open_again(self._streams[slot])

    def _say_forced(self, stream: Stream, token: int) -> None:
        """`token` was sampled where there is a forced run, so that it is its first one; any other
        comes of logits that were not finite."""
        stream.output.append(token)
        self._num_output[stream.slot] += 1
        if token == stream.forced.pop(0):
            self._at_forced(stream)
        else:
            self._lose([stream])
            self._pool.open_again(stream)

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
        self._pool.restart_with(self._start)
        return most

    def take_runs(self, slots: Ints, most: Ints) -> list[list[int]]:
        """Of each of `slots` [R], the forced run that follows its output, as far as it is known,
        and at most most[i] tokens of it. From now on these are output."""
        self._receive()
        if self.concerns(slots).all():
            end = self._clock() + WAIT_RUNS_S
            while self._awaiting[slots].any() and (left := end - self._clock()) > 0:
                self._wait(min(left, LOOK_S))
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

    # --- masks ---

    @property
    def shared(self) -> SharedMasks:
        """What matcher processes write masks to."""
        return self._pool.shared

    def let_device_tell(self) -> None:
        """Before the first request: a device writes the tokens that it samples to `shared`, so that
        their matchers have them before anybody here."""
        self._pool.let_device_tell()

    def openings(self, slots: Ints) -> NDArray[np.uint64]:
        """[R]: as what the matchers of `slots` [R] know their streams now; 0: none does."""
        return self._pool.openings(slots)

    @property
    def version(self) -> int:
        """Another number whenever `tags` of some slot may have changed."""
        return self._pool.version

    def tags(self, slots: Ints) -> tuple[Ints, Ints, Ints]:
        """Three int64 [R], of `slots` [R]: what their masks' tags begin with, and the addresses of
        these tags and masks; an address is 0 where no matcher has the stream now."""
        places, openings = self._pool.place_of[slots], self._pool.openings(slots)
        shared = self._pool.shared
        has = (places >= 0) & (openings != 0)
        keys = tag_of(openings, np.full(len(slots), NO_POSITION)).view(np.int64)
        places = np.maximum(places, 0)
        return keys, np.where(has, shared.tag_addresses(places), 0), shared.mask_addresses(places)

    def look_at_times(self) -> None:
        """`look`, if nobody has looked for a while."""
        if self._clock() >= self._next_look:
            self.look()

    def look(self) -> None:
        """Take the masks that are there and what matchers have said; end those that hang. Masks
        first: what a process that has ended did not come to may be what ended it."""
        self._next_look = self._clock() + LOOK_EVERY_S
        self._take()
        self._receive()

    def are_slow(self, slots: Ints) -> bool:
        """Whether none of `slots` [R], of which each waits for a mask, is likely to have one soon."""
        return bool((self._pool.owed_since(slots) < self._clock() - SLOW_S).all())

    def _receive(self) -> None:
        self._pool.receive()
        self._take()
        if self._pool.is_look_due:
            self._pool.look()

    def _wait(self, seconds: float) -> None:
        self._pool.wait(seconds)
        self._take()

    def _take(self) -> None:
        """The masks that have come."""
        slots = np.flatnonzero(self._awaiting)
        if not len(slots):
            return
        positions = self._pool.positions(slots)
        known = self._num_output[slots]
        if self._start.max_forced:
            known = known + self._pool.num_forced(slots)
        ahead = positions > known  # by a token that a device has told, and nobody here yet
        if ahead.any():
            self._pool.answered(slots[ahead], self._streams.__getitem__)
        current = positions == known
        slots, positions = slots[current], positions[current]
        if not len(slots):
            return
        if self.mirror.words is not None:
            self.mirror.write(slots, self._pool.masks(slots))
        self._mask_at[slots] = positions
        self._awaiting[slots] = False
        if self._start.max_forced:
            for slot in slots[self._pool.num_forced(slots) > 0].tolist():
                stream = self._streams[slot]
                stream.forced = self._pool.forced(slot)
                self._at_forced(stream)
        self._pool.answered(slots, self._streams.__getitem__)

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
            if computed is not None and (computed_at or computed()):
                if not alone:
                    return there
                computed_at = computed_at or now
                end = min(end, computed_at + self._worth_s(there, computed_at - began))
            self._wait(max(0.0, min(left, max(LOOK_S, (now - began) / LOOKS))))

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
        masks = self._pool.masks(slots)
        for row in np.flatnonzero(self._forced[slots] != NO_TOKEN).tolist():
            word, bit = divmod(int(self._forced[slots[row]]), 32)
            masks[row] = 0
            masks[row, word] = 1 << bit
        return masks

    # --- what becomes of streams ---

    def _match(self, stream: Stream) -> None:
        self._awaiting[stream.slot] = True
        self._pool.match(stream, len(self._streams))

    def _fail(self, stream: Stream) -> None:
        self._failed[stream.slot] = True
        self._awaiting[stream.slot] = False

    def _lose(self, streams: list[Stream]) -> None:
        """Their masks and forced runs are gone."""
        for stream in streams:
            stream.forced = []
            self._mask_at[stream.slot] = -1
            self._awaiting[stream.slot] = not self._failed[stream.slot]
            self._forced[stream.slot] = NO_TOKEN
