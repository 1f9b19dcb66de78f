"""Rows that ask for more than the captured step does: penalties, limits, log-probabilities. They
are sampled once more, eagerly, from the step's logits, and the result replaces what the graph
wrote. Batches without such rows pay one look at a column. Knows no CUDA: plain torch and three
injected kernels, so that it runs on any device.

Output tokens are counted on the device, since the host learns them too late for the next step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pagewire_kernels import penalties, sampling
from pagewire_kernels.sampling import Sampled, SamplingRows
from pagewire_kernels.slot_state import SlotState
from pagewire_protocol.messages import LogprobColumns, PromptLogprobs
from torch import Tensor

from ..load.loader import Loaded
from ..step.logit_constraints import Limits
from ..step.logprobs import (
    PromptRun,
    PromptScores,
    SampledScores,
    prompt_runs,
    score,
    score_prompts,
)
from ..step.slots import Ints, Slots
from .staging import Uploads


@dataclass
class Extra:
    """Log-probabilities on their way to the host, of sampled tokens and of prompts."""

    sampled: SampledScores | None = None
    prompts: list[PromptScores] = field(default_factory=list[PromptScores])

    def columns(self, tokens: npt.NDArray[np.int32]) -> LogprobColumns | None:
        """tokens: those of the step's rows, below 0 where the logits were not finite."""
        return None if self.sampled is None else self.sampled.columns(tokens)

    def prompt_logprobs(self) -> tuple[PromptLogprobs, ...]:
        return tuple(prompt.message() for prompt in self.prompts)


