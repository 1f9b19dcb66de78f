"""Masks of grammars, with a stand-in for the matcher process: whose mask is used for which row and
position, whatever happens to rows and processes."""

import itertools
from random import Random

import numpy as np
import pytest
import torch
from pagewire.config import ModelConfig, SchedulerConfig, WorkerConfig
from pagewire.grammar.messages import Close, FromMatcher, Start, ToMatcher
from pagewire.grammar.shared import NO_POSITION, SharedMasks, tag_of
from pagewire.worker.fake import FakeRunner, chain
from pagewire.worker.step import grammar_masks, matcher_pool
from pagewire.worker.step.forced_runs import MAX_RUN
from pagewire.worker.step.logit_constraints import Constraints
from pagewire.worker.step.matcher import HANG_S, MAX_FAILED_STARTS
from pagewire.worker.step.slots import Slots
from pagewire_protocol.agreed import GRAMMAR_FAILED
from pagewire_protocol.grammar import Grammar
from pagewire_protocol.messages import Admission, Step, pack, unpack
from pagewire_protocol.sampling import Sampling
from worker.stand_in_matcher import Room, StandIn, allowed, grammar

SLOTS, VOCAB = 6, 97
TOLD = np.ones(1, np.bool_)
"""Of one token: a device has told it."""


class Request:
    """What a test knows of one that a slot holds."""

    def __init__(self, source: str | None, prompt: list[int]) -> None:
        self.source = source
        self.prompt = prompt
        self.output: list[int] = []

    @property
    def grammar(self) -> Grammar | None:
        return None if self.source is None else grammar(self.source)


class Bench:
    """A fake worker whose requests come and go."""

    def __init__(self, seed: int, late: float = 0.0, max_run: int = 0, blocks: int = 99) -> None:
        """blocks: of 16 tokens, that each request comes with."""
        self.blocks = blocks
        self.random = Random(seed)
        self.room = Room(SLOTS, VOCAB, late, seed)
        config = WorkerConfig(device="fake", fake_vocab_size=VOCAB)
        self.runner = FakeRunner(ModelConfig(), SchedulerConfig(max_num_seqs=SLOTS), config)
        self.runner._masks = self.room.masks
        self.runner._max_run = self.room.masks.allow_runs(max_run)
        self.slots: dict[int, Request] = {}
        self.over: list[Request] = []
        self.resumed: list[Request] = []
        self.n = 0
        self.empty = 0

    def step(
        self,
        retire: list[int] = [],  # noqa: B006
        admit: dict[int, Request] | None = None,
        grow: list[int] = [],  # noqa: B006
    ) -> None:
        """All slots compute one token, new ones their prompts. The slots `grow` get a block."""
        for slot in retire:
            self.slots.pop(slot)
        admit = admit or {}
        self.slots.update(admit)
        run = sorted(self.slots)
        counts = []
        for slot in run:
            request = self.slots[slot]
            counts.append(len(request.prompt) + len(request.output) if slot in admit else 1)
        self.n += 1
        admissions = [
            Admission(
                slot,
                self.n,
                pack("i", request.prompt),
                pack("i", request.output),
                pack("i", range(self.blocks)),
                0,
                Sampling(seed=0, max_tokens=99),
                grammar=request.grammar,
            )
            for slot, request in admit.items()
        ]
        result = self.runner.execute(
            Step(
                1,
                self.n,
                retire=pack("i", retire),
                admit=tuple(admissions),
                grow_slots=pack("i", grow),
                grow_blocks=pack("i", [99] * len(grow)),
                run_slots=pack("i", run),
                run_counts=pack("i", counts),
            )
        )
        self._take(result)

    def _take(self, result) -> None:
        slots = unpack("i", result.slots).tolist()
        brought = unpack("i", result.counts).tolist() if result.counts else [1] * len(slots)
        tokens = iter(unpack("i", result.tokens).tolist())
        for slot, count, flag in zip(slots, brought, result.flags, strict=True):
            request = self.slots[slot]
            assert count <= 1 + self.runner._max_run
            if not count:
                self.empty += 1
            if count != 1:
                assert request.source is not None, "a row without a grammar waits for nobody"
            for token in itertools.islice(tokens, count):
                if flag:
                    assert flag == GRAMMAR_FAILED
                    continue
                if request.source is not None:
                    wanted = allowed(request.source, request.output, VOCAB)
                    assert token in wanted, (slot, request.source, request.output, token, wanted)
                request.output.append(token)

    def new(self) -> Request:
        source = self.random.choice([None, *"abcdEFGH"])
        return Request(source, [self.random.randrange(VOCAB) for _ in range(1 + self.n % 5)])

    def random_step(self, deaths: float) -> None:
        """Some requests end, some are preempted and come back, perhaps elsewhere, new ones come."""
        retire = [slot for slot in self.slots if self.random.random() < 0.15]
        for slot in retire:
            fate = self.over if self.random.random() < 0.5 else self.resumed
            fate.append(self.slots[slot])
        free = [slot for slot in range(SLOTS) if slot not in self.slots or slot in retire]
        admit: dict[int, Request] = {}
        for slot in free:
            if self.random.random() < 0.6:
                again = self.resumed and self.random.random() < 0.5
                admit[slot] = self.resumed.pop(0) if again else self.new()
        if self.random.random() < deaths:
            self.room.kill()
        if self.random.random() < 0.02:
            self.over += [r for slot, r in self.slots.items() if slot not in retire]
            self.slots.clear()
            self.runner.clear()
            return
        self.step(retire, admit)


