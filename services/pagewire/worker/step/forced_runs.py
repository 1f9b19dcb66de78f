"""Forced runs: tokens that a grammar leaves no choice about are computed as one chunk with the last
token before them, instead of one in each step. For runners that know the values of all tokens when
a step begins.

The scheduler has not asked for them. A run is no longer than the blocks of its slot have room for,
so that a step which was sent before the scheduler heard of the run may find no room: its row is
then left out, and brings no token.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from pagewire_protocol.messages import LogprobColumns

from .grammar_masks import GrammarMasks

if TYPE_CHECKING:  # it imports torch, which the fake worker's image does not have
    from .slots import Slots

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Tokens = NDArray[np.int32]

MAX_RUN: Final = 15
"""Tokens."""


class ForcedRuns(NamedTuple):
    """What a step computes: counts[i] tokens of slots[i] [N], of which the last ones, runs[i], are
    new. `left_out` [L]: slots that the step names, and that have no room for their token.
    `changed`: something differs from what the step says."""

    slots: Ints
    counts: Ints
    runs: list[list[int]]
    left_out: Ints
    changed: bool


def unchanged(slots: Ints, counts: Ints) -> ForcedRuns:
    """A step as it is."""
    return ForcedRuns(slots, counts, [[]] * len(slots), slots[:0], False)


def take_runs(columns: "Slots", masks: GrammarMasks, slots: Ints, counts: Ints) -> ForcedRuns:
    """The forced runs of a step that computes counts[i] tokens of slots[i] [N]: from now on they
    are among the tokens of their slots.

    A request that wants log-probabilities gets each of its tokens by itself, and so does one whose
    other constraints look at each token."""
    lacks_room = masks.concerns(slots) & (_room_behind(columns, slots, counts) < 0)
    left_out = slots[lacks_room]
    if len(left_out):
        slots = slots[~lacks_room]
        counts = counts[~lacks_room]
    runs: list[list[int]] = [[] for _ in slots]
    rows = np.flatnonzero(_may_run(columns, masks, slots, counts))
    if len(rows):
        room = np.minimum(_room_behind(columns, slots, counts), columns.room(slots))
        most = room.clip(max=MAX_RUN)[rows]
        for row, tokens in zip(rows.tolist(), masks.take_runs(slots[rows], most), strict=True):
            runs[row] = tokens
            columns.append_run(int(slots[row]), tokens)
    lengths = np.array([len(tokens) for tokens in runs], np.int64)
    changed = bool(len(left_out)) or bool(lengths.any())
    return ForcedRuns(slots, counts + lengths, runs, left_out, changed)


def _room_behind(columns: "Slots", slots: Ints, counts: Ints) -> Ints:
    """[N]: tokens that the blocks of `slots` [N] have room for behind those of this step; below 0
    where they have none for these."""
    end = columns.num_computed[slots] + counts
    return columns.num_blocks[slots] * columns.block_size - end


def _may_run(columns: "Slots", masks: GrammarMasks, slots: Ints, counts: Ints) -> Bools:
    """[N]: which of `slots` [N] sample in this step under a grammar and nothing else that looks at
    each token."""
    plain = np.array([columns.constrained[slot] is None for slot in slots.tolist()], np.bool_)
    wants_none = columns.logprobs[slots] < 0
    samples = columns.samples(slots, columns.num_computed[slots] + counts)
    return masks.concerns(slots) & plain & wants_none & samples


def brought(runs: list[list[int]], ready: Bools, sampled: Tokens) -> tuple[Tokens, Tokens]:
    """(tokens, counts [S]) of a result: row i brings runs[i] and then, where ready[i], the next one
    of `sampled`."""
    following = iter(sampled.tolist())
    rows = [
        [*run, next(following)] if is_ready else run
        for run, is_ready in zip(runs, ready.tolist(), strict=True)
    ]
    tokens = np.array([token for row in rows for token in row], np.int32)
    return tokens, np.array([len(row) for row in rows], np.int32)


def moved(logprobs: LogprobColumns | None, counts: Tokens, ready: Bools) -> LogprobColumns | None:
    """The log-probabilities of the sampled tokens, now that row i brings counts[i] tokens [S], of
    which the sampled one is the last where ready[i]."""
    if logprobs is None:
        return None
    index = (np.cumsum(counts) - 1)[ready]
    rows = index[np.frombuffer(logprobs.rows, np.int32)]
    return replace(logprobs, rows=rows.astype(np.int32).tobytes())
