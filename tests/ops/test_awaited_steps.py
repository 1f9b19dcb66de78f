"""Steps whose masks the device takes itself, under everything that may come between: requests that
end, are aborted or preempted while steps run them, matchers that are late, hear late or die. The
GPU's runner on the CPU, driven by a small scheduler; each token must be the one that the request
gets when it runs alone."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import gpu_on_cpu
import numpy as np
import pytest
import torch
from pagewire.config import ModelConfig, SchedulerConfig, WorkerConfig
from pagewire.grammar.child import MatcherGone
from pagewire.grammar.messages import FromMatcher, Start, ToMatcher
from pagewire.grammar.shared import SharedMasks
from pagewire.worker.cpu.runner import Runner
from pagewire.worker.gpu import awaited_sampling
from pagewire.worker.gpu import runner as gpu_runner
from pagewire.worker.gpu.runner import GpuRunner
from pagewire.worker.load import loader
from pagewire.worker.runners import AsyncFromSync
from pagewire.worker.step import matcher, matcher_pool
from pagewire_kernels import awaited_masks
from pagewire_kernels import awaited_sampling as kernels
from pagewire_kernels.kv_cache import raw
from pagewire_protocol.agreed import GRAMMAR_FAILED
from pagewire_protocol.messages import Admission, Step, StepCost, StepResult, pack, unpack
from pagewire_protocol.sampling import Sampling
from worker.stand_in_matcher import Room, StandIn, allowed, grammar

SLOTS, BLOCK, TABLE, VOCAB = 4, 8, 5, 97
BLOCKS = SLOTS * TABLE
NAN_TOKEN = 1
"""Whose embedding is not finite; no grammar allows it."""
MOST_STEPS = 60
"""In which a few requests end."""
CONFIG = WorkerConfig(
    device="cpu", dtype="float32", block_size=BLOCK, num_kv_blocks=BLOCKS, threads=1
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


# --- requests ---


@dataclass
class Wanted:
    """A request, and what it gets when it runs alone."""

    source: str | None
    sampling: Sampling
    prompt: list[int]
    length: int
    """Output tokens, with which the scheduler ends it."""
    foreseen: bool
    """The scheduler knows that, so that no step runs it any further."""
    output: list[int] = field(default_factory=list[int])
    flag: int = 0
    """What ends it instead, after its output."""
    logprobs: list[float] = field(default_factory=list[float])


def catalog() -> list[Wanted]:
    """One of each kind, or more where the device decides."""
    make = Random(5)
    kinds: list[tuple[str | None, dict[str, Any]]] = [
        *((source, {"temperature": 0.7 * (i % 3)}) for i, source in enumerate("abcdefgh")),
        *((source, {"logprobs": i % 3, "temperature": 1.0}) for i, source in enumerate("ijkl")),
        ("m", {"top_k": 20, "top_p": 0.9, "temperature": 0.8}),
        ("n", {"frequency_penalty": 0.5, "temperature": 0.9}),
        ("r", {"repetition_penalty": 1.2, "temperature": 0.0}),
        ("s", {"presence_penalty": 0.5, "temperature": 1.1, "logprobs": 0}),
        ("o", {"bias_ids": pack("i", [9]), "bias_values": pack("f", [3.0]), "logprobs": 1}),
        ("impossible", {"temperature": 0.0}),
        ("p", {"max_tokens": 0}),
        (None, {"temperature": 0.0}),
        (None, {"temperature": 1.0, "logprobs": 2}),
        (None, {"repetition_penalty": 1.5, "temperature": 0.0}),
        (None, {"max_tokens": 0}),
    ]
    wanted = []
    for i, (source, options) in enumerate(kinds):
        prompt = [make.randrange(3, VOCAB) for _ in range(make.choice((1, 2, 5, 9, 14)))]
        sampling = Sampling(**{"seed": i, "max_tokens": 99, **options})
        length = make.randrange(4, 10) if sampling.max_tokens else 0
        wanted.append(Wanted(source, sampling, prompt, length, i % 2 == 0))
    for source in ("q", None):
        prompt = [5, 6, NAN_TOKEN, 7]
        wanted.append(Wanted(source, Sampling(seed=1, max_tokens=99), prompt, 4, False))
    return wanted


# --- matchers ---


class Independent(StandIn):
    """Hears what it is sent, and writes, when a test lets it work, whatever its worker does."""

    def __init__(self, start: Start, shared: SharedMasks, late: float, random: Random) -> None:
        super().__init__(start, shared, late, random)
        self._unheard: deque[ToMatcher] = deque()
        self._said: list[FromMatcher] = []

    def send(self, message: ToMatcher) -> None:
        self._unheard.append(message)

    def receive(self) -> list[FromMatcher]:
        if self.dead:
            raise MatcherGone("was killed by a test")
        said, self._said = self._said, []
        return said

    def work(self) -> None:
        if self.dead or self._random.random() < self._late:
            return
        while self._unheard:
            super().send(self._unheard.popleft())
        self._said += super().receive()


def speaking(processes: Sequence[Independent]) -> list[Independent]:
    """Those of which there is something to be heard."""
    return [process for process in processes if process.dead or process._said]


class IndependentRoom(Room):
    def _start(self, start: Start, shared: SharedMasks) -> StandIn:
        process = Independent(start, shared, self._late, self._random)
        self.processes.append(process)
        return process

    def calm(self) -> None:
        """From now on nothing is late."""
        self._late = 0.0
        for process in self.processes:
            process._late = 0.0

    def work(self) -> None:
        """Some of the processes do."""
        for process in self.processes:
            assert isinstance(process, Independent)
            process.work()


# --- the scheduler ---


@dataclass
class Held:
    """A request in a slot, as the scheduler sees it: `assumed` tokens, of which `sent` are computed
    by the steps that it has sent."""

    wanted: Wanted
    output: list[int]
    admitted: int
    assumed: int
    sent: int = 0
    over: bool = False

    @property
    def end(self) -> int:
        """How long it may get."""
        return len(self.wanted.prompt) + (self.wanted.length if self.wanted.foreseen else 16)

    @property
    def is_to_run(self) -> bool:
        if not self.wanted.sampling.max_tokens:
            return self.sent < self.assumed
        return self.assumed < self.end


@dataclass
class Sent:
    """A step in flight, and the slots that it samples."""

    n: int
    handle: Any
    sampled: list[int]
    prefilled: list[int]


class Scheduler:
    """Sends steps ahead of their results, a few at most. Whoever waits has its output so far."""

    def __init__(self, runner: Any, waiting: list[tuple[Wanted, list[int]]]) -> None:
        self.runner = runner
        self.waiting = waiting
        self.slots: dict[int, Held] = {}
        self.in_flight: deque[Sent] = deque()
        self.done: list[Wanted] = []
        self.n = 0
        self.late = 0
        """Rows without a token."""
        self.beyond = 0
        """Rows of requests that had left."""
        self.last_run: list[int] = []

    def preempt(self, slot: int) -> None:
        held = self.slots[slot]
        held.over = True
        self.waiting.append((held.wanted, held.output))

    def clear(self) -> None:
        """A new scheduler has the same requests."""
        for slot, held in self.slots.items():
            if not held.over:
                self.preempt(slot)
        self.slots.clear()
        self.in_flight.clear()
        self.last_run = []
        self.runner.clear()

    def step(self, chunk: int, skip: set[int], admits: int = SLOTS) -> None:
        """Retire who is over, admit who waits, and compute a token, or `chunk` of a prompt, of each
        slot but `skip`."""
        self.n += 1
        retire = [slot for slot, held in self.slots.items() if held.over]
        for slot in retire:
            del self.slots[slot]
        admissions = [
            self._admission(slot)
            for slot in [slot for slot in range(SLOTS) if slot not in self.slots][:admits]
            if self.waiting
        ]
        rows: list[int] = []
        counts: list[int] = []
        sampled: list[int] = []
        prefilled: list[int] = []
        for slot, held in sorted(self.slots.items()):
            if held.is_to_run and slot not in skip:
                rows.append(slot)
                counts.append(min(chunk, held.assumed - held.sent))
                held.sent += counts[-1]
                if held.sent == held.assumed:
                    is_sampled = bool(held.wanted.sampling.max_tokens)
                    (sampled if is_sampled else prefilled).append(slot)
                    held.assumed += is_sampled
        repeat = rows == self.last_run and sampled == rows and set(counts) == {1}
        self.last_run = rows
        run = {"repeat": True} if repeat and rows else {"run_slots": pack("i", rows)}
        if "repeat" not in run:
            run["run_counts"] = pack("i", counts)
        step = Step(1, self.n, retire=pack("i", retire), admit=tuple(admissions), **run)
        self.in_flight.append(Sent(self.n, self.runner.launch(step), sampled, prefilled))

    def _admission(self, slot: int) -> Admission:
        wanted, output = self.waiting.pop(0)
        tokens = len(wanted.prompt) + len(output)
        self.slots[slot] = Held(wanted, output, self.n, tokens)
        return Admission(
            slot,
            self.n,
            pack("i", wanted.prompt),
            pack("i", output),
            pack("i", range(slot * TABLE, (slot + 1) * TABLE)),
            0,
            wanted.sampling,
            grammar=None if wanted.source is None else grammar(wanted.source),
        )

    def read(self, most: int) -> None:
        """Results, until `most` steps are in flight."""
        while len(self.in_flight) > most:
            sent = self.in_flight[0]
            while not sent.handle.done():
                pass
            result = sent.handle.result()
            assert sent.handle.result() == result, "asked twice"
            self.in_flight.popleft()
            self._take(sent, result)
            for slot in sent.prefilled:
                if self._is_of(sent, slot):
                    self._end(slot)
            if most % 2:  # not always: the next step may come first
                self.runner.catch_up()

    def _is_of(self, sent: Sent, slot: int) -> bool:
        held = self.slots.get(slot)
        return held is not None and held.admitted <= sent.n and not held.over

    def _end(self, slot: int) -> None:
        self.slots[slot].over = True
        self.done.append(self.slots[slot].wanted)

    def _take(self, sent: Sent, result: StepResult) -> None:
        slots = unpack("i", result.slots).tolist()
        assert slots == sent.sampled
        brought = unpack("i", result.counts).tolist() if result.counts else [1] * len(slots)
        tokens = unpack("i", result.tokens).tolist()
        assert len(tokens) == sum(brought)
        logprobs = logprobs_of(result)
        at = 0
        for slot, count, flag in zip(slots, brought, result.flags, strict=True):
            if not self._is_of(sent, slot):
                self.beyond += 1
            elif flag:
                self._fail(slot, flag)
            elif count:
                self._append(slot, tokens[at], logprobs.pop(at, None))
            else:
                self._shorten(slot)
            if count:
                logprobs.pop(at, None)
            at += count
        assert not logprobs, "of tokens that there are not"

    def _shorten(self, slot: int) -> None:
        """It brings nothing: its last token is computed again."""
        held = self.slots[slot]
        assert held.wanted.source is not None, "a row without a grammar waits for nobody"
        self.late += 1
        under_way = sum(
            slot in step.sampled and held.admitted <= step.n for step in list(self.in_flight)
        )
        held.assumed = len(held.wanted.prompt) + len(held.output) + under_way
        held.sent = held.assumed - 1

    def _append(self, slot: int, token: int, logprob: tuple[int, float] | None) -> None:
        held = self.slots[slot]
        wanted, output = held.wanted, held.output
        if wanted.source is not None:
            assert token in allowed(wanted.source, output, VOCAB), (wanted, output, token)
        place = len(output)
        assert (logprob is None) == (wanted.sampling.logprobs < 0), (wanted, logprob)
        output.append(token)
        self.check(wanted, output, logprob, place)
        if len(output) == wanted.length:
            self._end(slot)

    def check(
        self, wanted: Wanted, output: list[int], logprob: tuple[int, float] | None, place: int
    ) -> None:
        """Output position `place` has come."""
        assert output == wanted.output[: place + 1], (wanted, output)
        if logprob is not None:
            assert logprob[0] == output[place]
            assert abs(logprob[1] - wanted.logprobs[place]) < 1e-3

    def _fail(self, slot: int, flag: int) -> None:
        held = self.slots[slot]
        assert (flag, held.output) == (held.wanted.flag, held.wanted.output), (held, flag)
        self._end(slot)


def logprobs_of(result: StepResult) -> dict[int, tuple[int, float]]:
    """By token of the result: the first entry of its log-probabilities, which is its own."""
    columns = result.logprobs
    if columns is None:
        return {}
    found: dict[int, tuple[int, float]] = {}
    ids, values = unpack("i", columns.ids).tolist(), unpack("f", columns.values).tolist()
    at = 0
    for row, count in zip(unpack("i", columns.rows), unpack("i", columns.counts), strict=True):
        assert int(row) not in found and row >= 0
        found[int(row)] = ids[at], values[at]
        at += int(count)
    assert at == len(ids) == len(values)
    return found


class Alone(Scheduler):
    """Notes what a request gets."""

    def check(
        self, wanted: Wanted, output: list[int], logprob: tuple[int, float] | None, place: int
    ) -> None:
        wanted.output = list(output)
        if logprob is not None:
            wanted.logprobs.append(logprob[1])

    def _fail(self, slot: int, flag: int) -> None:
        self.slots[slot].wanted.flag = flag
        self._end(slot)


# --- runners ---


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=TABLE * BLOCK,
        eos_token_id=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_TOKEN] = torch.nan
        model.lm_head.weight[NAN_TOKEN] = 0
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def requests(path) -> list[Wanted]:
    """The catalog, each run alone by the CPU's runner."""
    wanted = catalog()
    runner = Runner(path, ModelConfig(), SchedulerConfig(max_num_seqs=SLOTS), CONFIG)
    masks = Room(SLOTS, VOCAB).masks
    runner._masks = masks
    runner._constraints._grammars._masks = masks
    for request in wanted:
        alone = Alone(AsyncFromSync(runner), [(request, [])])
        while not alone.done:
            alone.step(99, set())
            alone.read(0)
        alone.clear()
    flags = [request.flag for request in wanted]
    assert flags.count(GRAMMAR_FAILED) == 1 and flags.count(1) == 2
    assert all(len(r.output) == r.length for r in wanted if not r.flag)
    return wanted


