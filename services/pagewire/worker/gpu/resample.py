"""Rows that ask for more than the captured step does: penalties, constraints, log-probabilities.
They are sampled once more, eagerly, from the step's logits, and the result replaces what the graph
wrote; those that have a grammar and nothing else, by AwaitedSampling or MaskedSampling. Batches without such rows pay
one look at a column. Knows no CUDA: plain torch and injected kernels, so that it runs on any
device.

Output tokens are counted on the device, since the host learns them too late for the next step.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from pagewire_kernels import masked_sampling, penalties, sampling, token_masks
from pagewire_kernels.sampling_map import Sampled, SamplingRows
from pagewire_kernels.slot_state import SlotState
from pagewire_protocol.messages import LogprobColumns, PromptLogprobs
from torch import Tensor

from ...grammar.messages import mask_words
from ..load.loader import Loaded
from ..step.grammar_masks import GrammarMasks
from ..step.logit_constraints import Constraints
from ..step.logprobs import (
    SampledLogprobs,
    SpanLogprobs,
    prompt_logprobs,
    prompt_spans,
    token_logprobs,
)
from ..step.slots import Bools, Ints, Slots
from .awaited_sampling import AwaitedSampling
from .masked_sampling import MaskedSampling, SampleMasked
from .staging import Uploads

log = logging.getLogger("pagewire.worker")


@dataclass
class StepLogprobs:
    """Log-probabilities on their way to the host, of a step's sampled tokens and of prompts."""

    sampled: SampledLogprobs | None = None
    prompts: list[SpanLogprobs] = field(default_factory=list[SpanLogprobs])

    def columns(
        self, tokens: npt.NDArray[np.int32], ready: Bools | None = None
    ) -> LogprobColumns | None:
        """tokens: those of the step's rows, below 0 where the logits were not finite. ready: which
        rows have a token, where not all have: of those that turned out to have none, as well, the
        device has given log-probabilities."""
        if self.sampled is None:
            return None
        if ready is None:
            return self.sampled.columns(tokens)
        sampled = self.sampled.of_ready(ready)
        if sampled is None:
            return None
        columns = sampled.columns(tokens)
        index_of = np.cumsum(ready) - 1
        rows = index_of[np.frombuffer(columns.rows, np.int32)].astype(np.int32)
        return replace(columns, rows=rows.tobytes())

    def prompt_logprobs(self) -> tuple[PromptLogprobs, ...]:
        """One message a span of prompt tokens."""
        return tuple(prompt.message() for prompt in self.prompts)


