"""The runner on a GPU: steps are launched ahead and their tokens read back later, so that the GPU
never waits for the CPU.

`launch` puts a step on the stream and returns at once; its handle knows when the result has
arrived. Slots are kept twice: as columns on the host (lengths and tables, which are known ahead)
and on the device (last tokens too, which are not).
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import astuple, replace
from pagewire_kernels import cuda, cuda_quantized, masked_sampling
from pagewire_kernels.communicator import CheckedCommunicator
from pagewire_kernels.masked_sampling import LATE
from pagewire_kernels.slot_state import SlotState
from pagewire_protocol.agreed import GRAMMAR_FAILED
from pagewire_protocol.columns import FIRST_INCARNATION, Incarnation
from pagewire_protocol.messages import Shared, Step, StepCost, StepResult, WorkerFacts
from torch import Tensor

from ...config import ModelConfig, SchedulerConfig, WorkerConfig
from ...process.timers import wake_promptly
from ..load import gpu_memory, loader, memory_errors, weights
from ..load.rank_agreement import ALONE, Ranks
from ..step.apply import StepApplier, StepRows, facts_of, spread
from ..step.grammar_masks import GrammarMasks, Keys
from ..step.rank_masks import MakeMasks
from ..step.slots import Bools, Ints, Slots
from . import first_start, gemm_autotune, step_cost, verify_hopper
from .awaited_sampling import AwaitedSampling, is_readable
from .decode_graphs import Decoded, DecodeGraphs
from .mixed_steps import MixedSteps
from .resample import ExtraSampling, StepLogprobs
from .stage_part import StagePart
from .staging import Uploads, Waiter
from .step_meter import StepMeter

log = logging.getLogger("pagewire.worker")
RING: Final = 16
"""Buffers for sampled tokens on their way to the host. A step's buffer is used again RING steps
later, when its result must have been read: there are more than steps in flight."""


class StepObserver(Protocol):
    """Looks on while steps are launched."""

    def begin(self) -> None:
        """Before a step's first launch."""
        ...

    def end(self, tokens: int) -> None:
        """After its last; the step computes so many tokens."""
        ...


@dataclass
class GpuStep:
    """The handle of a launched step, of the rows that sample: `slots` [S]. sampled_tokens int32 is
    pinned memory, whose first S entries mean something once `event` has happened: a token each, -1
    where logits were not finite, LATE where the device had no mask."""

    step: Step
    incarnation: Incarnation
    slots: npt.NDArray[np.int32]
    sampled_tokens: Tensor
    event: torch.cuda.Event
    logprobs: StepLogprobs | None
    ready: Bools | None = None
    """[S]: which rows have a token, as far as the host decides it; None: each. The masks of the
    others were not there."""
    failed: Bools | None = None
    """[S]: which rows' grammars cannot be held any further; None: none."""
    communicator: CheckedCommunicator | None = None
    """To the other ranks, where its operations may fail unseen."""
    starved: bool = False
    """See StepResult."""

    def done(self) -> bool:
        """Raises RuntimeError when the GPU has failed, and CommunicatorFailed when another rank
        has."""
        has_happened = self.event.query()
        if self.communicator is not None:
            self.communicator.check()
        return has_happened

    def result(self) -> StepResult:
        """See runners.StepHandle."""
        tokens = self.sampled_tokens.numpy()[: len(self.slots)]
        flags = (tokens < 0).view(np.uint8)
        if self.failed is not None:
            flags[self.failed] = GRAMMAR_FAILED
        brought = np.where(tokens < 0, 0, tokens).astype(np.int32)
        counts = b""
        ready = self.have_tokens()
        if ready is not None:
            brought = brought[ready]
            flags[~ready] = 0
            counts = ready.astype(np.int32).tobytes()
        return StepResult(
            self.step.epoch,
            self.incarnation,
            self.step.n,
            self.slots.tobytes(),
            brought.tobytes(),
            flags.tobytes(),
            self.logprobs.columns(tokens, ready) if self.logprobs else None,
            self.logprobs.prompt_logprobs() if self.logprobs else (),
            counts,
            self.starved,
        )

    def have_tokens(self) -> Bools | None:
        """[S], once it is done: which rows have a token; None: each."""
        on_time = self.sampled_tokens.numpy()[: len(self.slots)] != LATE
        if on_time.all():
            return self.ready
        return on_time if self.ready is None else on_time & self.ready