@pytest.fixture(
    params=[(1, SLOTS), (3, SLOTS), (3, SLOTS // 3)],
    ids=["one matcher", "up to three", "up to three without a place to spare"],
)
def matchers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Another one for each two streams, as far as so many."""
    most, places = request.param
    monkeypatch.setattr(matcher_pool, "CROWDED", 2)
    monkeypatch.setattr(matcher_pool, "max_matchers", lambda: most)
    monkeypatch.setattr(matcher_pool, "num_places", lambda *_: places)
    return most


@pytest.mark.parametrize("late", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("deaths", [0.0, 0.1])
@pytest.mark.parametrize("max_run", [0, 2, MAX_RUN])
def test_a_mask_is_never_applied_to_another_row_or_position(
    late: float, deaths: float, max_run: int, matchers: int
) -> None:
    constrained = free = 0
    for seed in range(3):
        bench = Bench(seed, late, max_run)
        for _ in range(120):
            bench.random_step(deaths)
        for request in [*bench.over, *bench.resumed, *bench.slots.values()]:
            if request.source is None:
                free += len(request.output)
                assert request.output == chain(request.prompt, len(request.output), VOCAB)
            else:
                constrained += len(request.output)
    assert free > 100 and constrained > 20


def crowded_bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Three matchers are ready, one for each two streams, and all slots have one."""
    monkeypatch.setattr(matcher_pool, "CROWDED", 2)
    monkeypatch.setattr(matcher_pool, "max_matchers", lambda: 3)
    bench = Bench(0)
    bench.step(admit={slot: Request("abcdef"[slot], [slot]) for slot in range(SLOTS)})
    for _ in range(3):
        bench.step()
    return bench


def counts_of(bench: Bench) -> list[int]:
    """Streams of each matcher."""
    return [len(matcher.streams) for matcher in bench.room.masks._pool.matchers]


def test_streams_are_spread_over_matchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as another one is ready; those that were there as well."""
    bench = crowded_bench(monkeypatch)
    assert len(bench.room.processes) == 3 and counts_of(bench) == [2, 2, 2]
    bench.step(retire=list(range(SLOTS)))
    assert counts_of(bench) == [0, 0, 0]


def test_few_streams_wake_few_matchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there have been before."""
    bench = crowded_bench(monkeypatch)
    bench.step(retire=list(range(SLOTS)))
    for slot, counts in enumerate(([1, 0, 0], [2, 0, 0], [2, 1, 0], [2, 2, 0], [2, 2, 1])):
        bench.step(admit={slot: Request("abcdef"[slot], [slot])})
        assert counts_of(bench) == counts
    bench.step(retire=[0, 1])
    bench.step(admit={0: Request("a", [0])})
    assert counts_of(bench) == [1, 2, 1]


def test_few_streams_stay_where_they_are_when_one_more_matcher_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = crowded_bench(monkeypatch)
    bench.step(retire=list(range(SLOTS)))
    bench.step(admit={slot: Request("abcdef"[slot], [slot]) for slot in range(3)})
    pool = bench.room.masks._pool
    openings = pool._opening_of.copy()
    pool._num_ready = 2  # as if one had ended and is back
    pool.receive()
    assert counts_of(bench) == [2, 1, 0]
    assert (pool._opening_of == openings).all()


def test_streams_are_not_handed_to_a_matcher_that_is_held_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matcher_pool, "CROWDED", 2)
    monkeypatch.setattr(matcher_pool, "max_matchers", lambda: 3)
    room = Room(SLOTS, VOCAB)
    for slot in range(SLOTS):
        room.masks.admit(slot, grammar("a"), np.zeros(0, np.int32))
    every, none = np.arange(SLOTS), np.zeros(SLOTS, np.int64)
    while not room.masks.ready(every, none).all():
        pass
    for slot in range(SLOTS):
        room.masks.retire(slot)
    matchers = room.masks._pool.matchers
    matchers[0].process.receive = list  # works at one mask for long
    room.masks.admit(0, grammar("a"), np.zeros(0, np.int32))
    room.clock.now += 1.0
    for slot in (1, 2, 3):
        room.masks.admit(slot, grammar("a"), np.zeros(0, np.int32))
    assert [len(matcher.streams) for matcher in matchers] == [1, 2, 1]
    assert room.masks.ready(every[1:4], none[1:4]).all()


class Busy(StandIn):
    """Says and hears nothing while it `is_held`, as one that computes; but what it works for is
    written."""

    def __init__(self, start: Start, shared: SharedMasks) -> None:
        super().__init__(start, shared)
        self.is_held = True

    def send(self, message: ToMatcher) -> None:
        if not (self.is_held and isinstance(message, Close)):
            super().send(message)

    def receive(self) -> list[FromMatcher]:
        return [] if self.is_held else super().receive()

    def finish(self) -> None:
        """What it works for is done: it has not been told of anything since."""
        super().receive()


def test_the_answer_of_a_matcher_that_a_stream_has_left_is_of_no_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was under way. The mask is in that matcher's memory, which nobody reads any more."""
    monkeypatch.setattr(matcher_pool, "CROWDED", 2)
    monkeypatch.setattr(matcher_pool, "max_matchers", lambda: 2)
    room = Room(SLOTS, VOCAB)
    processes: list[Busy] = []
    room.masks._pool.start_process = lambda *given: processes.append(Busy(*given)) or processes[-1]
    for slot in range(4):
        room.masks.admit(slot, grammar("abcd"[slot]), np.zeros(0, np.int32))
    rows = np.arange(4), np.zeros(4, np.int64)
    assert not room.masks.ready(*rows).any()
    assert [sorted(s.slot for s in m.streams.values()) for m in room.masks._pool.matchers] == [
        [1, 2],
        [0, 3],
    ]
    processes[0].finish()  # it has not heard that the streams of 0 and 3 have left
    assert room.masks.ready(*rows).tolist() == [False, True, True, False]
    processes[1].is_held = False
    assert room.masks.ready(*rows).all()
    processes[0].finish()
    for slot, mask in enumerate(room.masks.rows(rows[0])):
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert np.flatnonzero(bits).tolist() == allowed("abcd"[slot], [], VOCAB)


# --- places ---


def mask_of(room: Room, slot: int) -> list[int]:
    """The tokens that it allows."""
    mask = room.masks.rows(np.array([slot]))[0]
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def admit(room: Room, source_of: dict[int, str]) -> None:
    for slot, source in source_of.items():
        room.masks.admit(slot, grammar(source), np.zeros(0, np.int32))


def test_a_place_is_given_back_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher_pool, "max_matchers", lambda: 1)
    room = Room(SLOTS, VOCAB)
    pool = room.masks._pool
    admit(room, {5: "a", 0: "b", 3: "c"})
    assert pool.place_of.tolist() == [1, -1, -1, 2, -1, 0]
    assert (pool.openings(np.arange(SLOTS)) > 0).tolist() == (pool.place_of >= 0).tolist()
    room.masks.retire(0)
    assert pool.openings(np.array([0])) == 0
    for _ in range(3 * SLOTS):  # more often than there are places
        admit(room, {1: "d"})
        assert pool.place_of.tolist() == [-1, 1, -1, 2, -1, 0]
        rows = np.array([1, 3, 5])
        assert room.masks.ready(rows, np.zeros(3, np.int64)).all()
        assert [mask_of(room, slot) for slot in rows] == [allowed(s, [], VOCAB) for s in "dca"]
    room.masks.clear()
    assert (pool.place_of == -1).all() and not pool.matchers[0].is_full
    admit(room, dict(enumerate("abcdef")))
    assert sorted(pool.place_of) == list(range(SLOTS)) and pool.matchers[0].is_full
    assert room.masks.ready(np.arange(SLOTS), np.zeros(SLOTS, np.int64)).all()


