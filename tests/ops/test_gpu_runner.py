"""The GPU's runner without a GPU: its own steps, with sampling and slot kernels in Triton's
interpreter, over a model on the CPU; against the CPU's runner, token by token."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import gpu_on_cpu
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from pagewire.config import ModelConfig, SchedulerConfig, WorkerConfig
from pagewire.grammar.shared import SharedMasks
from pagewire.worker.cpu.runner import Runner
from pagewire.worker.gpu import runner as gpu_runner
from pagewire.worker.gpu.runner import RING, GpuRunner
from pagewire.worker.load import loader
from pagewire.worker.runners import AsyncFromSync
from pagewire.worker.step.grammar_masks import GrammarMasks
from pagewire.worker.step.slots import BadStep
from pagewire_protocol.agreed import MAX_STEPS_IN_FLIGHT
from pagewire_protocol.messages import Admission, Step, StepCost, StepResult, pack, unpack
from pagewire_protocol.sampling import Sampling
from worker.stand_in_matcher import Room, allowed, grammar

SLOTS, BLOCK, BLOCKS, COUNT = 6, 8, 90, 8
CONFIG = WorkerConfig(
    device="cpu", dtype="float32", block_size=BLOCK, num_kv_blocks=BLOCKS, threads=1
)


class Observer:
    """Notes what it sees: 'begin', then the number of tokens."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def begin(self) -> None:
        self.seen.append("begin")

    def end(self, tokens: int) -> None:
        self.seen.append(tokens)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=2,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def on_gpu(path, monkeypatch):
    """make(observers) -> a GpuRunner, eager, whose device is the CPU. awaits: the device takes masks
    itself."""
    monkeypatch.setattr(gpu_runner.torch.cuda, "Event", gpu_on_cpu.Event)

    def make(*observers: Any, masks: GrammarMasks | None = None, awaits: bool = True) -> GpuRunner:
        loaded = loader.load(path, ModelConfig(), CONFIG, lambda stage, fraction: None)
        masks = masks or GrammarMasks(SLOTS, ModelConfig(), 300, (2,))
        parts = gpu_on_cpu.parts(loaded, SLOTS, masks, awaits=awaits)
        return GpuRunner(parts, StepCost(1.0, 0.0, 0.0), 7, list(observers))

    return make


@pytest.fixture
def on_cpu(path):
    runner = Runner(path, ModelConfig(), SchedulerConfig(max_num_seqs=SLOTS), CONFIG, incarnation=7)
    return AsyncFromSync(runner)


REQUESTS = [
    Sampling(seed=1, max_tokens=99, temperature=0.0),
    Sampling(seed=2**40 + 5, max_tokens=99, temperature=1.0),
    Sampling(seed=3, max_tokens=99, temperature=0.8, top_k=20, top_p=0.9),
    Sampling(seed=4, max_tokens=99, temperature=1.5, min_p=0.02, frequency_penalty=0.5),
    Sampling(
        seed=5,
        max_tokens=99,
        temperature=1.1,
        logprobs=2,
        prompt_logprobs=1,
        min_tokens=4,
        bias_ids=pack("i", [9, 11]),
        bias_values=pack("f", [3.0, -5.0]),
        bad_words=(pack("i", [7]), pack("i", [9, 9])),
    ),
    Sampling(seed=6, max_tokens=99, temperature=0.0, repetition_penalty=1.5, logprobs=0),
]