class LaunchedRun(NamedTuple):
    """What a step left on the device, of the rows that sample: their tokens, their
    log-probabilities, and which of them have a token (None: each)."""

    sampled_tokens: Tensor | None = None
    logprobs: StepLogprobs | None = None
    ready: Bools | None = None

    def brings(self, slots: Ints) -> Ints:
        """Those of `slots` [S], the rows that sample, that have a token."""
        return slots if self.ready is None else slots[self.ready]


class GrammarRows(NamedTuple):
    """The rows [G] of a step in flight that have grammars, the streams that they belong to, as what
    matchers knew these when it was launched, and whether the device tells matchers the tokens."""

    handle: GpuStep
    rows: Ints
    keys: Keys
    openings: npt.NDArray[np.uint64]
    by_device: Bools


@dataclass
class GpuParts:
    """What a runner runs steps with. All of them share the slots and `state`, the device's copy of
    them."""

    loaded: loader.Loaded
    slots: Slots
    state: SlotState
    uploads: Uploads
    graphs: DecodeGraphs
    mixed: MixedSteps
    extra: ExtraSampling
    masks: GrammarMasks
    ring: list[Tensor]
    """Buffers int32 [slots] of pinned memory, for sampled tokens: RING, and one for each further
    pipeline stage."""
    stage: StagePart | None = None
    """Of a model that is divided into pipeline stages."""


def start(
    path: Path,
    model: ModelConfig,
    scheduler: SchedulerConfig,
    config: WorkerConfig,
    incarnation: Incarnation = FIRST_INCARNATION,
    progress: weights.Progress = lambda stage, fraction: None,
    ranks: Ranks = ALONE,
    make_masks: MakeMasks = GrammarMasks,
    kind: "type[GpuRunner] | None" = None,
) -> "GpuRunner":
    """A runner that is ready to serve, a GpuRunner or of another `kind`: the model is loaded, kernels
    are compiled, verified, chosen and captured, and steps have been timed. Raises what loading
    raises, and ValueError for more steps in flight than there are buffers for."""
    check_ring(scheduler.steps_in_flight)
    loaded = loader.load(path, model, config, progress, scheduler, ranks)
    eager = config.enforce_eager or not loaded.capturable
    cascade = scheduler.enable_cascade and not loaded.on_gpu.attends_by_torch
    with torch.inference_mode(), memory_errors.explained("capturing graphs", loaded.sizing):
        parts = _allocate(loaded, model, config.block_size, eager, cascade, make_masks, ranks)
        if not eager:
            _compile_ahead(parts, ranks, config, progress)
        _settle_hopper(parts, config.hopper_attention)
        if not eager:
            gemms = gemm_autotune.record(cuda.OPS.choices.gemm, parts.mixed.probe)
            in_turn(ranks, lambda: _choose_gemms(parts, gemms, progress))
        _capture(parts, progress)
        cost = step_cost.measure(parts.mixed, loaded, loaded.on_gpu.step_tokens)
    _log_outcome(loaded, cost)
    if not ranks.stage.is_whole:
        # the first stage may have a step long before the last one is ready
        ranks.wait()
    checked = ranks.checked()
    if checked is not None:
        checked.serve()
    return (kind or GpuRunner)(parts, cost, incarnation, _observers(config), checked)


def check_ring(steps_in_flight: int) -> None:
    """Raises ValueError where the scheduler may send more steps ahead than there are buffers for
    their tokens."""
    if steps_in_flight >= RING:
        raise ValueError(
            f"{steps_in_flight} steps in flight need more than {steps_in_flight} buffers for "
            f"sampled tokens, and a GPU worker has {RING}: lower --steps-in-flight"
        )