def test_more_streams_than_places_go_on_to_other_matchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """To one more where those that there are have none, ready or not."""
    monkeypatch.setattr(matcher_pool, "max_matchers", lambda: 3)
    monkeypatch.setattr(matcher_pool, "num_places", lambda *_: 2)
    room = Room(SLOTS, VOCAB)
    pool = room.masks._pool
    original = room._start

    def start(message: Start, shared: SharedMasks) -> StandIn:
        process = original(message, shared)
        process.is_ready = False
        return process

    pool.start_process = start
    admit(room, {0: "a", 1: "b", 2: "c"})
    assert pool.place_of.tolist() == [0, 1, 2, -1, -1, -1]
    room.processes[0].is_ready = True
    room.masks.retire(1)
    admit(room, {3: "d"})  # the first one is ready and has a place again
    assert pool.place_of.tolist() == [0, -1, 2, 1, -1, -1]
    admit(room, {4: "e", 5: "f", 1: "b"})  # the second one has, then only a third one
    assert pool.place_of.tolist() == [0, 5, 2, 1, 3, 4]
    assert [len(matcher.streams) for matcher in pool.matchers] == [2, 2, 2]
    assert room.masks.ready(np.arange(SLOTS), np.zeros(SLOTS, np.int64)).all()
    sources = "abcdef"
    for slot, source in enumerate(sources):
        assert mask_of(room, slot) == allowed(source, [], VOCAB)


