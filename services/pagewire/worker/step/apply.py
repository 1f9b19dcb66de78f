"""A Step taken to the slots: what both runners do before the device is asked for anything."""

from typing import Final

import numpy as np
import numpy.typing as npt
from pagewire_protocol.messages import Step, WorkerFacts

from ..load import loader
from .slots import BadStep, Ints, Slots

NO_SLOTS: Final = np.zeros(0, np.int64)


def facts_of(loaded: loader.Loaded, max_num_seqs: int, cascade: bool = False) -> WorkerFacts:
    return WorkerFacts(
        num_blocks=loaded.sizing.num_blocks,
        block_size=loaded.sizing.block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=loaded.sizing.max_model_len,
        vocab_size=loaded.decoder.arch.vocab_size,
        eos_token_ids=tuple(loaded.eos_token_ids),
        device=loaded.device,
        cascade=cascade,
    )


def apply_step(slots: Slots, step: Step, last: Ints) -> tuple[Ints, Ints]:
    """Retire, admit, grow; (slots, counts) of what is to run. `last` is what the step before ran,
    in case it is to be repeated."""
    slots.retire(_column(step.retire))
    for admission in step.admit:
        slots.admit(admission)
    slots.grow(_column(step.grow_slots), _column(step.grow_blocks))
    if step.repeat:
        return last, np.ones_like(last)
    run, counts = (
        _column(step.run_slots).astype(np.int64),
        _column(step.run_counts).astype(np.int64),
    )
    if len(run) != len(counts):
        raise BadStep(f"{len(run)} slots to run but {len(counts)} counts")
    return run, counts


def _column(data: bytes) -> npt.NDArray[np.int32]:
    return np.frombuffer(data, np.int32)


def spread(first: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """(row, position) of every token of the step, rows in order."""
    if (counts == 1).all():
        return np.arange(len(counts)), first
    rows = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return rows, np.arange(len(rows)) - starts[rows] + first[rows]