def _padded(rows: Ints, most: int) -> Ints:
    """Padded by repeating the first, to a power of two or `most`, in fours: few numbers of rows,
    since kernels are compiled for each, and columns that start at multiples of 16 bytes. A row that
    is sampled twice gives the same token twice."""
    size = min(max(4, 1 << (len(rows) - 1).bit_length()), -(-most // 4) * 4)
    return np.concatenate((rows, np.repeat(rows[:1], size - len(rows))))


class Kernels(NamedTuple):
    """The operations that differ between a GPU and tests without one; see pagewire_kernels."""

    sample: Callable[[Tensor, SamplingRows], Sampled]
    apply_penalties: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    count_tokens: Callable[[Tensor, Tensor, Tensor], None]
    apply_token_masks: Callable[[Tensor, Tensor, Tensor], None]
    sample_masked: SampleMasked


KERNELS: Final = Kernels(
    sampling.sample,
    penalties.apply_penalties,
    penalties.count_tokens,
    token_masks.apply_token_masks,
    masked_sampling.sample_masked,
)


class ExtraSampling:
    """What rows get beyond temperature and filters, for the slots of one runner."""

    def __init__(
        self,
        loaded: Loaded,
        slots: Slots,
        state: SlotState,
        uploads: Uploads,
        masks: GrammarMasks,
        kernels: Kernels = KERNELS,
        awaited: AwaitedSampling | None = None,
    ) -> None:
        """awaited: where the device takes masks itself."""
        self._vocab_size = loaded.decoder.arch.vocab_size
        self._dtype = loaded.dtype
        self._slots = slots
        self._state = state
        self._up = uploads.up
        self._kernels = kernels
        self._device = state.last_token.device
        self._constraints = Constraints(
            slots,
            masks,
            self._vocab_size,
            loaded.eos_token_ids,
            str(self._device),
            self._up,
            kernels.apply_token_masks,
        )
        self._masks = masks
        self._awaited = awaited
        self._make_masked = lambda: MaskedSampling(
            slots, state, uploads, masks, self._vocab_size, kernels.sample_masked
        )
        self._masked = None if awaited is not None else self._make_masked()
        self.host_known_len = np.zeros(slots.count, np.int64)
        """How many tokens of each slot the host knows: those it was admitted with."""
        self._output_counts: Tensor | None = None
        """int32 [slots, V]: how often each token was sampled. Allocated, as the next, with the
        first penalty."""
        self._in_prompt: Tensor | None = None
        """uint8 [slots, V]: 1 for the tokens of the prompt."""

    def warm_up(self) -> None:
        """Compile and load what these rows need: the first such request would hold up all the
        others."""
        count = 1
        while count < 2 * self._slots.count:
            logits = torch.zeros(count, self._vocab_size, device=self._device)
            ints = torch.ones(count, dtype=torch.int64, device=self._device)
            self._kernels.sample(logits, SamplingRows.named(ints, ints))
            count *= 2
        row = torch.zeros(1, self._vocab_size, device=self._device)
        slot = torch.zeros(1, dtype=torch.int64, device=self._device)
        half = torch.full((1,), 0.5, device=self._device)
        self._kernels.apply_penalties(row, row.int(), row.to(torch.uint8), slot, half, half, half)
        self._kernels.count_tokens(row.int(), slot.int(), slot.int())
        words = torch.zeros(1, mask_words(self._vocab_size), dtype=torch.int32, device=self._device)
        self._kernels.apply_token_masks(row, slot, words)
        for sampling_of in (self._awaited, self._masked):
            if sampling_of is not None:
                sampling_of.warm_up(row.to(self._dtype))

    def check(self) -> None:
        """Once all is compiled, and before the first request: whether the device can take masks and
        tell tokens itself. Where it cannot, the host does."""
        if self._awaited is None:
            return
        logits = torch.zeros(1, self._vocab_size, device=self._device).to(self._dtype)
        if self._awaited.check(logits):
            self._masks.let_device_tell()
            return
        log.warning(
            "the GPU and matcher processes do not see each other's words: the host brings masks"
        )
        self._awaited = None
        self._masked = self._make_masked()
        self._masked.warm_up(logits)

    def awaits(self, slots: Ints) -> Bools:
        """[R]: for which of `slots` [R] the device takes masks itself, so that it turns out with the
        step's tokens which of them were late."""
        if self._awaited is None or not self._masks.any:
            return np.zeros(len(slots), np.bool_)
        return self._slots.grammar_only[slots]

    def begin(self, slots: Ints, has_prompts: bool = False) -> None:
        """Before a step that samples `slots` [R] is computed; has_prompts: it computes more than
        their last tokens."""
        if self._awaited is None or not self.awaits(slots).any():
            return
        if has_prompts or self._is_patient(slots):
            self._awaited.begin()

    def _is_patient(self, slots: Ints) -> bool:
        """Where nobody in the step goes without a mask, nobody is held up."""
        return bool(self._masks.concerns(slots).all())

    def admit(self, new: Ints) -> None:
        """The slots `new` [N] hold new requests."""
        self.host_known_len[new] = self._slots.num_tokens[new]
        self._constraints.admit(new)
        penalized = new[self._slots.penalized(new)]
        if len(penalized):
            self._count_history(penalized)

    def _count_history(self, new: Ints) -> None:
        if self._output_counts is None or self._in_prompt is None:
            shape = (self._slots.count, self._vocab_size)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        for slot in new.tolist():
            prompt_len = int(self._slots.num_prompt_tokens[slot])
            num_tokens = int(self._slots.num_tokens[slot])
            tokens = self._up(self._slots.tokens[slot, :num_tokens].astype(np.int64))
            counts = torch.bincount(tokens[prompt_len:], minlength=self._vocab_size)
            self._output_counts[slot].copy_(counts)
            self._in_prompt[slot].zero_()
            self._in_prompt[slot].index_fill_(0, tokens[:prompt_len], 1)

    def prompt_hook(
        self, run: Ints, first: Ints, end: Ints, logprobs: StepLogprobs
    ) -> Callable[[Callable[[Tensor], Tensor]], None] | None:
        """What looks at the logits of a step that computes positions first[i] to end[i] of slot
        run[i], and puts their log-probabilities into `logprobs`. None when nobody asked for
        those."""
        spans = prompt_spans(self._slots, run, first, end)
        if not spans:
            return None

        def hook(logits_of: Callable[[Tensor], Tensor]) -> None:
            logprobs.prompts = prompt_logprobs(spans, logits_of, self._vocab_size, self._up)

        return hook

    def resample(
        self,
        logits: Tensor,
        slots: Ints,
        sampled_tokens: Tensor,
        logprobs: StepLogprobs | None = None,
        ready: Bools | None = None,
    ) -> StepLogprobs | None:
        """logits [R, V] and sampled_tokens [R] belong to the rows `slots` [R]; sampled_tokens and
        the slots' last tokens are overwritten for rows with penalties or constraints. `ready` [R]:
        which rows have a token at all; None: each. Returns `logprobs`, or a new one, with the
        log-probabilities asked for."""
        columns = self._slots
        extra = columns.needs_extra[slots] if ready is None else columns.needs_extra[slots] & ready
        if not extra.any():
            return logprobs
        masked = columns.grammar_only[slots] & extra
        if masked.any():
            # One that has failed brings no token: what the step has sampled will do.
            rows = np.flatnonzero(masked & ~self._masks.failed(slots))
            if len(rows):
                self._sample_masked(logits, slots, rows, sampled_tokens)
        others = extra & ~masked
        if others.any():
            self._resample_others(logits, slots, others, sampled_tokens)
        wanted = np.flatnonzero((columns.logprobs[slots] >= 0) & extra)
        if not len(wanted):
            return logprobs
        logprobs = logprobs or StepLogprobs()
        logprobs.sampled = self._sampled_logprobs(
            logits, sampled_tokens, wanted, columns.logprobs[slots[wanted]]
        )
        return logprobs

    def _sample_masked(
        self, logits: Tensor, slots: Ints, rows: Ints, sampled_tokens: Tensor
    ) -> None:
        """The rows `rows` of the step, which have a grammar and nothing else."""
        if self._masked is not None:
            self._masked.run(logits, slots[rows], rows, sampled_tokens)
        elif self._awaited is not None:
            patient = self._is_patient(slots)
            self._awaited.run(logits, slots[rows], rows, sampled_tokens, patient)

    def _resample_others(
        self, logits: Tensor, slots: Ints, others: Bools, sampled_tokens: Tensor
    ) -> None:
        """Those of `others` [R] that have more than log-probabilities, one operation after the
        other."""
        columns = self._slots
        penalized = columns.penalized(slots) & others
        rows = np.flatnonzero(penalized | (self._constraints.touches(slots) & others))
        if len(rows):
            self._sample_again(logits, slots, _padded(rows, columns.count), sampled_tokens)
        if penalized.any() and self._output_counts is not None:
            counted = np.flatnonzero(penalized)
            self._kernels.count_tokens(
                self._output_counts,
                self._up(slots[counted].astype(np.int32)),
                sampled_tokens[self._up(counted)],
            )

    def _sample_again(
        self, logits: Tensor, slots: Ints, rows: Ints, sampled_tokens: Tensor
    ) -> None:
        """The rows `rows` of the step, some of them perhaps twice."""
        columns = self._slots
        up = self._up
        row_slots = slots[rows]
        row_index = up(rows)
        slot_index = up(row_slots)
        x = logits[row_index].float()
        self._constraints.apply(x, row_slots)
        if self._output_counts is not None and self._in_prompt is not None:
            penalties = (columns.presence, columns.frequency, columns.repetition)
            weights = up(np.stack([column[row_slots] for column in penalties]))
            self._kernels.apply_penalties(
                x, self._output_counts, self._in_prompt, slot_index, *weights.unbind(0)
            )
        sampling = SamplingRows(
            values=up(np.ascontiguousarray(columns.sampling_params[row_slots].T)),
            seeds=up(columns.seed[row_slots]),
            positions=up(columns.num_tokens[row_slots] - 1),
        )
        sampled = self._kernels.sample(x, sampling)
        tokens = sampled.tokens.int()
        sampled_tokens[row_index] = torch.where(sampled.bad, -1, tokens)
        self._state.last_token[slot_index] = tokens
        self._constraints.observe(row_slots, tokens)

    def _sampled_logprobs(
        self, logits: Tensor, sampled_tokens: Tensor, rows: Ints, wanted: Ints
    ) -> SampledLogprobs:
        index = self._up(rows)
        # A token of -1, whose logits were not finite, counts as token 0: its row is flagged.
        tokens = sampled_tokens[index].long().clamp(min=0)
        logprobs = token_logprobs(logits[index], tokens, int(wanted.max()))
        return SampledLogprobs(rows, wanted, logprobs.to_host())