class Chaos:
    """One run of all that may happen, as `seed` says."""

    def __init__(self, path: Any, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.random = Random(seed)
        monkeypatch.setattr(gpu_runner.torch.cuda, "Event", gpu_on_cpu.SlowEvent)
        monkeypatch.setattr(gpu_on_cpu.SlowEvent, "LOOKS", self.random.randrange(2, 12))
        monkeypatch.setattr(gpu_on_cpu.SlowEvent, "looks", 0)
        monkeypatch.setattr(matcher, "MAX_DEATHS", 10**6)
        monkeypatch.setattr(matcher_pool, "CROWDED", 1)
        monkeypatch.setattr(matcher_pool, "max_matchers", lambda: 1 + seed % 3)
        monkeypatch.setattr(matcher_pool, "wait_for_any", lambda processes, _: speaking(processes))
        places = -(-SLOTS // (1 + seed % 3))
        monkeypatch.setattr(matcher_pool, "num_places", lambda *_: places)
        self.room = IndependentRoom(SLOTS, VOCAB, self.random.choice((0.1, 0.4, 0.7)), seed)
        self.moved = 0
        """Streams that went from one matcher to another."""
        self._openings = np.zeros(SLOTS, np.uint64)
        """By slot: as what the device knows the streams of the step that it is given."""
        monkeypatch.setattr(self.room.masks, "openings", lambda slots: self._openings[slots])
        monkeypatch.setattr(kernels, "THREADS", 4)
        monkeypatch.setattr(kernels, "SPAN", 4 * 32)
        self._look = awaited_masks.look
        monkeypatch.setattr(awaited_sampling.awaited_masks, "look", self._look_later)
        self.loaded = loader.load(path, ModelConfig(), CONFIG, lambda stage, fraction: None)
        parts = gpu_on_cpu.parts(self.loaded, SLOTS, self.room.masks, awaits=True)
        self.runner = GpuRunner(parts, StepCost(1.0, 0.0, 0.0), 7, [])
        # Attention on the CPU multiplies what lies past a row's end by zero.
        admit = self.runner._admit
        self.runner._admit = lambda new: (self._zero_blocks(new), admit(new))[1]

    def _move(self, in_step: bool = False) -> None:
        """One more matcher may be ready, which gets some of the others' streams. in_step: of those
        whose masks the host does not bring to it, which it does at once."""
        masks, slots = self.room.masks, self.runner._slots
        pool = masks._pool
        streams = [stream for one in pool.matchers for stream in one.harmless()]
        streams = [s for s in streams if slots.grammar_only[s.slot] or not in_step]
        for stream in self.random.sample(streams, min(len(streams), 2)):
            pool.remove(stream)
            masks._lose([stream])
        for stream in streams:
            if stream.place < 0:
                pool._hand(stream)
                self.moved += 1

    def _look_later(self, *given: Any) -> None:
        """A device looks at masks some time after the step was launched: by then, the host may have
        seen the steps before, and told matchers of them, and places may have changed hands; so they
        may once more before it samples."""
        awaited, count = given[:2]
        pool = self.room.masks._pool
        self._openings = pool._opening_of.copy()
        slots = awaited.slots[:count].numpy().astype(np.int64)
        known = awaited.tag_keys, awaited.tag_at, awaited.mask_at
        for column, present in zip(known, self.room.masks.tags(slots), strict=True):
            assert (column[:count].numpy() == present).all(), "the device knows what was once"
        self._work()
        self._look(*given)
        if self.random.random() < 0.3:
            self._work()

    def _work(self) -> None:
        """Of the host and matchers, while a step is under way."""
        self.room.work()
        if self.random.random() < 0.5:
            self.runner._learn(wait=True)
            if self.random.random() < 0.1:
                self.room.kill()
                self.room.clock.now += 10.0 * self.random.random()
                self.room.masks.look()
            if self.random.random() < 0.1:
                self._move(in_step=True)
            self.room.work()

    def _zero_blocks(self, slots: np.ndarray) -> None:
        blocks = (slots[:, None] * TABLE + np.arange(TABLE)).reshape(-1)
        raw(self.loaded.cache).index_fill_(2, torch.from_numpy(blocks), 0)

    def run(self, requests: list[Wanted], steps: int) -> Scheduler:
        random, room = self.random, self.room
        scheduler = Scheduler(self.runner, [])
        pending: list[Wanted] = []
        ahead = random.randrange(1, 5)
        for _ in range(steps):
            while len(scheduler.waiting) < 2:
                pending = pending or random.sample(requests, len(requests))
                scheduler.waiting.append((pending.pop(), []))
            for slot, held in scheduler.slots.items():
                if not held.over and random.random() < 0.04:
                    if random.random() < 0.3:
                        held.over = True
                    else:
                        scheduler.preempt(slot)
            if random.random() < 0.5:
                random.shuffle(scheduler.waiting)
            if random.random() < 0.05:
                room.kill()
            if random.random() < 0.3:
                room.clock.now += 1.0
            if random.random() < 0.1:
                self._move()
            if random.random() < 0.01:
                scheduler.clear()
            if random.random() < 0.3:  # steps are done while nobody looks
                gpu_on_cpu.SlowEvent.looks += random.randrange(12)
            skip = {slot for slot in range(SLOTS) if random.random() < 0.05}
            scheduler.step(random.choice((1, 3, 99)), skip, random.randrange(SLOTS + 1))
            room.work()
            if random.random() < 0.2:
                ahead = random.randrange(1, 5)
            scheduler.read(ahead)
        self._finish(scheduler)
        return scheduler

    def _finish(self, scheduler: Scheduler) -> None:
        """Nothing happens any more: all that wait get to their ends, soon."""
        self.room.calm()
        for _ in range(MOST_STEPS):
            scheduler.step(99, set())
            self.room.clock.now += 1.0
            scheduler.read(2)
            self.room.work()
            if not scheduler.waiting and all(held.over for held in scheduler.slots.values()):
                break
        scheduler.read(0)
        assert not scheduler.waiting and all(held.over for held in scheduler.slots.values())


@pytest.mark.parametrize("seed", range(4))
def test_each_request_gets_what_it_gets_alone_whatever_happens_to_matchers_and_slots(
    path, monkeypatch, requests, seed
) -> None:
    chaos = Chaos(path, monkeypatch, seed)
    scheduler = chaos.run(requests, 50)
    assert len(scheduler.done) > 5 and scheduler.late > 5 and scheduler.beyond > 5
    assert chaos.moved > 2


def test_what_a_slot_s_earlier_request_was_late_for_is_not_counted_for_the_next_one(
    path, monkeypatch, requests
) -> None:
    """The step is done, and nobody has looked at it when the next one brings another request."""
    monkeypatch.setattr(gpu_runner.torch.cuda, "Event", gpu_on_cpu.Event)
    loaded = loader.load(path, ModelConfig(), CONFIG, lambda stage, fraction: None)
    parts = gpu_on_cpu.parts(loaded, SLOTS, Room(SLOTS, VOCAB, late=1.0).masks, awaits=True)
    runner = GpuRunner(parts, StepCost(1.0, 0.0, 0.0), 7, [])
    held = next(request for request in requests if request.source == "a")
    free = next(request for request in requests if request.source is None and request.length)
    scheduler = Scheduler(runner, [(held, [])])
    scheduler.step(99, set())
    scheduler.slots[0].over = True
    scheduler.waiting.append((free, []))
    while free not in scheduler.done:
        scheduler.step(99, set())
        scheduler.read(1)


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("mixed", [1, 2])
def test_a_late_row_in_steps_with_prompts_begins_where_the_device_has_counted_up_to(
    path, monkeypatch, requests, before, mixed
) -> None:
    """Before anybody on the host hears of it; then nothing but decodes, which count on."""
    monkeypatch.setattr(gpu_runner.torch.cuda, "Event", gpu_on_cpu.SlowEvent)
    monkeypatch.setattr(gpu_on_cpu.SlowEvent, "LOOKS", 10**6)
    loaded = loader.load(path, ModelConfig(), CONFIG, lambda stage, fraction: None)
    room = Room(SLOTS, VOCAB)
    parts = gpu_on_cpu.parts(loaded, SLOTS, room.masks, awaits=True)
    scheduler = Scheduler(GpuRunner(parts, StepCost(1.0, 0.0, 0.0), 7, []), [])
    held = max((r for r in requests if r.source in tuple("abcdefgh")), key=lambda r: r.length)
    free = [r for r in requests if r.source is None and r.length]
    scheduler.waiting.append((held, []))

    def step(wait: bool = True) -> None:
        scheduler.step(99, set())
        if wait:
            for sent in scheduler.in_flight:
                sent.handle.event.synchronize()
            scheduler.read(0)
            room.masks.look()

    for _ in range(before + 1):
        step()
    tags = room.masks.shared.tags
    there = tags.copy()
    tags[:] = 0
    step(wait=False)
    for request in free[:mixed]:
        scheduler.waiting.append((request, []))
        step(wait=False)
    tags[:] = there
    late = 1 + mixed
    for _ in range(held.length + late):
        step()
    assert held in scheduler.done and scheduler.late == late