class Deaf(StandIn):
    """Hears nothing before it `is_awake`, as one that computes."""

    def __init__(self, start: Start, shared: SharedMasks) -> None:
        super().__init__(start, shared)
        self.is_awake = True
        self._unheard: list[ToMatcher] = []

    def send(self, message: ToMatcher) -> None:
        self._unheard.append(message)

    def receive(self) -> list[FromMatcher]:
        while self.is_awake and self._unheard:
            super().send(self._unheard.pop(0))
        return super().receive()


def test_a_mask_of_the_earlier_stream_of_a_place_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is there, for the position that is wanted, until the process has heard of the next one."""
    monkeypatch.setattr(matcher_pool, "max_matchers", lambda: 1)
    room = Room(SLOTS, VOCAB)
    pool = room.masks._pool
    processes: list[Deaf] = []
    pool.start_process = lambda *given: processes.append(Deaf(*given)) or processes[-1]
    rows = np.array([2]), np.array([0])
    admit(room, {2: "a"})
    assert room.masks.ready(*rows).all()
    stale = pool.shared.tags[0]
    assert stale == tag_of(pool.openings(rows[0]), rows[1])
    processes[0].is_awake = False
    admit(room, {2: "b"})
    assert pool.place_of[2] == 0 and pool.shared.tags[0] == stale
    assert not room.masks.ready(*rows).any()
    assert pool.positions(rows[0]) == NO_POSITION
    processes[0].is_awake = True
    assert room.masks.ready(*rows).all()
    assert mask_of(room, 2) == allowed("b", [], VOCAB)


def test_a_process_hears_of_its_own_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher_pool, "CROWDED", 1)
    monkeypatch.setattr(matcher_pool, "max_matchers", lambda: 2)
    room = Room(SLOTS, VOCAB)
    for slot in range(2):
        room.masks.admit(slot, grammar("ab"[slot]), np.zeros(0, np.int32))
    both, nothing = np.arange(2), np.zeros(2, np.int64)
    while not room.masks.ready(both, nothing).all():
        pass
    assert [len(matcher.streams) for matcher in room.masks._pool.matchers] == [1, 1]
    moved = room.masks._pool._at[:1]
    room.masks.append(room.masks.keys(both[:1]), np.array(allowed("a", [], VOCAB)[:1], np.int32))
    assert [process.looked for process in room.processes] == [int(moved[0] == i) for i in (0, 1)]


def test_a_token_of_a_stream_whose_process_has_ended_is_told_to_the_next() -> None:
    """A step was under way: its token comes behind what the next process is told first."""
    room = Room(SLOTS, VOCAB)
    room.masks.admit(0, grammar("a"), np.zeros(0, np.int32))
    slots = np.array([0])
    assert room.masks.ready(slots, np.array([0])).all()
    first = allowed("a", [], VOCAB)[0]
    room.kill()
    room.masks.ready(slots, np.array([1]))  # sees its end
    room.clock.now += 6
    room.masks.ready(slots, np.array([1]))  # starts another one, which has the mask of place 0
    assert len(room.processes) == 2
    room.masks.append(room.masks.keys(slots), np.array([first], np.int32))
    assert room.masks.ready(slots, np.array([1])).all()
    mask = room.masks.rows(slots)[0]
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == allowed("a", [first], VOCAB)


def test_a_token_of_a_mask_that_only_a_device_has_looked_at_is_told_to_the_matcher() -> None:
    """Nobody has asked whether the mask is there: it is found with the token."""
    room = Room(SLOTS, VOCAB)
    room.masks.admit(0, grammar("a"), np.zeros(0, np.int32))
    slots = np.array([0])
    opening = room.masks._pool.openings(slots).item()
    output: list[int] = []
    for looked in (1, 2, 3):
        room.processes[0].receive()  # it writes
        output.append(allowed("a", output, VOCAB)[0])
        room.masks.append(room.masks.keys(slots), np.array(output[-1:], np.int32))
        assert room.processes[0].looked == looked
    assert room.masks._pool.openings(slots).item() == opening, "not opened again"
    assert room.masks.ready(slots, np.array([3])).all()
    assert mask_of(room, 0) == allowed("a", output, VOCAB)


def tell_as_device(room: Room, opening: np.uint64, position: int, token: int) -> None:
    """What a device writes for slot 0 once it has sampled `token`."""
    pool = room.masks._pool
    pool.shared.tell(
        pool.place_of[:1], np.array([opening]), np.array([position]), np.array([token])
    )


def test_what_a_device_has_told_a_matcher_is_not_told_again() -> None:
    """The matcher may be two tokens further by the time that the host hears of the first."""
    room = Room(SLOTS, VOCAB)
    room.masks.admit(0, grammar("a"), np.zeros(0, np.int32))
    slots, keys = np.array([0]), room.masks.keys(np.array([0]))
    opening = room.masks.openings(slots)
    output: list[int] = []
    for position in range(6):
        output.append(allowed("a", output, VOCAB)[0])
        room.processes[0].receive()  # it writes the mask
        tell_as_device(room, opening[0], position, output[-1])
        if position % 3 == 2:
            for token in output[position - 2 :]:
                room.masks.append(keys, np.array([token], np.int32), opening, TOLD)
    assert room.masks.ready(slots, np.array([6])).all()
    assert mask_of(room, 0) == allowed("a", output, VOCAB)
    assert room.processes[0].looked == 0 and room.masks.openings(slots) == opening


@pytest.mark.parametrize("is_there", [True, False])
def test_what_a_device_has_told_an_earlier_opening_is_told_to_the_present_one(is_there) -> None:
    """The stream has gone elsewhere meanwhile, with or without the mask of that position."""
    room = Room(SLOTS, VOCAB)
    room.masks.admit(0, grammar("a"), np.zeros(0, np.int32))
    slots, keys = np.array([0]), room.masks.keys(np.array([0]))
    earlier = room.masks.openings(slots)
    room.processes[0].receive()
    token = allowed("a", [], VOCAB)[0]
    tell_as_device(room, earlier[0], 0, token)
    pool = room.masks._pool
    pool.remove(stream := room.masks._streams[0])
    room.masks._lose([stream])
    pool._hand(stream)
    if is_there:
        room.processes[0].receive()
    room.masks.append(keys, np.array([token], np.int32), earlier, TOLD)
    assert room.masks.ready(slots, np.array([1])).all()
    assert mask_of(room, 0) == allowed("a", [token], VOCAB)


def test_a_matcher_owes_a_mask_for_what_a_device_has_told_it() -> None:
    """And is ended when it hangs there."""
    room = Room(SLOTS, VOCAB)
    room.masks.admit(0, grammar("a"), np.zeros(0, np.int32))
    slots, keys = np.array([0]), room.masks.keys(np.array([0]))
    room.masks.look()
    assert not np.isfinite(room.masks._pool.owed_since(slots)).any()
    room.processes[0]._late = 1.0
    token = allowed("a", [], VOCAB)[0]
    tell_as_device(room, room.masks.openings(slots)[0], 0, token)
    room.masks.append(keys, np.array([token], np.int32), room.masks.openings(slots), TOLD)
    assert np.isfinite(room.masks._pool.owed_since(slots)).all()
    room.clock.now += HANG_S + 1
    room.masks.look()
    assert room.processes[0].dead


@pytest.mark.parametrize("told", [True, False])
def test_what_a_device_tells_an_earlier_stream_of_a_place_hides_nothing(told) -> None:
    """It has taken that one's mask before the place changed hands, and samples a little later."""
    room = Room(SLOTS, VOCAB)
    pool = room.masks._pool
    admit(room, {0: "a", 1: "b"})
    slots, keys = np.array([1]), room.masks.keys(np.array([1]))
    gone, earlier = room.masks.openings(np.array([0])), room.masks.openings(slots)
    room.masks.retire(0)
    pool.remove(stream := room.masks._streams[1])
    room.masks._lose([stream])
    pool._hand(stream)
    assert pool.place_of[1] == 0
    room.processes[0].receive()
    token = allowed("b", [], VOCAB)[0]
    room.masks.append(keys, np.array([token], np.int32), earlier, told & TOLD)
    pool.shared.tell(np.array([0]), gone, np.array([0]), np.array([5]))
    assert room.masks.ready(slots, np.array([1])).all()
    assert mask_of(room, 1) == allowed("b", [token], VOCAB)


