"""A Step applied to the slots: what both runners do before the device is asked for anything."""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from pagewire_protocol.messages import Step, WorkerFacts

from ..load import loader
from .slots import BadStep, Ints, Slots

NO_SLOTS: Final = np.zeros(0, np.int64)


def facts_of(
    loaded: loader.Loaded, max_num_seqs: int, cascade: bool = False, max_forced_tokens: int = 0
) -> WorkerFacts:
    """What a runner with this model tells the scheduler; cascade: it takes prefix groups."""
    return WorkerFacts(
        num_blocks=loaded.sizing.num_blocks,
        block_size=loaded.sizing.block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=loaded.sizing.max_model_len,
        vocab_size=loaded.decoder.arch.vocab_size,
        eos_token_ids=tuple(loaded.eos_token_ids),
        device=loaded.device,
        cascade=cascade,
        max_forced_tokens=max_forced_tokens,
    )


class StepRows(NamedTuple):
    """What a step computes: row i is slots[i], whose positions first[i] to end[i] are new,
    counts[i] of them. sampling [S]: the rows that then sample a token."""

    slots: Ints
    counts: Ints
    first: Ints
    end: Ints
    sampling: Ints


class StepApplier:
    """Applies steps to `slots` and remembers which of them the last step ran, since the next one
    may repeat it."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._running = NO_SLOTS
        self.version = 0
        """Changes with every step that names its rows anew, so that what is derived from the rows
        can be kept while steps repeat."""

    def clear(self) -> None:
        """No request is left: there is nothing to repeat."""
        self._slots.clear()
        self._running = NO_SLOTS
        self.version += 1

    def apply(self, step: Step) -> tuple[Ints, Ints]:
        """Retire, admit, grow; (slots [N], counts [N]): what is to run, and how many tokens of
        each. `take` comes next. Raises BadStep."""
        self._slots.retire(_column(step.retire))
        for admission in step.admit:
            self._slots.admit(admission)
        self._slots.grow(_column(step.grow_slots), _column(step.grow_blocks))
        if step.repeat:
            return self._running, np.ones_like(self._running)
        slots = _column(step.run_slots).astype(np.int64)
        counts = _column(step.run_counts).astype(np.int64)
        if len(slots) != len(counts):
            raise BadStep(f"{len(slots)} slots to run but {len(counts)} counts")
        self.version += 1
        return slots, counts

    def take(self, slots: Ints, counts: Ints, running: Ints | None = None) -> StepRows:
        """The rows of the step, whose slots' num_computed moves on. Only a step that gets here can
        be repeated: with the slots `running`, where the step names more than it computes. Raises
        BadStep."""
        first, end = self._slots.take(slots, counts)
        self._running = slots if running is None else running
        sampling = np.flatnonzero(self._slots.samples(slots, end))
        return StepRows(slots, counts, first, end, sampling)


def _column(data: bytes) -> npt.NDArray[np.int32]:
    return np.frombuffer(data, np.int32)


def spread(first: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """(row, position) of every token of a step whose row i computes counts[i] tokens from position
    first[i] on; rows in order, each array [sum of counts]."""
    if (counts == 1).all():
        return np.arange(len(counts)), first
    rows = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return rows, np.arange(len(rows)) - starts[rows] + first[rows]
