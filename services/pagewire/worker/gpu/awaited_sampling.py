"""Rows whose tokens nothing constrains but a grammar, sampled once more from a step's logits under
masks that the device takes itself, out of the memory that matcher processes write them to
(grammar/shared.py): a step is launched before its masks are there, and the host hears with its
tokens which rows were late. The device tells matchers the tokens there too, so that they have them
before the host does.

Of a worker with one rank; over several, rank 0 decides which rows are late (masked_sampling.py).
"""

import contextlib
import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from pagewire_kernels import awaited_masks
from pagewire_kernels.awaited_masks import NOWHERE, AwaitedRows, TakenMasks
from pagewire_kernels.awaited_sampling import sample_awaited
from pagewire_kernels.masked_sampling import LateRows, MaskedSamplingRows
from pagewire_kernels.slot_state import SlotState
from torch import Tensor

from ...grammar.messages import mask_words
from ...grammar.shared import LOW_HALF, NO_POSITION, SharedMasks, tag_of
from ..step.grammar_masks import GrammarMasks
from ..step.slots import Ints, Slots
from .masked_sampling import SampleMasked
from .staging import Uploads

log = logging.getLogger("pagewire.worker")


class Columns(NamedTuple):
    """AwaitedRows as arrays of NumPy."""

    rows: Ints
    slots: Ints
    prompt_lens: Ints
    tag_keys: Ints
    tag_at: Ints
    mask_at: Ints
    seeds: Ints
    values: np.ndarray