def _widened(rows: Ints, most: int) -> Ints:
    """Padded by repeating the first, to a power of two or `most`, in fours: few numbers of rows,
    since kernels are compiled for each, and columns that start at multiples of 16 bytes. A row that
    is sampled twice gives the same token twice."""
    size = min(max(4, 1 << (len(rows) - 1).bit_length()), -(-most // 4) * 4)
    return np.concatenate((rows, np.repeat(rows[:1], size - len(rows))))


class Kernels(NamedTuple):
    sample: Callable[[Tensor, SamplingRows], Sampled]
    apply_penalties: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    count_tokens: Callable[[Tensor, Tensor, Tensor], None]


KERNELS: Final = Kernels(sampling.sample, penalties.apply_penalties, penalties.count_tokens)


class ExtraSampling:
    def __init__(
        self,
        loaded: Loaded,
        slots: Slots,
        state: SlotState,
        uploads: Uploads,
        kernels: Kernels = KERNELS,
    ) -> None:
        self._vocab, self._slots, self._state, self._up, self._kernels = (
            loaded.decoder.arch.vocab_size,
            slots,
            state,
            uploads.up,
            kernels,
        )
        self._device = state.last_token.device
        self._limits = Limits(slots, self._vocab, loaded.eos_token_ids, str(self._device), self._up)
        self.told = np.zeros(slots.count, np.int64)
        """Tokens of each slot that the host knows: those it was admitted with."""
        self._counts: Tensor | None = None
        self._prompted: Tensor | None = None

    def warm_up(self) -> None:
        """Compile and load what special rows need: the first such request would hold up all the
        others."""
        count = 1
        while count < 2 * self._slots.count:
            x = torch.zeros(count, self._vocab, device=self._device)
            wide = torch.ones(count, dtype=torch.int64, device=self._device)
            ones, small = torch.ones(count, device=self._device), wide.int()
            self._kernels.sample(x, SamplingRows(ones, small, ones, ones, wide, wide))
            count *= 2
        row, place = (
            torch.zeros(1, self._vocab, device=self._device),
            torch.zeros(1, dtype=torch.int64, device=self._device),
        )
        half = torch.full((1,), 0.5, device=self._device)
        self._kernels.apply_penalties(row, row.int(), row.to(torch.uint8), place, half, half, half)
        self._kernels.count_tokens(row.int(), place.int(), place.int())

    def admit(self, new: Ints) -> None:
        self.told[new] = self._slots.known[new]
        self._limits.admit(new)
        penalized = new[self._penalized(new)]
        if len(penalized):
            self._count_history(penalized)

    def _penalized(self, slots: Ints) -> npt.NDArray[np.bool_]:
        columns = self._slots
        return (
            (columns.presence[slots] != 0)
            | (columns.frequency[slots] != 0)
            | (columns.repetition[slots] != 1)
        )

    def _count_history(self, new: Ints) -> None:
        if self._counts is None or self._prompted is None:
            shape = (self._slots.count, self._vocab)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._prompted = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        for slot in new.tolist():
            prompt, known = int(self._slots.prompt[slot]), int(self._slots.known[slot])
            tokens = self._up(self._slots.tokens[slot, :known].astype(np.int64))
            self._counts[slot].copy_(torch.bincount(tokens[prompt:], minlength=self._vocab))
            self._prompted[slot].zero_()
            self._prompted[slot].index_fill_(0, tokens[:prompt], 1)

    def prompt_tap(
        self, run: Ints, first: Ints, end: Ints, extra: Extra
    ) -> Callable[[Callable[[Tensor], Tensor]], None] | None:
        """What looks at the logits of a step that computes positions first to end of the slots
        `run`; it notes in `extra` what it finds. None when nobody asked for log-probabilities of
        these."""
        runs = prompt_runs(self._slots, run, first, end)
        return (lambda logits_of: self._score(runs, logits_of, extra)) if runs else None

    def _score(
        self, runs: list[PromptRun], logits_of: Callable[[Tensor], Tensor], extra: Extra
    ) -> None:
        extra.prompts = score_prompts(runs, logits_of, self._vocab, self._up)

    def resample(
        self, logits: Tensor, slots: Ints, report: Tensor, extra: Extra | None = None
    ) -> Extra | None:
        """logits [R, V] and report [R] belong to the rows `slots`; the report and the slots' last
        tokens are overwritten where rows are special. Returns `extra`, or a new one, with the
        log-probabilities asked for."""
        columns = self._slots
        if not columns.special[slots].any():
            return extra
        penalized = self._penalized(slots)
        again = np.flatnonzero(penalized | self._limits.any(slots))
        if len(again):
            self._sample_again(logits, slots, _widened(again, columns.count), report)
        if penalized.any() and self._counts is not None:
            counted = np.flatnonzero(penalized)
            self._kernels.count_tokens(
                self._counts, self._up(slots[counted].astype(np.int32)), report[self._up(counted)]
            )
        wanted = np.flatnonzero(columns.logprobs[slots] >= 0)
        if not len(wanted):
            return extra
        extra = extra or Extra()
        extra.sampled = self._score_sampled(logits, report, wanted, columns.logprobs[slots[wanted]])
        return extra

    def _sample_again(self, logits: Tensor, slots: Ints, again: Ints, report: Tensor) -> None:
        columns, up, mine = self._slots, self._up, slots[again]
        index, places = up(again), up(mine)
        x = logits[index].float()
        self._limits.apply(x, mine)
        if self._counts is not None and self._prompted is not None:
            weights = up(
                np.stack(
                    (columns.presence[mine], columns.frequency[mine], columns.repetition[mine])
                ).astype(np.float32)
            )
            self._kernels.apply_penalties(
                x, self._counts, self._prompted, places, weights[0], weights[1], weights[2]
            )
        odds = up(
            np.stack((columns.temperature[mine], columns.top_p[mine], columns.min_p[mine])).astype(
                np.float32
            )
        )
        rows = SamplingRows(
            odds[0],
            up(columns.top_k[mine].astype(np.int32)),
            odds[1],
            odds[2],
            up(columns.seed[mine]),
            up(columns.known[mine] - 1),
        )
        sampled = self._kernels.sample(x, rows)
        tokens = sampled.tokens.int()
        report[index] = torch.where(sampled.bad, -1, tokens)
        self._state.last_token[places] = tokens
        self._limits.said(mine, tokens)

    def _score_sampled(
        self, logits: Tensor, report: Tensor, rows: Ints, wanted: Ints
    ) -> SampledScores:
        index = self._up(rows)
        scores = score(logits[index], report[index].long().clamp(min=0), int(wanted.max()))
        return SampledScores(rows, wanted, scores.down())
