"""Steps to tokens: applies a Step to the slots, runs the model over what the step names, samples,
and appends what was sampled.

Knows no sockets, no scheduler and no policy.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from pagewire_kernels import cpu_sampling
from pagewire_kernels.batch import Batch
from pagewire_kernels.kv_cache import raw
from pagewire_kernels.sampling_map import SamplingRows
from pagewire_protocol.agreed import GRAMMAR_FAILED
from pagewire_protocol.columns import FIRST_INCARNATION, Incarnation
from pagewire_protocol.messages import Step, StepResult, WorkerFacts
from torch import Tensor

from ...config import ModelConfig, SchedulerConfig, WorkerConfig
from ..device import kernel_cache
from ..load import loader, weights
from ..load.rank_agreement import ALONE, Ranks
from ..models.decoder import LogitsHook
from ..step.apply import NO_SLOTS, StepApplier, StepRows, facts_of, spread
from ..step.forced_runs import MAX_RUN, ForcedRuns, brought, moved, take_runs, unchanged
from ..step.grammar_masks import GrammarMasks
from ..step.logit_constraints import Constraints
from ..step.logprobs import PromptSpan, SpanLogprobs, prompt_logprobs, prompt_spans
from ..step.rank_masks import MakeMasks
from ..step.slots import Ints, Slots
from . import sampler

log = logging.getLogger("pagewire.worker")


class StepTokens(NamedTuple):
    """All tokens of a step: slots [T] and positions [T] of each, and the batch that they make."""

    slots: Ints
    positions: Ints
    batch: Batch


class CpuSteps:
    """What every runner on a CPU has: a loaded model, or a part of one, slots, and the way from a
    step to a batch."""

    def __init__(
        self,
        path: Path,
        model: ModelConfig,
        scheduler: SchedulerConfig,
        config: WorkerConfig,
        incarnation: Incarnation = FIRST_INCARNATION,
        progress: weights.Progress = lambda stage, fraction: None,
        tick: Callable[[], None] = lambda: None,
        ranks: Ranks = ALONE,
        make_masks: MakeMasks = GrammarMasks,
    ) -> None:
        """`progress` hears what is loaded, `tick` is called after every layer: a heartbeat must not
        wait for a long step. `ranks`: the group that this is one of."""
        self._loaded = loader.load(path, model, config, progress, ranks=ranks)
        self._stages = ranks.stage.count
        self._incarnation = incarnation
        self._device = self._loaded.device
        self._tick = tick
        self._caches = self._loaded.caches
        self._slots = Slots(
            scheduler.num_seqs(), self._loaded.sizing.max_model_len, config.block_size
        )
        self._applier = StepApplier(self._slots)
        vocab_size = self._loaded.decoder.arch.vocab_size
        eos = self._loaded.eos_token_ids
        self._masks = make_masks(self._slots.count, model, vocab_size, tuple(eos))
        self._max_run = 0
        """Most tokens of a forced run."""

    def facts(self) -> WorkerFacts:
        """What it can hold."""
        facts = facts_of(self._loaded, self._slots.count, max_forced_tokens=self._max_run)
        return replace(facts, pipeline_parallel_size=self._stages)

    def clear(self) -> None:
        """Forget every request: there is a new scheduler."""
        self._applier.clear()
        self._masks.clear()

    def _begin(self, step: Step) -> StepRows:
        """Who leaves and enters the slots, and what is to be computed. Raises BadStep."""
        slots, counts = self._applier.apply(step)
        self._masks.follow(step)
        return self._applier.take(slots, counts)

    def _empty_result(self, step: Step) -> StepResult:
        """Of a step that samples nothing here."""
        return StepResult(step.epoch, self._incarnation, step.n, b"", b"", b"")

    def _prepare(self, step: StepRows) -> StepTokens:
        """What a forward pass over the tokens of `step`, of which there are some, is given."""
        self._zero_fresh_blocks(step)
        row_of, positions = spread(step.first, step.counts)
        return StepTokens(step.slots[row_of], positions, self._batch(step, row_of, positions))

    def _ids(self, tokens: StepTokens) -> Tensor:
        """[T] int64."""
        return self._tensor(self._slots.tokens[tokens.slots, tokens.positions].astype(np.int64))

    def _batch(self, step: StepRows, row_of: Ints, positions: Ints) -> Batch:
        block_size = self._slots.block_size
        longest = int(step.end.max())
        tables = self._slots.tables[step.slots, : -(-longest // block_size)]
        blocks = tables[row_of, positions // block_size].astype(np.int64)
        starts = np.zeros(len(step.slots) + 1, np.int32)
        np.cumsum(step.counts, out=starts[1:])
        return Batch(
            self._tensor(positions),
            self._tensor(blocks * block_size + positions % block_size),
            self._tensor(starts),
            self._tensor(step.end.astype(np.int32)),
            self._tensor(tables),
            int(step.counts.max()),
            longest,
        )

    def _zero_fresh_blocks(self, step: StepRows) -> None:
        """Zero each block that this step is the first to write and does not fill: the CPU's batched
        attention multiplies what lies past the end by zero, and zero times another request's NaN is
        NaN."""
        if self._device != "cpu":
            return
        block_size = self._slots.block_size
        last = (step.end - 1) // block_size
        fresh = np.flatnonzero((step.first <= last * block_size) & (step.end % block_size != 0))
        if len(fresh):
            blocks = self._slots.tables[step.slots[fresh], last[fresh]].astype(np.int64)
            raw(self._loaded.cache).index_fill_(2, torch.from_numpy(blocks), 0)

    def _tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device == "cpu" else tensor.to(self._device, non_blocking=True)


class Runner(CpuSteps):
    """A SyncRunner (worker/runners.py) on the CPU. Arguments are those of CpuSteps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        arch = self._loaded.decoder.arch
        eos = self._loaded.eos_token_ids
        self._constraints = Constraints(
            self._slots, self._masks, arch.vocab_size, eos, self._device, self._tensor
        )
        if self._stages == 1:
            # Of several stages, those before the last one count a token for each row.
            self._max_run = self._masks.allow_runs(MAX_RUN)
        self._forced = unchanged(NO_SLOTS, NO_SLOTS)
        """Of the running step."""
        self._prompt_logprobs: list[SpanLogprobs] = []
        """Of the prompts that the running step computes."""
        self._compiling: threading.Thread | None = None

    def execute(self, step: Step) -> StepResult:
        """One forward pass. Raises BadStep for a step that contradicts the slots."""
        return self._answer(step, self._begin(step))

    def _begin(self, step: Step) -> StepRows:
        slots, counts = self._applier.apply(step)
        self._masks.follow(step)
        if step.admit:
            self._constraints.admit(np.array([admission.slot for admission in step.admit]))
        self._forced = self._take_runs(slots, counts)
        return self._applier.take(self._forced.slots, self._forced.counts, slots)

    def _answer(self, step: Step, rows: StepRows) -> StepResult:
        """Compute and sample `rows`, those of `step`."""
        sampled = None
        late = NO_SLOTS
        if len(rows.slots):
            with torch.inference_mode():
                sampled, late = self._run(rows)
        if len(late) or self._forced.changed:
            return self._uneven(step, rows, self._forced, sampled, late)
        if sampled is None:
            return self._result(step, NO_SLOTS, None)
        sampled_slots = rows.slots[rows.sampling]
        self._append(sampled_slots, sampled)
        return self._result(step, sampled_slots, sampled)

    def _take_runs(self, slots: Ints, counts: Ints) -> ForcedRuns:
        """What a step that computes counts[i] tokens of slots[i] [N] computes with forced runs."""
        if not self._masks.any or not self._max_run:
            return unchanged(slots, counts)
        return take_runs(self._slots, self._masks, slots, counts)

    def _append(self, slots: Ints, sampled: sampler.Sampled) -> None:
        self._slots.append_tokens(slots, sampled.tokens)
        self._constraints.observe(slots, self._tensor(sampled.tokens))
        self._masks.append(self._masks.keys(slots), sampled.tokens)

    def _uneven(
        self,
        step: Step,
        rows: StepRows,
        forced: ForcedRuns,
        sampled: sampler.Sampled | None,
        late: Ints,
    ) -> StepResult:
        """The result of a step whose rows bring several tokens or none. Those of `late`, of the
        rows that sample, have no token of their own: their masks are not there yet, and they
        compute their last token again."""
        slots = rows.slots[rows.sampling]
        ready = np.ones(len(slots), np.bool_)
        ready[late] = False
        self._slots.hold_back(slots[late])
        result = self._result(step, slots[ready], sampled)
        flags = np.zeros(len(slots) + len(forced.left_out), np.uint8)
        if sampled is not None:
            self._append(slots[ready], sampled)
            flags[: len(slots)][ready] = sampled.bad
        runs = [forced.runs[row] for row in rows.sampling.tolist()]
        tokens, counts = brought(runs, ready, np.frombuffer(result.tokens, np.int32))
        return replace(
            result,
            slots=np.concatenate([slots, forced.left_out]).astype(np.int32).tobytes(),
            tokens=tokens.tobytes(),
            flags=flags.tobytes(),
            counts=np.pad(counts, (0, len(forced.left_out))).tobytes(),
            logprobs=moved(result.logprobs, counts, ready),
        )

    def _result(self, step: Step, slots: Ints, sampled: sampler.Sampled | None) -> StepResult:
        prompts = tuple(part.message() for part in self._prompt_logprobs)
        self._prompt_logprobs = []
        if sampled is None:
            return StepResult(
                step.epoch, self._incarnation, step.n, b"", b"", b"", prompt_logprobs=prompts
            )
        return StepResult(
            step.epoch,
            self._incarnation,
            step.n,
            slots.astype(np.int32).tobytes(),
            sampled.tokens.tobytes(),
            sampled.bad.tobytes(),
            None if sampled.logprobs is None else sampled.logprobs.columns(sampled.tokens),
            prompts,
        )

    def _run(self, step: StepRows) -> tuple[sampler.Sampled | None, Ints]:
        """What the rows that sample have sampled, None where no row does; and which of them had to
        be left out, since their masks are not there."""
        tokens = self._prepare(step)
        # The decoder gives the logits of all tokens for None, else of the tokens named.
        wanted = None
        if not len(step.sampling):
            wanted = self._tensor(NO_SLOTS)
        elif len(step.sampling) < len(tokens.positions):
            wanted = self._tensor((np.cumsum(step.counts) - 1)[step.sampling])
        spans = prompt_spans(self._slots, step.slots, step.first, step.end)
        hook = (lambda logits_of: self._keep_prompt_logprobs(spans, logits_of)) if spans else None
        logits = self._logits(tokens, wanted, hook)
        sampling = step.slots[step.sampling]
        if not len(sampling):
            return None, NO_SLOTS
        if not self._masks.any:
            return self._sample(logits, sampling), NO_SLOTS
        ready = self._masks.ready(sampling, self._slots.num_output_tokens(sampling))
        late = np.flatnonzero(~ready)
        if len(late):
            sampling = sampling[ready]
            logits = logits[self._tensor(np.flatnonzero(ready))]
        if not len(sampling):
            return None, late
        sampled = self._sample(logits, sampling)
        sampled.bad[self._masks.failed(sampling)] = GRAMMAR_FAILED
        return sampled, late

    def _logits(self, tokens: StepTokens, wanted: Tensor | None, hook: LogitsHook | None) -> Tensor:
        """[R, V], as of a decoder: the forward pass."""
        loaded = self._loaded
        return loaded.decoder(
            self._ids(tokens),
            loaded.cos_sin,
            self._caches,
            tokens.batch,
            wanted,
            self._tick,
            hook,
        )

    def _keep_prompt_logprobs(
        self, spans: list[PromptSpan], logits_of: Callable[[Tensor], Tensor]
    ) -> None:
        self._prompt_logprobs = prompt_logprobs(
            spans, logits_of, self._loaded.decoder.arch.vocab_size, self._tensor
        )

    def _sample(self, logits: Tensor, slots: Ints) -> sampler.Sampled:
        """One token for each of `slots` [R] from logits [R, V]."""
        columns = self._slots
        if columns.plain_greedy[slots].all():
            return sampler.greedy(logits)
        if columns.draws[slots].any():
            self._compile_search_once()
        return sampler.sample(logits, self._sampler_rows(slots))

    def _sampler_rows(self, slots: Ints) -> sampler.Rows:
        """What `slots` [R] ask of the sampler."""
        columns = self._slots
        sampling = SamplingRows(
            values=self._tensor(np.ascontiguousarray(columns.sampling_params[slots].T)),
            seeds=self._tensor(columns.seed[slots]),
            positions=self._tensor(columns.num_tokens[slots] - 1),
        )
        penalized = np.flatnonzero(columns.penalized(slots))
        return sampler.Rows(
            sampling,
            presence=self._tensor(columns.presence[slots]),
            frequency=self._tensor(columns.frequency[slots]),
            repetition=self._tensor(columns.repetition[slots]),
            logprobs=columns.logprobs[slots],
            history={int(row): self._history(int(slots[row])) for row in penalized},
            constrain=lambda x: self._constraints.apply(x, slots),
        )

    def _compile_search_once(self) -> None:
        """With the first request that draws, in a thread: it takes a second or two, and until then
        torch draws the same tokens."""
        if self._compiling is None and self._device == "cpu":
            # No daemon: a process must not end in the middle of a compilation.
            self._compiling = threading.Thread(target=_compile_search, name="compile-sampling")
            self._compiling.start()

    def _history(self, slot: int) -> tuple[Tensor, Tensor]:
        """The prompt's and the output's ids."""
        prompt_len = self._slots.num_prompt_tokens[slot]
        num_tokens = self._slots.num_tokens[slot]
        tokens = self._slots.tokens[slot, :num_tokens].astype(np.int64)
        return self._tensor(tokens[:prompt_len]), self._tensor(tokens[prompt_len:])


def _compile_search() -> None:
    try:
        kernel_cache.keep_native()
        cpu_sampling.compile_search()
    except Exception as error:  # whatever a compiler raises; torch goes on drawing
        log.info("sampling has no native code, which is slower for many rows: %s", error)
