"""The slots of one worker that decode: each step gives them one token to compute and gets the next
ones back. What a step needs to know of them all together is kept from one step to the next.

`version` counts the changes of the set. Whatever is kept here was computed for one version and is
valid as long as that is the present one. Knows neither requests nor blocks' states.
"""

from typing import Final, NamedTuple

import numpy as np
from pagewire_protocol.columns import Slot
from pagewire_protocol.messages import Shared

from .prefix_groups import PrefixFinder, saved_reads
from .slots import I32, I64, NEVER, NO_ROWS, Slots

NO_VERSION: Final = -1


class Decodes(NamedTuple):
    """The decoding rows of one step. `version` is that of the set when they are all of it, else
    NO_VERSION. `unchanged`: the step before ran these rows and nothing else."""

    rows: I32
    version: int
    unchanged: bool


NO_DECODES: Final = Decodes(NO_ROWS, NO_VERSION, False)


class DecodeSet:
    """`max_tokens_per_row`: most tokens that a step brings for one row. `prefixes`: finds rows
    with common blocks; None where the worker cannot use that."""

    def __init__(
        self, slots: Slots, max_tokens_per_row: int, prefixes: PrefixFinder | None
    ) -> None:
        self.version = 0
        self._slots = slots
        self._step = max_tokens_per_row
        self._prefixes = prefixes
        self._member = np.zeros(slots.count, np.bool_)
        self._rows = NO_ROWS
        self._rows_version = NO_VERSION
        self._groups: Shared | None = None
        self._groups_version = NO_VERSION
        self._saved_reads = 0
        # The last step that was formed: the version it ran all of, the tokens its rows attended to
        # together, the tokens that the row nearest to its end may still grow by, and the rows as
        # bytes.
        self._ran_version = NO_VERSION
        self._attended = 0
        self._room = 0
        self._row_bytes = b""

    def add(self, slots: I32) -> None:
        """From now on these slots decode."""
        self._member[slots] = True
        self.version += 1

    def discard(self, slots: I32) -> None:
        """These slots do not decode any further."""
        self._member[slots] = False
        self.version += 1

    def discard_slot(self, slot: Slot) -> None:
        """The same for one slot, which need not be a member."""
        if self._member[slot]:
            self._member[slot] = False
            self.version += 1

    def add_missing(self, slots: I32) -> None:
        """These slots decode, most of which are members."""
        missing = slots[~self._member[slots]]
        if len(missing):
            self.add(missing)

    def shorten(self, slots: I32, tokens: I64) -> None:
        """Members among `slots` turned out tokens[i] shorter than was assumed. What was found out of
        the rows still holds, and they may grow by more than was thought."""
        self._attended -= int(tokens[self._member[slots]].sum())

    def __bool__(self) -> bool:
        return bool(self._member.any())

    def rows(self) -> I32:
        """All slots that decode [rows].

        The longest come first, and stay so, since all grow alike: a worker that began with the
        short ones would end waiting for the few multiprocessors that are busy with the long ones.
        """
        if self._rows_version != self.version:
            rows = np.flatnonzero(self._member).astype(np.int32)
            self._rows = rows[np.argsort(-self._slots.num_tokens[rows], kind="stable")]
            self._rows_version = self.version
        return self._rows

    def decodes(self, rows: I32, version: int) -> Decodes:
        """`rows` as those of the next step; `version` as in Decodes."""
        return Decodes(rows, version, version != NO_VERSION and version == self._ran_version)

    def bytes_of(self, decodes: Decodes) -> bytes:
        """The rows as a column of the wire, for a step without chunks."""
        if not decodes.unchanged:
            self._row_bytes = decodes.rows.tobytes()
        return self._row_bytes

    def attended_tokens(self, decodes: Decodes) -> int:
        """Tokens that the rows attend to together, the new ones included."""
        rows = decodes.rows
        if not len(rows):
            return 0
        if decodes.unchanged and self._step == 1:
            return self._attended + len(rows)
        return int(self._slots.num_scheduled[rows].sum()) + len(rows)

    def prefix_groups(self, decodes: Decodes) -> tuple[Shared | None, int]:
        """The groups of rows with common blocks, and the tokens that a step need not read thanks
        to them. They last as long as the same rows decode: tables only grow at their ends."""
        if self._prefixes is None:
            return None, 0
        if decodes.version == NO_VERSION or decodes.version != self._groups_version:
            rows = decodes.rows
            lengths = self._slots.num_scheduled[rows] + 1
            self._groups = self._prefixes.find(rows, lengths) if len(rows) else None
            self._saved_reads = 0 if self._groups is None else saved_reads(self._groups)
            self._groups_version = decodes.version
        return self._groups, self._saved_reads

    def schedule(self, decodes: Decodes, attended: int, with_chunks: bool) -> None:
        """The next step runs `decodes`, with chunks of prefill beside them or not."""
        if decodes.unchanged and self._room > self._step:
            rows = decodes.rows
            num_tokens = self._slots.num_tokens[rows] + self._step
            self._slots.num_tokens[rows] = num_tokens
            self._slots.num_scheduled[rows] = num_tokens - 1
            self._room -= self._step
        else:
            self._room = self.schedule_samples(decodes.rows)
        self._attended = attended
        self._ran_version = NO_VERSION if with_chunks else decodes.version

    def schedule_samples(self, rows: I32) -> int:
        """Each of `rows` is given its last token to compute and samples. Lengths are bounds: as if
        each brought all the tokens that it may. Rows that can then grow no further leave the set.
        Returns the tokens that the one nearest to its end may still grow by."""
        slots = self._slots
        max_len = slots.max_len[rows]
        num_tokens = np.minimum(slots.num_tokens[rows] + self._step, max_len)
        slots.num_tokens[rows] = num_tokens
        slots.num_scheduled[rows] = num_tokens - 1
        room = max_len - num_tokens
        least = int(room.min(initial=NEVER))
        if least <= 0:
            self.discard(rows[room <= 0])
        return least
