"""Rows whose tokens nothing constrains but a grammar, sampled once more from a step's logits: one
copy to the device, of masks and sampling parameters together, and one launch (three where some row
has top-k, top-p or min-p). For models over several ranks, which must agree on the rows that are late;
else awaited_sampling.py. Masks are put into pinned memory as they come, while others are waited
for.

No CUDA graph: a graph reads logits at one place, and each captured step has its own, so that there
would be one for each pair of sizes. Two launches cost less than finding the right one. Knows no
CUDA: plain torch, an injected kernel and injected memory.
"""

from typing import Protocol

import numpy as np
from pagewire_kernels.masked_sampling import LateRows, MaskedSamplingRows
from pagewire_kernels.slot_state import SlotState
from torch import Tensor, empty, uint8

from ...grammar.messages import mask_words
from ..step.grammar_masks import GrammarMasks
from ..step.slots import Ints, Slots
from .staging import Uploads


class SampleMasked(Protocol):
    """As `pagewire_kernels.masked_sampling.sample_masked`."""

    def __call__(
        self,
        logits: Tensor,
        held: MaskedSamplingRows,
        last_token: Tensor,
        sampled_tokens: Tensor,
        late: LateRows | None = None,
    ) -> None: ...


class MaskedSampling:
    """For the slots of one runner, whose masks are `masks`."""

    def __init__(
        self,
        slots: Slots,
        state: SlotState,
        uploads: Uploads,
        masks: GrammarMasks,
        vocab_size: int,
        sample: SampleMasked,
    ) -> None:
        words = mask_words(vocab_size)
        most = slots.count
        self._slots = slots
        self._last_token = state.last_token
        self._mirror = masks.mirror
        self._sample = sample
        self._num_bytes = [
            MaskedSamplingRows.num_bytes(most, words, count) for count in range(most + 1)
        ]
        """By a number of masks: how much of the memory comes before their end."""
        self._staging = uploads.staging(self._num_bytes[most])
        self._memory = empty(self._num_bytes[most], dtype=uint8, device=state.last_token.device)
        self._there = MaskedSamplingRows.views(self._memory, most, words)
        here = MaskedSamplingRows.views(self._staging.host, most, words)
        self._rows = here.rows.numpy()
        self._slot_ids = here.slots.numpy()
        self._mask_rows = here.masks.numpy()
        masks.mirror.words = here.words.numpy().view(np.uint32)
        self._values = here.sampling.values.numpy()
        self._seeds = here.sampling.seeds.numpy()
        self._held: dict[tuple[int, bool], MaskedSamplingRows] = {}
        """Views of the device's memory: by how many rows, and whether some are filtered."""
        self._positions = here.sampling.positions.numpy()

    def run(self, logits: Tensor, slots: Ints, rows: Ints, sampled_tokens: Tensor) -> None:
        """Sample rows `rows` [G] of logits [R, V], which belong to the slots `slots` [G] and whose
        masks are there. sampled_tokens int32 [R] and the slots' last tokens are overwritten."""
        count = len(slots)
        columns = self._slots
        masks = self._mirror.row_of[slots]
        self._staging.wait()
        self._rows[:count] = rows
        self._mask_rows[:count] = masks
        self._slot_ids[:count] = slots
        self._values[:, :count] = columns.sampling_params[slots].T
        self._seeds[:count] = columns.seed[slots]
        self._positions[:count] = columns.num_tokens[slots] - 1
        self._staging.send(self._num_bytes[int(masks.max()) + 1], self._memory)
        held = self._views(count, bool(columns.filtered[slots].any()))
        self._sample(logits, held, self._last_token, sampled_tokens)

    def _views(self, count: int, filtered: bool) -> MaskedSamplingRows:
        key = count, filtered
        if key not in self._held:
            self._held[key] = self._there.first(count, filtered)
        return self._held[key]

    def warm_up(self, logits: Tensor) -> None:
        """Compile and load what `run` launches, for all numbers of rows. logits [1, V]: of the
        dtype that steps have. The last slot, which takes what padding writes, gets a token."""
        self._memory.zero_()
        self._there.words.fill_(-1)
        self._there.slots.fill_(len(self._last_token) - 1)
        sampled_tokens = self._last_token.new_empty(1)
        count = 1
        while True:
            for filtered in (False, True):
                held = self._there.first(count, filtered)
                self._sample(logits, held, self._last_token, sampled_tokens)
            if count == self._slots.count:
                return
            count = min(2 * count, self._slots.count)