def test_a_matcher_that_is_always_ahead_of_the_host_has_answered() -> None:
    """Of the streams at whose work a process may have ended, the next one is opened."""
    room = Room(SLOTS, VOCAB)
    admit(room, {0: "a", 1: "b"})
    room.kill()
    room.masks.look()
    room.clock.now += 6
    room._late = 1.0
    room.masks.look()
    slots, first = np.arange(2), np.arange(1)
    opening = room.masks.openings(first)
    assert (room.masks.openings(slots) > 0).tolist() == [True, False]
    process = room.processes[1]
    process._late = 0.0
    process.receive()
    token = allowed("a", [], VOCAB)[0]
    tell_as_device(room, opening[0], 0, token)
    process.receive()
    room.masks.look()
    assert room.masks.openings(first) == opening and (room.masks.openings(slots) > 0).all()
    room.masks.append(room.masks.keys(first), np.array([token], np.int32), opening, TOLD)
    assert room.masks.ready(first, np.array([1])).all()
    assert mask_of(room, 0) == allowed("a", [token], VOCAB)


def test_what_only_a_device_has_told_may_be_what_ended_a_process() -> None:
    """The host has not heard of that token. One that has its mask is not to blame."""
    room = Room(SLOTS, VOCAB)
    admit(room, {0: "a", 1: "b"})
    slots = np.arange(2)
    assert room.masks.ready(slots, np.zeros(2, np.int64)).all()
    tell_as_device(room, room.masks.openings(slots)[0], 0, allowed("a", [], VOCAB)[0])
    room.processes[0].dead = True
    room.masks.look()
    first, second = room.masks._streams[0], room.masks._streams[1]
    assert list(room.masks._pool.matchers[0]._suspects) == [first.key]
    assert (first.deaths, second.deaths) == (1, 0)


