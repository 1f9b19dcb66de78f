"""Which rows of a decode step begin with the same blocks, so that a worker can read those once for
all of them.

Compares block ids, so what it finds is shared physically, whatever led to it. Knows slots and
blocks; knows neither requests' tokens nor how the worker uses a group. The result holds as long as
the same rows run: block tables only grow at their ends.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from pagewire_protocol.agreed import MAX_PREFIX_GROUPS
from pagewire_protocol.columns import BlockId, Slot
from pagewire_protocol.messages import Shared, pack

from .slots import I32, I64

LEAST_ROWS: Final = 4
"""Smaller groups save less than the second launch costs."""
LEAST_TOKENS: Final = 256
"""Shorter prefixes are read from the GPU's cache about as fast."""
MOST_LEADS: Final = 32
"""Different first blocks that are looked at: a bound on time."""
MOST_SPLITS: Final = 4
"""How often a group is divided in search of longer prefixes of its parts."""


@dataclass(slots=True)
class Group:
    """Rows (indices into the step's) whose first `blocks` blocks are the same."""

    rows: I64
    blocks: int

    @property
    def gain(self) -> int:
        """Blocks that need not be read again."""
        return (len(self.rows) - 1) * self.blocks


def _often(values: I32) -> I32:
    """The values that occur at least LEAST_ROWS times, the most frequent first, at most
    MOST_LEADS."""
    firsts, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_LEADS]
    return firsts[order][counts[order] >= LEAST_ROWS]


class PrefixFinder:
    """The blocks that each slot began with; later ones are its own alone, or shared too rarely to
    look for."""

    def __init__(self, slots: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((slots, 64), np.int32)
        self._counts = np.zeros(slots, np.int64)

    def placed(self, slot: Slot, blocks: list[BlockId]) -> None:
        """`slot` has a new request, whose table begins with `blocks`, at least one."""
        width = self._tables.shape[1]
        if len(blocks) > width:
            wider = np.zeros((len(self._tables), max(len(blocks), 2 * width)), np.int32)
            wider[:, :width] = self._tables
            self._tables = wider
        self._tables[slot, : len(blocks)] = blocks
        self._counts[slot] = len(blocks)

    def find(self, rows: I32, lengths: I64) -> Shared | None:
        """The groups of a step that runs the slots `rows` with one token each; `lengths` are their
        tokens including it [rows]."""
        leads = self._tables[rows, 0]
        groups: list[Group] = []
        for lead in _often(leads):
            members = np.flatnonzero(leads == lead)
            slots = rows[members]
            usable = np.minimum(self._counts[slots], (lengths[members] - 1) // self._block_size)
            groups += self._best(members, slots, usable, 0, MOST_SPLITS)
        groups = sorted(groups, key=lambda group: -group.gain)[:MAX_PREFIX_GROUPS]
        return _wire(groups, self._block_size) if groups else None

    def _best(self, members: I64, slots: I32, usable: I64, first: int, splits: int) -> list[Group]:
        """One group of all `members`, which share their first `first` blocks, or more of parts of
        them: whichever saves more."""
        view = self._tables[slots, first : int(usable.min())]
        same = (view == view[0]).all(0)
        common = first + (len(same) if same.all() else int(same.argmin()))
        whole = [Group(members, common)] if common * self._block_size >= LEAST_TOKENS else []
        longer = usable > common
        if splits == 0 or int(longer.sum()) < LEAST_ROWS:
            return whole
        after = np.where(longer, self._tables[slots, np.where(longer, common, 0)], -1)
        parts: list[Group] = []
        for block in _often(after[longer]):
            inside = after == block
            parts += self._best(
                members[inside], slots[inside], usable[inside], common + 1, splits - 1
            )
        return parts if _gain(parts) > _gain(whole) else whole


def _gain(groups: list[Group]) -> int:
    return sum(group.gain for group in groups)


def saved_reads(shared: Shared) -> int:
    """Tokens that a step need not read again, since they are read once for a whole group."""
    starts = np.frombuffer(shared.starts, np.int32)
    lengths = np.frombuffer(shared.lengths, np.int32)
    return int((np.maximum(np.diff(starts) - 1, 0).astype(np.int64) * lengths).sum())


def _wire(groups: list[Group], block_size: int) -> Shared:
    order = np.concatenate([group.rows for group in groups]).astype(np.int32)
    starts = np.cumsum([0, *(len(group.rows) for group in groups)]).astype(np.int32)
    return Shared(
        order.tobytes(),
        starts.tobytes(),
        pack("i", [group.blocks * block_size for group in groups]),
    )
