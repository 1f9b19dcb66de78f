"""Steps to tokens: applies a Step to the slots, runs the model over what the step names, samples,
and appends what was sampled.

Knows no sockets, no scheduler and no policy. The fake runner has the same three methods, which are
all that the loop uses.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pagewire_kernels.batch import Batch
from pagewire_protocol.columns import FIRST_INCARNATION, Incarnation
from pagewire_protocol.messages import PromptLogprobs, Step, StepResult, WorkerFacts
from torch import Tensor

from ...config import ModelConfig, SchedulerConfig, WorkerConfig
from ..load import loader, weights
from ..step.apply import NO_SLOTS, apply_step, facts_of, spread
from ..step.logit_constraints import Limits
from ..step.logprobs import PromptRun, PromptScores, prompt_runs, score_prompts
from ..step.slots import Ints, Slots
from . import sampler


class Runner:
    """facts() -> WorkerFacts: what it can hold. execute(step: Step) -> StepResult: one forward
    pass, result complete with epoch, incarnation and n; raises BadStep for a step that contradicts
    the slots. clear(): forget every request (a new scheduler reigns)."""

    def __init__(
        self,
        path: Path,
        model: ModelConfig,
        scheduler: SchedulerConfig,
        config: WorkerConfig,
        incarnation: Incarnation = FIRST_INCARNATION,
        progress: weights.Progress = lambda stage, fraction: None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """`progress` hears what is loaded, `tick` is called after every layer: a heartbeat must not
        wait for a long step."""
        self._loaded = loader.load(path, model, config, progress)
        self._incarnation, self._device, self._tick = incarnation, self._loaded.device, tick
        self._caches = self._loaded.caches
        self._slots = Slots(
            scheduler.num_seqs(), self._loaded.sizing.max_model_len, config.block_size
        )
        vocab_size, eos = self._loaded.decoder.arch.vocab_size, self._loaded.eos_token_ids
        self._limits = Limits(self._slots, vocab_size, eos, self._device, self._tensor)
        self._scored: list[PromptScores] = []
        self._last = NO_SLOTS

    def facts(self) -> WorkerFacts:
        return facts_of(self._loaded, self._slots.count)

    def clear(self) -> None:
        self._slots.clear()
        self._last = NO_SLOTS

    def execute(self, step: Step) -> StepResult:
        slots, counts = apply_step(self._slots, step, self._last)
        if step.admit:
            self._limits.admit(np.array([admission.slot for admission in step.admit], np.int64))
        first, end = self._slots.take(slots, counts)
        self._last = slots
        sampling = np.flatnonzero(self._slots.samples(slots, end))
        sampled = None
        if len(slots):
            with torch.inference_mode():
                sampled = self._run(slots, counts, first, end, sampling)
        if sampled is None:
            return StepResult(
                step.epoch,
                self._incarnation,
                step.n,
                b"",
                b"",
                b"",
                prompt_logprobs=self._prompt_logprobs(),
            )
        rows = slots[sampling]
        self._slots.append_tokens(rows, sampled.tokens)
        self._limits.said(rows, self._tensor(sampled.tokens))
        return StepResult(
            step.epoch,
            self._incarnation,
            step.n,
            rows.astype(np.int32).tobytes(),
            sampled.tokens.tobytes(),
            sampled.bad.tobytes(),
            None if sampled.logprobs is None else sampled.logprobs.columns(sampled.tokens),
            self._prompt_logprobs(),
        )

    def _prompt_logprobs(self) -> tuple[PromptLogprobs, ...]:
        scored, self._scored = self._scored, []
        return tuple(part.message() for part in scored)

    def _run(
        self, slots: Ints, counts: Ints, first: Ints, end: Ints, sampling: Ints
    ) -> sampler.Sampled | None:
        self._scrub(slots, first, end)
        rows, positions = spread(first, counts)
        ids = self._tensor(self._slots.tokens[slots[rows], positions].astype(np.int64))
        batch = self._batch(slots, counts, end, rows, positions)
        everything = len(sampling) == len(positions)
        wanted = None if everything else self._tensor((np.cumsum(counts) - 1)[sampling])
        loaded = self._loaded
        if not len(sampling):
            wanted = self._tensor(NO_SLOTS)
        runs = prompt_runs(self._slots, slots, first, end)
        tap = (lambda logits_of: self._score(runs, logits_of)) if runs else None
        logits = loaded.decoder(ids, loaded.cos_sin, self._caches, batch, wanted, self._tick, tap)
        return self._sample(logits, slots[sampling]) if len(sampling) else None

    def _score(self, runs: list[PromptRun], logits_of: Callable[[Tensor], Tensor]) -> None:
        self._scored = score_prompts(
            runs, logits_of, self._loaded.decoder.arch.vocab_size, self._tensor
        )

    def _batch(self, slots: Ints, counts: Ints, end: Ints, rows: Ints, positions: Ints) -> Batch:
        size = self._slots.block_size
        width = -(-int(end.max()) // size)
        tables = self._slots.tables[slots, :width]
        mapping = tables[rows, positions // size].astype(np.int64) * size + positions % size
        starts = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        return Batch(
            self._tensor(positions),
            self._tensor(mapping),
            self._tensor(starts),
            self._tensor(end.astype(np.int32)),
            self._tensor(tables),
            int(counts.max()),
            int(end.max()),
        )

    def _scrub(self, slots: Ints, first: Ints, end: Ints) -> None:
        """Zero each block that this step is the first to write and does not fill: the CPU's batched
        attention multiplies what lies past the end by zero, and zero times another request's NaN is
        NaN."""
        if self._device != "cpu":
            return
        size = self._slots.block_size
        last = (end - 1) // size
        fresh = np.flatnonzero((first <= last * size) & (end % size != 0))
        if len(fresh):
            blocks = self._slots.tables[slots[fresh], last[fresh]].astype(np.int64)
            self._loaded.cache.index_fill_(2, torch.from_numpy(blocks), 0)

    def _sample(self, logits: Tensor, slots: Ints) -> sampler.Sampled:
        if self._slots.plain[slots].all():
            return sampler.greedy(logits)
        state = self._slots
        output = state.known[slots] - state.prompt[slots]
        penalized = (
            (state.presence[slots] != 0)
            | (state.frequency[slots] != 0)
            | (state.repetition[slots] != 1)
        )
        rows = sampler.Rows(
            temperature=self._tensor(state.temperature[slots]),
            top_k=self._tensor(state.top_k[slots]),
            top_p=self._tensor(state.top_p[slots]),
            min_p=self._tensor(state.min_p[slots]),
            presence=self._tensor(state.presence[slots]),
            frequency=self._tensor(state.frequency[slots]),
            repetition=self._tensor(state.repetition[slots]),
            seeds=self._tensor(state.seed[slots]),
            positions=self._tensor(output),
            logprobs=state.logprobs[slots],
            history={int(i): self._history(int(slots[i])) for i in np.flatnonzero(penalized)},
            restrict=lambda x: self._limits.apply(x, slots),
        )
        return sampler.sample(logits, rows)

    def _history(self, slot: int) -> tuple[Tensor, Tensor]:
        prompt, known = self._slots.prompt[slot], self._slots.known[slot]
        tokens = self._slots.tokens[slot, :known].astype(np.int64)
        return self._tensor(tokens[:prompt]), self._tensor(tokens[prompt:])

    def _tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device == "cpu" else tensor.to(self._device, non_blocking=True)