def test_what_is_given_up_is_not_handed_to_another_matcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that ended while it had no streams is started again when it is needed."""
    monkeypatch.setattr(matcher_pool, "CROWDED", 2)
    monkeypatch.setattr(matcher_pool, "max_matchers", lambda: 2)
    bench = Bench(0)
    bench.step(admit={slot: Request("impossible", [slot]) for slot in (0, 1)})
    bench.step(admit={slot: Request("abcdef"[slot], [slot]) for slot in (2, 3, 4)})
    bench.step()
    first, second = bench.room.masks._pool.matchers
    assert {0, 1} <= {stream.slot for stream in first.streams.values()}
    assert second.is_ready and second.streams
    bench.step(retire=list(bench.slots))
    bench.room.processes[1].dead = True
    bench.step(admit={0: Request("a", [1])})
    assert second.process is None
    bench.room.clock.now += 10
    bench.step(admit={slot: Request("abcdef"[slot], [slot]) for slot in (1, 2, 3, 4)})
    bench.step()
    assert second.is_ready and second.streams


def test_the_same_text_comes_whatever_happens_on_the_way(matchers: int) -> None:
    """Late masks, dead processes and a move to another slot change nothing."""

    def run(late: float, deaths: bool, max_run: int = 0) -> list[int]:
        bench = Bench(1, late, max_run)
        request = Request("G", [1, 2, 3])
        bench.step(admit={2: request})
        while len(request.output) < 20:
            if deaths and bench.n % 7 == 0:
                bench.room.kill()
            moves = deaths and bench.n % 11 == 0
            slot = next(iter(bench.slots))
            bench.step([slot], {(slot + 1) % SLOTS: request}) if moves else bench.step()
        return request.output[:20]

    plain = run(0.0, False)
    assert run(0.99, False) == plain and run(0.9, True) == plain
    for max_run in (1, MAX_RUN):
        assert run(0.0, False, max_run) == run(0.9, True, max_run) == plain


def test_a_forced_run_comes_in_one_step() -> None:
    """Of 30 tokens two thirds are the only ones that the grammar allows."""
    steps = {}
    for max_run in (0, MAX_RUN):
        bench = Bench(0, max_run=max_run)
        request, other = Request("G", [1, 2, 3]), Request(None, [4])
        bench.step(admit={2: request, 3: other})
        while len(request.output) < 30:
            bench.step()
        steps[max_run] = bench.n
        assert len(other.output) == bench.n, "a row beside it gets one token a step"
    assert steps[0] == 30 and steps[MAX_RUN] <= 15


def test_a_forced_run_ends_with_the_blocks_of_its_row() -> None:
    """The scheduler adds a block when it hears of the tokens, not before; until then the row waits,
    and no other one."""
    bench = Bench(0, max_run=MAX_RUN, blocks=1)
    request, other = Request("G", [1, 2, 3]), Request(None, [4])
    bench.step(admit={2: request, 3: other})
    for _ in range(30):
        bench.step()
    assert len(request.output) == 16 - 3 + 1 and bench.empty
    assert len(other.output) == bench.n
    bench.step(grow=[2])
    assert 14 < len(request.output) <= 30
    whole = Bench(0, max_run=MAX_RUN)
    same = Request("G", [1, 2, 3])
    whole.step(admit={2: same, 3: Request(None, [4])})
    for _ in range(30):
        whole.step()
    assert same.output[: len(request.output)] == request.output


def test_rows_without_grammars_wait_no_longer_than_for_their_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masks that never come hold up a step until it is computed, and one of their rows alone until
    the limit."""
    monkeypatch.setattr(grammar_masks, "WAIT_S", 0.5)
    monkeypatch.setattr(grammar_masks, "WAIT_ALONE_S", 1.0)
    room = Room(SLOTS, VOCAB, late=1.0)
    room.masks.admit(0, grammar("a"), np.zeros(0, np.int32))
    looks = iter([False, False, True])

    def waited(slots: list[int], computed: bool) -> float:
        began = room.clock.now
        columns = np.array(slots), np.zeros(len(slots), np.int64)
        ready = room.masks.ready(*columns, (lambda: next(looks)) if computed else None)
        assert ready.tolist() == [slot > 0 for slot in slots]
        return room.clock.now - began

    assert waited([0, 1], True) < grammar_masks.WAIT_S
    assert next(looks, None) is None
    assert waited([0, 1], False) >= grammar_masks.WAIT_S
    looks = iter([True])
    assert waited([0], True) >= grammar_masks.WAIT_ALONE_S