class AwaitedSampling:
    """For the slots of one runner, whose masks are `masks`, in memory that the device can read."""

    def __init__(
        self,
        slots: Slots,
        state: SlotState,
        uploads: Uploads,
        masks: GrammarMasks,
        vocab_size: int,
        sample: SampleMasked,
    ) -> None:
        most = slots.count
        self._slots = slots
        self._state = state
        self._up = uploads.up
        self._masks = masks
        self._told_offsets = masks.shared.told_offsets
        self._sample = sample
        host = torch.zeros(AwaitedRows.num_bytes(most), dtype=torch.uint8)
        here = AwaitedRows.views(host, most)
        self._host = host.numpy()
        self._columns = Columns(*(getattr(here, name).numpy() for name in Columns._fields))
        self._count = 0
        """Rows that the device knows, of these slots."""
        self._version = -1
        """That of the masks' places and openings, as the device knows them."""
        self._memory = torch.zeros_like(host, device=state.last_token.device)
        self._there = AwaitedRows.views(self._memory, most)
        self._vocab_size = vocab_size
        self._taken = TakenMasks.empty(most, mask_words(vocab_size), state)
        self._views: dict[int, tuple[MaskedSamplingRows, LateRows]] = {}
        """Of the device's memory: by how many rows, some of which are filtered."""

    def begin(self) -> None:
        """Before a step with such rows is computed, if they will be patient or it has prompts."""
        awaited_masks.begin(self._state, self._taken)

    def run(
        self, logits: Tensor, slots: Ints, rows: Ints, sampled_tokens: Tensor, patient: bool
    ) -> None:
        """Sample rows `rows` [G] of logits [R, V], which belong to the slots `slots` [G].
        sampled_tokens int32 [R] and the slots' last tokens are overwritten; rows without a mask get
        LATE, and their slots are as they were before the step. patient: they wait a little for
        theirs."""
        count = len(slots)
        self._bring(slots, rows)
        filtered = bool(self._slots.filtered[slots].any())
        self._launch(logits, count, filtered, patient, sampled_tokens)

    def _bring(self, slots: Ints, rows: Ints) -> None:
        """What the device has to know of these rows, unless it knows it from the step before: the
        beginning of a tag is no other admission's."""
        count = len(slots)
        here, columns, version = self._columns, self._slots, self._masks.version
        if (
            (count, version) == (self._count, self._version)
            and np.array_equal(here.slots[:count], slots)
            and np.array_equal(here.rows[:count], rows)
        ):
            return
        self._count, self._version = count, version
        here.rows[:count], here.slots[:count] = rows, slots
        keys, tag_at, mask_at = self._masks.tags(slots)
        here.tag_keys[:count], here.tag_at[:count], here.mask_at[:count] = keys, tag_at, mask_at
        here.prompt_lens[:count] = columns.num_prompt_tokens[slots]
        here.seeds[:count] = columns.seed[slots]
        here.values[:, :count] = columns.sampling_params[slots].T
        self._up(self._host, out=self._memory)

    def _launch(
        self, logits: Tensor, count: int, filtered: bool, patient: bool, sampled_tokens: Tensor
    ) -> None:
        awaited, state, taken = self._there, self._state, self._taken
        offsets = self._told_offsets
        awaited_masks.look(awaited, count, patient, state, taken)
        if not filtered:
            sample_awaited(logits, awaited, count, state, taken, sampled_tokens, offsets)
            return
        awaited_masks.take(awaited, count, state, taken)
        if count not in self._views:
            self._views[count] = (
                taken.sampled(awaited, count),
                taken.late_rows(awaited, count, state, offsets),
            )
        held, late = self._views[count]
        self._sample(logits, held, state.last_token, sampled_tokens, late)

    def warm_up(self, logits: Tensor) -> None:
        """Compile and load what `run` launches, for all numbers of rows. logits [1, V]: of the
        dtype that steps have. It is done with the last slot, which takes what padding writes."""
        self._count = 0
        self._memory.zero_()
        self._there.slots.fill_(len(self._state.last_token) - 1)
        sampled_tokens = self._state.last_token.new_empty(1)
        count = 1
        while True:
            for filtered in (False, True):
                self.begin()
                self._launch(logits, count, filtered, not filtered, sampled_tokens)
            if count == self._slots.count:
                break
            count = min(2 * count, self._slots.count)
        self._state.num_computed[-1] = 0

    def check(self, logits: Tensor) -> bool:
        """Whether the device sees the masks that are written there, and others the tokens that it
        writes. Before any process does. logits [1, V]: of the dtype that steps have."""
        self._count = 0
        shared, columns, first = self._masks.shared, self._columns, np.zeros(1, np.int64)
        self._host.fill(0)
        columns.slots[0] = len(self._state.last_token) - 1
        columns.tag_keys[0] = tag_of(LOW_HALF, NO_POSITION).view(np.int64)
        columns.tag_at[0] = shared.tag_addresses(first)[0]
        columns.mask_at[0] = shared.mask_addresses(first)[0]
        self._up(self._host, out=self._memory)
        self._state.num_computed[-1] = 0
        token, tag = self._vocab_size - 1, tag_of(LOW_HALF, 0)  # no stream has this key
        shared.masks[0, token // 32] = 1 << token % 32
        shared.tags[0] = tag
        sampled_tokens = torch.zeros_like(self._state.last_token[:1])
        self._launch(logits, 1, False, False, sampled_tokens)
        sees = sampled_tokens.item() == token
        told = shared.told_tags[0] == tag and shared.told_tokens[0] == token
        shared.masks[0] = 0
        shared.tags[0] = shared.told_tags[0] = NOWHERE
        self._state.num_computed[-1] = 0
        return sees and bool(told)


def is_readable(shared: SharedMasks) -> bool:
    """The device is given that memory to read; whether it could be."""
    cudart: Any = torch.cuda.cudart()
    error = cudart.cudaHostRegister(shared.address, shared.nbytes, 0)
    if error == cudart.cudaError.success:
        return True
    log.warning(
        "the GPU cannot read the memory that masks of grammars are written to (CUDA error %d); the "
        "host brings them",
        int(error),
    )
    with contextlib.suppress(RuntimeError):  # the error is said once more, by what comes next
        torch.zeros(1, device="cuda")
    return False