def _allocate(
    loaded: loader.Loaded,
    model: ModelConfig,
    block_size: int,
    eager: bool,
    cascade: bool,
    make_masks: MakeMasks,
    ranks: Ranks,
) -> GpuParts:
    slots = Slots(loaded.on_gpu.rows, loaded.sizing.max_model_len, block_size)
    # One slot more on the device, which takes what padding writes.
    state = SlotState.empty(slots.count + 1, slots.tables.shape[1], "cuda")
    uploads = Uploads("cuda")
    pool = torch.cuda.graph_pool_handle()
    vocab_size = loaded.decoder.arch.vocab_size
    masks = make_masks(slots.count, model, vocab_size, tuple(loaded.eos_token_ids))
    stage = None
    if not ranks.stage.is_whole:
        most_tokens = max(loaded.on_gpu.step_tokens, 2 * slots.count)
        stage = StagePart(loaded, ranks, most_tokens)
    buffers = RING + ranks.stage.count - 1
    awaited = None
    if ranks.size == 1 and is_readable(masks.shared):
        awaited = AwaitedSampling(
            slots, state, uploads, masks, vocab_size, masked_sampling.sample_masked
        )
    return GpuParts(
        loaded,
        slots,
        state,
        uploads,
        DecodeGraphs(loaded, state, slots.count, eager, cascade, pool, stage),
        MixedSteps(loaded, slots, state, uploads, eager, cascade, pool, stage),
        ExtraSampling(loaded, slots, state, uploads, masks, awaited=awaited),
        masks,
        [torch.empty(slots.count, dtype=torch.int32, pin_memory=True) for _ in range(buffers)],
        stage,
    )


def _compile_ahead(
    parts: GpuParts, ranks: Ranks, config: WorkerConfig, progress: weights.Progress
) -> None:
    """What the rest of the start launches."""
    loaded = parts.loaded
    arch, tokens = loaded.decoder.rank_arch, loaded.on_gpu.step_tokens

    def launches() -> first_start.Launches:
        compared: list[Callable[[], float]] = []
        if config.hopper_attention:
            compared = verify_hopper.comparisons(
                cuda.OPS.choices, loaded.caches[0], arch.num_heads, parts.mixed.row_counts()
            )
        quantized = verify_hopper.quantized_comparisons(
            cuda.OPS.choices, loaded.dtype, torch.device("cuda")
        )
        return first_start.Launches(
            [
                *compared,
                *quantized,
                *step_cost.attentions(parts.mixed, loaded),
                parts.extra.warm_up,
            ],
            [*parts.mixed.rehearsals(tokens), *parts.graphs.rehearsals()],
        )

    first_start.compile_kernels(
        launches,
        (
            arch,
            ranks.stage,
            loaded.dtype,
            cuda_quantized.compiled_for(loaded.decoder.packed()),
            config,
            loaded.sizing.max_model_len,
            tokens,
            parts.slots.count,
        ),
        ranks.local,
        lambda fraction: progress("compiling kernels", fraction),
    )


def _settle_hopper(parts: GpuParts, wanted: bool) -> None:
    """Before anything is captured, since graphs keep the kernels they were captured with."""
    choices = cuda.OPS.choices
    if wanted:
        heads = parts.loaded.decoder.rank_arch.num_heads
        cache = parts.loaded.caches[0]
        verify_hopper.check_prefill(choices, cache, heads, parts.mixed.row_counts())
    else:
        choices.hopper_prefill = False
    verify_hopper.check_quantized(choices, parts.loaded.dtype, torch.device("cuda"))


def _choose_gemms(parts: GpuParts, gemms: gemm_autotune.Gemms, progress: weights.Progress) -> None:
    """For every number of rows that a GEMM of a captured step can have."""
    graphs, mixed = parts.graphs, parts.mixed
    rows = sorted({*graphs.sizes, *graphs.cascade_sizes, *mixed.row_counts()})
    tokens = sorted({*rows, *mixed.sizes(parts.loaded.on_gpu.step_tokens)})
    gemm_autotune.choose(
        cuda.OPS.choices.gemm,
        gemms,
        tokens,
        rows,
        lambda fraction: progress("timing GEMMs", fraction),
    )


def in_turn(ranks: Ranks, choose: Callable[[], None]) -> None:
    """`choose` on all ranks. Those of a stage run the same layers together: what they compute alike,
    as routers, must be computed by the same kernels. So the first rank of each stage times them, one
    stage after the other, and the others read what it has kept."""
    is_leader = not ranks.layers.rank
    for stage in range(ranks.stage.count):
        if is_leader and stage == ranks.stage.index:
            choose()
        ranks.wait()
    if not is_leader:
        choose()


def _capture(parts: GpuParts, progress: weights.Progress) -> None:
    """The largest first: later graphs then fit into the memory of earlier ones."""
    parts.mixed.capture_all(
        parts.loaded.on_gpu.step_tokens,
        lambda fraction: progress("capturing steps with prompts", fraction),
    )
    parts.graphs.capture_all(lambda fraction: progress("capturing decode steps", fraction))
    if parts.stage is None or parts.stage.is_last:
        parts.extra.warm_up()
        parts.extra.check()