def test_a_step_of_rows_with_grammars_waits_for_the_last_ones_as_long_as_it_is_worth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To compute a fourth of the rows again takes a fourth of a step."""
    monkeypatch.setattr(grammar_masks, "WAIT_ALONE_S", 10.0)
    room = Room(SLOTS, VOCAB, late=0.5)
    answers = itertools.chain([0.9, 0.9, 0.9], itertools.repeat(0.1))
    room._random.random = lambda: next(answers)
    for slot in range(4):
        room.masks.admit(slot, grammar("a"), np.zeros(0, np.int32))
    began = room.clock.now
    rows = np.arange(4), np.zeros(4, np.int64)
    ready = room.masks.ready(*rows, lambda: room.clock.now > began + 0.4)
    assert ready.tolist() == [True, True, True, False]
    assert 0.49 < room.clock.now - began < 0.53
    # without a device nobody knows when the step is computed
    began = room.clock.now
    room.masks.ready(*rows)
    assert room.clock.now - began >= 10.0


def test_without_grammars_there_is_no_process() -> None:
    bench = Bench(0)
    bench.step(admit={0: Request(None, [1])})
    bench.step()
    assert not bench.room.processes


def test_what_ends_processes_is_found_and_given_up_and_the_others_go_on() -> None:
    bench = Bench(0)
    room = bench.room
    good, killer = Request("good", [1]), Request("killer", [2])
    original = room._start

    def start(message, shared):
        process = original(message, shared)
        plain = process.receive

        def receive():
            if any(o.grammar.source == "killer" for o, _ in process._streams.values()):
                process.dead = True
            return plain()

        process.receive = receive
        return process

    room.masks._pool.start_process = start
    bench.step(admit={0: good, 1: killer})
    for _ in range(40):
        bench.step()
        room.clock.now += 6
        if room.masks.failed(np.array([1]))[0]:
            break
    assert room.masks.failed(np.array([0, 1])).tolist() == [False, True]
    assert len(room.processes) <= 6
    before = len(good.output)
    bench.step(retire=[1])
    bench.step()
    assert len(good.output) == before + 2


def test_a_stream_that_gets_further_after_each_death_is_not_given_up() -> None:
    bench = Bench(0)
    request = Request("g", [1])
    bench.step(admit={0: request})
    for _ in range(8):
        bench.room.kill()
        bench.room.clock.now += 6
        before = len(request.output)
        while len(request.output) < before + 2:
            bench.step()
    assert not bench.room.masks.failed(np.array([0]))[0]


def test_a_process_that_hangs_is_replaced() -> None:
    bench = Bench(0, late=1.0)
    request = Request("g", [1])
    bench.step(admit={0: request})
    room = bench.room
    room._late = 0.0
    room.clock.now += HANG_S + 1
    bench.step()
    room.clock.now += 6
    for _ in range(3):
        bench.step()
    assert len(room.processes) == 2 and request.output


def test_a_process_has_answered_though_nobody_has_looked_for_long() -> None:
    """A step, or a pause between two, took longer than a process may take."""
    room = Room(SLOTS, VOCAB)
    room.masks.admit(0, grammar("a"), np.zeros(0, np.int32))
    slots = np.array([0])
    assert room.masks.ready(slots, np.array([0])).all()
    token = allowed("a", [], VOCAB)[0]
    room.masks.append(room.masks.keys(slots), np.array([token], np.int32))
    room.processes[0].receive()  # its mask is there
    room.clock.now += HANG_S + 1
    assert room.masks.ready(slots, np.array([1])).all()
    assert len(room.processes) == 1 and not room.processes[0].dead


def test_processes_that_cannot_start_fail_their_requests() -> None:
    bench = Bench(0)
    room = bench.room
    original = room._start

    def start(message, shared):
        process = original(message, shared)
        process.is_ready = False
        process.dead = True
        return process

    room.masks._pool.start_process = start
    bench.step(admit={0: Request("g", [1])})
    for _ in range(2 * MAX_FAILED_STARTS):
        room.clock.now += 6
        bench.step()
    assert room.masks.failed(np.array([0]))[0]


def test_a_grammar_that_no_token_continues_fails_its_row_alone() -> None:
    bench = Bench(0)
    good = Request("good", [1])
    bench.step(admit={0: Request("impossible", [1]), 1: good})
    bench.step()
    assert bench.room.masks.failed(np.arange(2)).tolist() == [True, False]
    assert len(good.output) == 2


def test_a_grammar_has_the_last_word_over_other_constraints() -> None:
    """Where biases, bad words and minima leave none of its tokens, they are not applied."""
    room = Room(2, VOCAB)
    slots = Slots(2, 64, 8)
    constraints = Constraints(slots, room.masks, VOCAB, (3,), "cpu", torch.from_numpy)
    source = "x"
    wanted = allowed(source, [], VOCAB)
    others = [token for token in range(VOCAB) if token not in wanted]
    for slot, ids in enumerate((others, [wanted[1], *others])):
        sampling = Sampling(seed=0, max_tokens=9, allowed_ids=pack("i", ids))
        admission = Admission(
            slot, 1, pack("i", [1]), b"", pack("i", [slot]), 0, sampling, grammar=grammar(source)
        )
        slots.admit(admission)
        room.masks.admit(slot, admission.grammar, np.zeros(0, np.int32))
        constraints.admit(np.array([slot]))
    rows = np.arange(2)
    assert room.masks.ready(rows, np.zeros(2, np.int64)).all()
    logits = torch.zeros(2, VOCAB)
    constraints.apply(logits, rows)
    left = [np.flatnonzero(row > -1e30).tolist() for row in logits.numpy()]
    assert left == [wanted, [wanted[1]]]