def generate(runner: Any, chunk: int) -> tuple[list[list[int]], list[StepResult]]:
    """COUNT tokens for each of REQUESTS, steps sent ahead of their results, prompts in chunks; the
    tokens by slot."""
    make = np.random.default_rng(chunk)
    prompts = [make.integers(3, 300, 5 + 7 * i).tolist() for i in range(SLOTS)]
    free = list(range(BLOCKS))
    admit = []
    for slot, (prompt, sampling) in enumerate(zip(prompts, REQUESTS, strict=True)):
        blocks = [free.pop() for _ in range(-(-len(prompt) // BLOCK))]
        admit.append(Admission(slot, slot, pack("i", prompt), b"", pack("i", blocks), 0, sampling))
    num_tokens = [len(prompt) for prompt in prompts]
    num_blocks = [-(-length // BLOCK) for length in num_tokens]
    sent = [0] * SLOTS
    end = [length + COUNT for length in num_tokens]
    out: list[list[int]] = [[] for _ in prompts]
    results: list[StepResult] = []
    in_flight: deque[Any] = deque()

    def read(limit: int) -> None:
        while len(in_flight) > limit:
            handle = in_flight.popleft()
            assert handle.done()
            results.append(handle.result())
            columns = (unpack("i", column) for column in (results[-1].slots, results[-1].tokens))
            for slot, token in zip(*columns, strict=True):
                out[slot].append(token)

    last_run: list[int] = []
    n = 0
    while any(length < last for length, last in zip(num_tokens, end, strict=True)):
        run = [slot for slot in range(SLOTS) if num_tokens[slot] < end[slot]]
        counts = [min(chunk, num_tokens[slot] - sent[slot]) for slot in run]
        grow_slots, grow_blocks = [], []
        for slot, count in zip(run, counts, strict=True):
            sent[slot] += count
            while num_blocks[slot] * BLOCK < sent[slot]:
                grow_slots.append(slot)
                grow_blocks.append(free.pop())
                num_blocks[slot] += 1
            num_tokens[slot] += sent[slot] == num_tokens[slot]
        repeat = run == last_run and set(counts) == {1}
        last_run = run
        columns = (
            {"repeat": True}
            if repeat
            else {"run_slots": pack("i", run), "run_counts": pack("i", counts)}
        )
        grow = {"grow_slots": pack("i", grow_slots), "grow_blocks": pack("i", grow_blocks)}
        in_flight.append(runner.launch(Step(1, n, admit=tuple(admit), **grow, **columns)))
        admit, n = [], n + 1
        read(limit=3)
    read(limit=0)
    return out, results


# The CPU's attention never meets padding rows in a CPU worker, and takes the logarithm of their
# length.
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
@pytest.mark.parametrize("chunk", [1000, 6])
def test_every_token_is_the_cpu_runners(on_gpu, on_cpu, chunk) -> None:
    observer = Observer()
    tokens, results = generate(on_gpu(observer), chunk)
    wanted, wanted_results = generate(on_cpu, chunk)
    assert tokens == wanted and all(len(row) == COUNT for row in tokens)
    assert observer.seen[::2] == ["begin"] * len(results)
    prompts = sum(5 + 7 * slot for slot in range(SLOTS))
    assert sum(observer.seen[1::2]) == prompts + SLOTS * (COUNT - 1)
    for got, exact in zip(results, wanted_results, strict=True):
        assert (got.epoch, got.incarnation, got.n) == (exact.epoch, 7, exact.n)
        assert (got.slots, got.flags) == (exact.slots, exact.flags)
        same_logprobs(got.logprobs, exact.logprobs)
        assert len(got.prompt_logprobs) == len(exact.prompt_logprobs)
        for ours, theirs in zip(got.prompt_logprobs, exact.prompt_logprobs, strict=True):
            same_logprobs(ours, theirs)


def same_logprobs(got: Any, exact: Any) -> None:
    assert (got is None) == (exact is None)
    if got is not None:
        assert (got.counts, got.ranks, got.ids) == (exact.counts, exact.ranks, exact.ids)
        np.testing.assert_allclose(unpack("f", got.values), unpack("f", exact.values), atol=1e-4)


def test_rows_are_brought_up_again_after_clear(on_gpu) -> None:
    """A new scheduler's slots may be the same numbers as the last one's."""
    runner = on_gpu()
    first, _ = generate(runner, 1000)
    runner.clear()
    with pytest.raises(BadStep, match="hold no request"):
        runner.launch(Step(2, 0, run_slots=pack("i", [0]), run_counts=pack("i", [1])))
    runner.clear()
    again, _ = generate(runner, 1000)
    assert again == first


@pytest.mark.parametrize(("event", "starved"), [("Event", True), ("SlowEvent", False)])
def test_a_step_says_whether_the_device_had_nothing_left_to_compute(
    on_gpu, monkeypatch, event, starved
) -> None:
    monkeypatch.setattr(gpu_runner.torch.cuda, "Event", getattr(gpu_on_cpu, event))
    monkeypatch.setattr(gpu_on_cpu.SlowEvent, "LOOKS", 1000)
    runner = on_gpu()
    admit = (Admission(0, 0, pack("i", [5, 9]), b"", pack("i", [0]), 0, REQUESTS[0]),)
    first = Step(1, 0, admit=admit, run_slots=pack("i", [0]), run_counts=pack("i", [2]))
    handles = [runner.launch(first)]
    handles += [
        runner.launch(Step(1, n, run_slots=first.run_slots, run_counts=pack("i", [1])))
        for n in (1, 2)
    ]
    assert [handle.result().starved for handle in handles] == [False, starved, starved]


def test_there_are_more_buffers_than_steps_in_flight() -> None:
    assert MAX_STEPS_IN_FLIGHT < RING
    gpu_runner.check_ring(MAX_STEPS_IN_FLIGHT)
    with pytest.raises(ValueError, match="16 steps in flight need more than 16 buffers"):
        gpu_runner.start(
            SimpleNamespace(),  # pyright: ignore[reportArgumentType]
            ModelConfig(),
            SchedulerConfig(steps_in_flight=16),
            WorkerConfig(),
        )


# --- grammars ---

SOURCES = ["a", None, "b", "c", "d", None]


def generate_by_grammars(runner: Any, ahead: int) -> tuple[list[list[int]], list[Any]]:
    """COUNT tokens for each of REQUESTS, some of which have grammars, by slot, and the
    log-probabilities of slot 4. A row whose mask is late brings none, and is run again."""
    make = np.random.default_rng(5)
    prompts = [make.integers(3, 300, 3 + 4 * i).tolist() for i in range(SLOTS)]
    free = list(range(BLOCKS))
    admit = []
    for slot, (prompt, sampling) in enumerate(zip(prompts, REQUESTS, strict=True)):
        source = SOURCES[slot]
        blocks = [free.pop() for _ in range(15)]
        admission = Admission(
            slot,
            slot,
            pack("i", prompt),
            b"",
            pack("i", blocks),
            0,
            replace(sampling, prompt_logprobs=-1),
            grammar=None if source is None else grammar(source),
        )
        admit.append(admission)
    out: list[list[int]] = [[] for _ in prompts]
    logprobs: list[Any] = []
    in_flight: deque[Any] = deque()
    n = 0
    while any(len(tokens) < COUNT for tokens in out):
        counts = [len(prompt) for prompt in prompts] if not n else [1] * SLOTS
        columns = {"run_slots": pack("i", range(SLOTS)), "run_counts": pack("i", counts)}
        in_flight.append(runner.launch(Step(1, n, admit=tuple(admit), **columns)))
        admit, n = [], n + 1
        while len(in_flight) > ahead:
            result = in_flight.popleft().result()
            slots = unpack("i", result.slots).tolist()
            brought = unpack("i", result.counts).tolist() if result.counts else [1] * SLOTS
            tokens = iter(unpack("i", result.tokens).tolist())
            rows = [slot for slot, count in zip(slots, brought, strict=True) if count]
            for slot in rows:
                out[slot].append(next(tokens))
            if result.logprobs is not None and 4 in rows:
                index = unpack("i", result.logprobs.rows).tolist().index(rows.index(4))
                logprobs.append(unpack("i", result.logprobs.ids).tolist()[3 * index])
    return [tokens[:COUNT] for tokens in out], logprobs[:COUNT]


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
def test_rows_with_grammars_get_the_cpu_runners_tokens_and_the_others_what_they_always_got(
    on_gpu, path
) -> None:
    late = 0.7
    free, _ = generate_by_grammars(_cpu_runner(path, None), 0)
    room = Room(SLOTS, 300)
    wanted, wanted_logprobs = generate_by_grammars(_cpu_runner(path, room.masks), 0)
    for slot, source in enumerate(SOURCES):
        if source is None:
            assert wanted[slot] == free[slot]
            continue
        for i, token in enumerate(wanted[slot]):
            assert token in allowed(source, wanted[slot][:i], 300)
    assert wanted_logprobs == wanted[4]
    for runner, ahead in (
        (_cpu_runner(path, Room(SLOTS, 300, late, 1).masks), 0),
        (on_gpu(masks=Room(SLOTS, 300, late, 2).masks, awaits=False), 0),
        (on_gpu(masks=Room(SLOTS, 300, late, 3).masks, awaits=False), 3),
        (on_gpu(masks=Room(SLOTS, 300, late, 4).masks), 0),
        (on_gpu(masks=Room(SLOTS, 300, late, 5).masks), 3),
    ):
        assert generate_by_grammars(runner, ahead) == (wanted, wanted_logprobs)


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
@pytest.mark.parametrize(("late", "admitted"), [(0.0, 0), (0.5, 0), (0.3, 2)])
def test_rows_that_turn_out_to_be_late_with_later_steps_under_way_lose_nothing(
    on_gpu, path, monkeypatch, late, admitted
) -> None:
    """Every row has a grammar and nothing else, tokens are seen steps after they were sampled, and
    prompts come between."""
    monkeypatch.setattr(gpu_runner.torch.cuda, "Event", gpu_on_cpu.SlowEvent)
    wanted = tokens_by_grammars(_cpu_runner(path, Room(SLOTS, 300).masks), 0, admitted)
    room = Room(SLOTS, 300, late, 6)
    runner = on_gpu(masks=room.masks)
    assert tokens_by_grammars(runner, 4, admitted) == wanted
    # The device has told matchers the tokens, and nobody else had to.
    assert {process.looked for process in room.processes} == {0}
    assert next(room.masks._pool._openings) == SLOTS + 1


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
@pytest.mark.parametrize(("sees", "is_seen"), [(True, True), (False, True), (True, False)])
def test_the_host_brings_masks_where_it_and_the_device_do_not_see_each_other_s_words(
    on_gpu, path, monkeypatch, caplog, sees, is_seen
) -> None:
    wanted = tokens_by_grammars(_cpu_runner(path, Room(SLOTS, 300).masks), 0, 2)
    runner = on_gpu(masks=Room(SLOTS, 300, 0.3, 7).masks)
    if not sees:  # it reads other memory
        elsewhere = SharedMasks(4, 10, 1, 0)
        addresses = elsewhere.tag_addresses(np.arange(4))
        monkeypatch.setattr(
            SharedMasks, "tag_addresses", lambda self, places: addresses[places % 4]
        )
    if not is_seen:  # it writes elsewhere
        token, tag = runner._extra._awaited._told_offsets
        runner._extra._awaited._told_offsets = token + 8, tag + 8
    runner._extra.check()
    assert (runner._extra._awaited is not None) == (sees and is_seen)
    assert ("the host brings masks" in caplog.text) != (sees and is_seen)
    assert tokens_by_grammars(runner, 2, 2) == wanted


def tokens_by_grammars(runner: Any, ahead: int, later: int) -> list[list[int]]:
    """COUNT tokens or more of each slot, all of which have a grammar and nothing else; the last
    `later` ones begin in a step of their own, some steps after the others."""
    make = np.random.default_rng(7)
    free = list(range(BLOCKS))
    admit = []
    for slot in range(SLOTS):
        prompt = make.integers(3, 300, 3 + 4 * slot).tolist()
        blocks = pack("i", [free.pop() for _ in range(15)])
        sampling = Sampling(seed=slot, max_tokens=99, temperature=0.7 * (slot % 3))
        admit.append(
            Admission(
                slot, slot, pack("i", prompt), b"", blocks, 0, sampling, grammar=grammar(str(slot))
            )
        )
    lengths = [3 + 4 * slot for slot in range(SLOTS)]
    begins = [0 if slot < SLOTS - later else 6 + slot for slot in range(SLOTS)]
    out: list[list[int]] = [[] for _ in admit]
    in_flight: deque[Any] = deque()
    n = 0
    while any(len(tokens) < COUNT for tokens in out):
        rows = [slot for slot in range(SLOTS) if begins[slot] <= n]
        counts = [lengths[slot] if begins[slot] == n else 1 for slot in rows]
        new = tuple(admit[slot] for slot in rows if begins[slot] == n)
        columns = {"run_slots": pack("i", rows), "run_counts": pack("i", counts)}
        in_flight.append(runner.launch(Step(1, n, admit=new, **columns)))
        n += 1
        while len(in_flight) > ahead:
            handle = in_flight.popleft()
            handle.event.synchronize() if hasattr(handle, "event") else None
            result = handle.result()
            slots = unpack("i", result.slots).tolist()
            brought = unpack("i", result.counts).tolist() if result.counts else [1] * len(slots)
            tokens = iter(unpack("i", result.tokens).tolist())
            for slot, count in zip(slots, brought, strict=True):
                if count:
                    out[slot].append(next(tokens))
    return [tokens[:COUNT] for tokens in out]


def test_results_may_leave_before_masks_are_waited_for(on_gpu) -> None:
    """When the tokens of the step before are known."""
    room = Room(SLOTS, 300)
    runner = on_gpu(masks=room.masks, awaits=False)
    seen: list[str] = []
    handles: list[Any] = []

    def meanwhile() -> None:
        assert all(handle.done() for handle in handles)
        seen.append("meanwhile")

    runner.notify(lambda: None, meanwhile)
    ready, launch = room.masks.ready, runner.launch
    room.masks.ready = lambda *given: seen.append("masks") or ready(*given)
    runner.launch = lambda step: handles.append(launch(step)) or handles[-1]
    generate_by_grammars(runner, 2)
    assert len(seen) >= 2 * COUNT and seen[::2] == ["meanwhile"] * (len(seen) // 2)
    assert set(seen[1::2]) == {"masks"}


def _cpu_runner(path, masks: GrammarMasks | None) -> AsyncFromSync:
    """Without `masks`, grammars are passed over."""
    runner = Runner(path, ModelConfig(), SchedulerConfig(max_num_seqs=SLOTS), CONFIG, incarnation=7)
    if masks is None:
        runner._masks.follow = lambda step: None
    else:
        runner._masks = masks
        runner._constraints._grammars._masks = masks
    return AsyncFromSync(runner)