def _log_outcome(loaded: loader.Loaded, cost: StepCost) -> None:
    reserved, most_reserved = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
    free = torch.cuda.mem_get_info()[0]
    log.info(gpu_memory.outcome(loaded.sizing, reserved, most_reserved, free))
    log.info(
        "steps take %.2f ms and %.4f a token; %.2f and %.2f a million pairs and reads",
        *astuple(cost),
    )


def _observers(config: WorkerConfig) -> list[StepObserver]:
    observers: list[StepObserver] = []
    if config.log_steps:
        observers.append(StepMeter())
    if config.log_kernels:
        # It needs torch's profiler, which those who do not ask for it need not have.
        from .kernel_profile import KernelProfile

        observers.append(KernelProfile())
    return observers


class GpuRunner:
    """An AsyncRunner (worker/runners.py) on a GPU; `start` makes one."""

    def __init__(
        self,
        parts: GpuParts,
        cost: StepCost,
        incarnation: Incarnation,
        observers: list[StepObserver],
        communicator: CheckedCommunicator | None = None,
    ) -> None:
        """communicator: to the other ranks, where its operations may fail unseen."""
        self._communicator = communicator
        self._loaded = parts.loaded
        self._slots = parts.slots
        self._state = parts.state
        self._uploads = parts.uploads
        self._graphs = parts.graphs
        self._mixed = parts.mixed
        self._extra = parts.extra
        self._masks = parts.masks
        self._late: Ints = np.zeros(0, np.int64)
        """Slots whose masks the step that is being launched goes without."""
        self._unlearned: deque[GrammarRows] = deque()
        """Steps in flight whose tokens the grammars have not been told. Until then, slots count a
        token of each of these rows, though some may turn out to be late."""
        self._num_known = np.zeros(self._slots.count, np.int64)
        """By slot with a grammar: how many of its tokens the host knows."""
        self._cost = cost
        self._incarnation = incarnation
        self._observers = observers
        self._ring = parts.ring
        self._is_whole = parts.stage is None
        self._last_end: torch.cuda.Event | None = None
        """Of the step that was launched before."""
        self._waiter: Waiter | None = None
        self._meanwhile: Callable[[], None] = lambda: None
        self._applier = StepApplier(self._slots)
        self._uploaded_version = -1
        """The version of the applier's rows that the graphs' slot buffer holds."""
        self._cascade_size = 0
        """The bucket of these rows where they have blocks in common, else 0."""

    def facts(self) -> WorkerFacts:
        """See AsyncRunner."""
        facts = facts_of(self._loaded, self._slots.count, bool(self._graphs.cascade_sizes))
        return replace(
            facts, cost=self._cost, max_num_batched_tokens=self._loaded.on_gpu.step_tokens
        )

    def notify(self, wake: Callable[[], None], meanwhile: Callable[[], None]) -> None:
        """See AsyncRunner; `wake` is called from another thread."""
        self._waiter = Waiter(wake)
        wake_promptly()
        self._meanwhile = meanwhile

    def clear(self) -> None:
        """See AsyncRunner."""
        self._applier.clear()
        self._masks.clear()
        self._unlearned.clear()

    def catch_up(self) -> None:
        """See AsyncRunner."""
        self._learn()

    def idle(self) -> bool:
        """See AsyncRunner."""
        try:
            return self._mixed.capture_next()
        except torch.OutOfMemoryError as error:
            # another process took what this one had planned with; the next larger graph serves
            torch.cuda.empty_cache()
            log.warning("no memory for one more graph of steps with prompts: %s", error)
            return False

    def launch(self, step: Step) -> GpuStep:
        """See AsyncRunner."""
        with torch.inference_mode():
            # Before a slot may have another request: streams still tell whose a token is.
            self._learn(wait=False)
            slots, counts = self._applier.apply(step)
            for observer in self._observers:
                observer.begin()
            self._masks.follow(step)
            # Before `take`: a request begins on the device where it begins on the host.
            self._mirror(step)
            rows = self._applier.take(slots, counts)
            starved = self._is_starved()
            run = self._run(rows, step.shared)
            sampled_slots = slots[rows.sampling]
            # The host counts the tokens it will only see later.
            self._slots.num_tokens[run.brings(sampled_slots)] += 1
            for observer in self._observers:
                observer.end(int(counts.sum()))
            handle = self._handle(step, sampled_slots.astype(np.int32), run)
            handle.starved = starved
            if len(self._late):
                self._hold_back(self._late)
                self._late = self._late[:0]
            if self._masks.any:
                self._note_grammars(handle, sampled_slots)
            return handle

    def _is_starved(self) -> bool:
        """The device has computed all that it was given. It says nothing about a stage, which may wait
        for the stage before it."""
        return self._is_whole and self._last_end is not None and self._last_end.query()

    def _note_grammars(self, handle: GpuStep, slots: Ints) -> None:
        """The grammars of `slots` [S], which `handle` samples, have to hear of its tokens."""
        concerned = self._masks.concerns(slots)
        if handle.ready is not None:
            concerned &= handle.ready
        rows = np.flatnonzero(concerned)
        if len(rows):
            held = slots[rows]
            awaits = self._extra.awaits(held)
            keys, openings = self._masks.keys(held), self._masks.openings(held)
            self._unlearned.append(GrammarRows(handle, rows, keys, openings, awaits))

    def _learn(self, wait: bool = False) -> None:
        """Tell the grammars the tokens of steps that are done; with `wait`, of all steps."""
        if not self._unlearned or not (wait or self._unlearned[0].handle.event.query()):
            return
        self._masks.look_at_times()
        while self._unlearned and (wait or self._unlearned[0].handle.event.query()):
            part = self._unlearned.popleft()
            part.handle.event.synchronize()
            self._learn_from(part)

    def _learn_from(self, part: GrammarRows) -> None:
        tokens = part.handle.sampled_tokens.numpy()[part.rows]
        slots = part.handle.slots[part.rows].astype(np.int64)
        current = self._masks.keys(slots) == part.keys
        late = slots[current & (tokens == LATE)]
        if len(late):
            self._slots.num_tokens[late] -= 1
            self._slots.hold_back(late)
        finite = tokens >= 0
        known = slots[current & finite]
        self._slots.tokens[known, self._num_known[known]] = tokens[current & finite]
        self._num_known[known] += 1
        self._masks.append(
            part.keys[finite], tokens[finite], part.openings[finite], part.by_device[finite]
        )

    def _ready(self, slots: Ints, has_prompts: bool = False) -> Bools | None:
        """[S]: which of `slots` [S], whose logits are being computed, can be sampled as far as the
        host decides it; None: each. Those with grammars need the tokens of the steps before, for
        which this waits: the device computes meanwhile. has_prompts: the step."""
        if not self._masks.any:
            return None
        concerned = self._masks.concerns(slots)
        decided = concerned & ~self._extra.awaits(slots)
        if not decided.any():
            # What comes next may be nothing but the same step again.
            alone = not self._unlearned and bool(concerned.all())
            if alone and (has_prompts or self._masks.are_slow(slots)):
                self._wait_for_masks(slots)
            return None
        self._learn(wait=True)
        ready = self._wait_for_masks(slots) | ~decided
        if ready.all():
            return None
        late = slots[~ready]
        self._slots.hold_back(late)
        self._late = late
        return ready

    def _wait_for_masks(self, slots: Ints) -> Bools:
        """[S]: for which of `slots` [S] there are masks, or need be none. Waits a little."""
        computed = torch.cuda.Event()
        computed.record()
        self._meanwhile()
        positions = self._slots.num_output_tokens(slots)
        return self._masks.ready(slots, positions, computed.query)

    def _hold_back(self, slots: Ints) -> None:
        """What the step's kernels have said of `slots` [N] does not count: their next step computes
        their last tokens again. After all that the host waits for."""
        last = self._slots.tokens[slots, self._slots.num_tokens[slots] - 1]
        columns = np.stack((slots, last, self._slots.num_computed[slots]))
        index, last_token, num_computed = self._uploads.up(columns.astype(np.int64)).unbind(0)
        self._state.last_token[index] = last_token.int()
        self._state.num_computed[index] = num_computed.int()

    def _handle(
        self,
        step: Step,
        slots: npt.NDArray[np.int32],
        run: LaunchedRun,
    ) -> GpuStep:
        """Queue the tokens' way to the host, and the event that says that they have arrived."""
        host = self._ring[step.n % len(self._ring)]
        if run.sampled_tokens is not None:
            host[: len(slots)].copy_(run.sampled_tokens[: len(slots)], non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._last_end = event
        if self._waiter is not None:
            self._waiter.watch(event)
        failed = self._masks.failed(slots) if self._masks.any else None
        return GpuStep(
            step,
            self._incarnation,
            slots,
            host,
            event,
            run.logprobs,
            run.ready,
            failed,
            self._communicator,
        )

    def _mirror(self, step: Step) -> None:
        """Bring what the step changed in the host's slots to the device."""
        if step.admit:
            self._admit(np.array([admission.slot for admission in step.admit], np.int64))
        if step.grow_slots:
            self._grow(np.frombuffer(step.grow_slots, np.int32).astype(np.int64))

    def _grow(self, grow_slots: Ints) -> None:
        """The last blocks of each slot's table, as many as it is named times."""
        slots = self._slots
        grown, num_new = np.unique(grow_slots, return_counts=True)
        row_of, back = spread(np.zeros_like(grown), num_new)
        slot = grown[row_of]
        column = slots.num_blocks[slot] - 1 - back
        blocks = slots.tables[slot, column].astype(np.int64)
        uploaded = self._uploads.up(np.stack((slot, column, blocks)))
        self._state.table[uploaded[0], uploaded[1]] = uploaded[2].int()

    def _admit(self, new: Ints) -> None:
        slots, state, up = self._slots, self._state, self._uploads.up
        index = up(new)
        width = max(1, int(slots.num_blocks[new].max()))
        state.table[:, :width][index] = up(slots.tables[new, :width])
        last_token = slots.tokens[new, slots.num_tokens[new] - 1]
        ints = up(np.stack((last_token, slots.num_computed[new])).astype(np.int32))
        state.last_token[index] = ints[0]
        state.num_computed[index] = ints[1]
        state.sampling_params[index] = up(slots.sampling_params[new])
        state.seeds[index] = up(slots.seed[new])
        self._num_known[new] = slots.num_tokens[new]
        self._admit_extra(new)

    def _admit_extra(self, new: Ints) -> None:
        self._extra.admit(new)

    def _run(self, rows: StepRows, shared: Shared | None) -> LaunchedRun:
        if not len(rows.slots):
            return LaunchedRun()
        if len(rows.sampling) == len(rows.slots) and (rows.counts == 1).all():
            return self._decode(rows.slots, shared)
        return self._run_mixed(rows, shared)

    def _decode(self, slots: Ints, shared: Shared | None) -> LaunchedRun:
        self._extra.begin(slots)
        decoded = self._replay(slots, shared, bool(self._slots.filtered[slots].any()))
        ready = self._ready(slots)
        logprobs = self._extra.resample(decoded.logits, slots, decoded.sampled_tokens, ready=ready)
        return LaunchedRun(decoded.sampled_tokens, logprobs, ready)

    def _replay(self, slots: Ints, shared: Shared | None, filtered: bool) -> Decoded:
        """A step of one token for each of `slots`, as far as graphs have it."""
        if self._applier.version != self._uploaded_version:
            padded = np.full(len(self._graphs.slots), -1, np.int32)
            padded[: len(slots)] = slots
            self._uploads.up(padded, out=self._graphs.slots)
            self._uploaded_version = self._applier.version
            self._cascade_size = self._graphs.group(shared, len(slots), self._uploads)
        size = self._cascade_size or self._graphs.bucket(len(slots))
        return self._graphs.run(size, len(slots), filtered, self._cascade_size > 0)

    def _run_mixed(self, rows: StepRows, shared: Shared | None) -> LaunchedRun:
        logprobs = StepLogprobs()
        sampled_slots = rows.slots[rows.sampling]
        hook = self._extra.prompt_hook(rows.slots, rows.first, rows.end, logprobs)
        self._extra.begin(sampled_slots, has_prompts=True)
        # Until the grammars are told, some rows that slots count a token of may turn out to be late.
        moved = bool(self._unlearned)
        decoded = self._mixed.run(rows, self._extra.host_known_len, shared, hook, moved)
        if not len(sampled_slots):
            return LaunchedRun(None, logprobs)
        ready = self._ready(sampled_slots, has_prompts=True)
        self._extra.resample(decoded.logits, sampled_slots, decoded.sampled_tokens, logprobs, ready)
        return LaunchedRun(decoded.sampled_tokens, logprobs, ready)
