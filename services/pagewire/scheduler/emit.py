"""What the scheduler has to say to each tokenizer since it last spoke: token rows, placements and
ends, one Tokens message each.

Knows owners by number only; the address behind a number is in `peers.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from pagewire_protocol.messages import End, LogprobColumns, Placed, PromptLogprobs, Tokens

from .slots import I32, I64, Slots, ints

Column = NDArray[Any]


@dataclass(slots=True)
class Rows:
    """One step's columns for one owner, each [rows]; `logprobs.rows` counts within them."""

    count: int
    columns: tuple[bytes, bytes, bytes, bytes, bytes]
    logprobs: LogprobColumns | None


@dataclass(slots=True)
class Mail:
    rows: list[Rows] = field(default_factory=list[Rows])
    placed: list[Placed] = field(default_factory=list[Placed])
    ended: list[End] = field(default_factory=list[End])
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list[PromptLogprobs])

    def message(self) -> Tokens:
        parts = [part.columns for part in self.rows]
        handles, attempts, executions, positions, tokens = (
            parts[0] if len(parts) == 1 else [b"".join(p[i] for p in parts) for i in range(5)]
        )
        rest = (
            tuple(self.placed),
            tuple(self.ended),
            _joined(self.rows),
            tuple(self.prompt_logprobs),
        )
        return Tokens(handles, attempts, executions, positions, tokens, *rest)


class Outgoing:
    def __init__(self) -> None:
        self._mail: dict[int, Mail] = {}

    def mail(self, owner: int) -> Mail:
        mail = self._mail.get(owner)
        if mail is None:
            mail = self._mail[owner] = Mail()
        return mail

    def take(self) -> dict[int, Mail]:
        mail, self._mail = self._mail, {}
        return mail

    def tokens(
        self, slots: Slots, rows: I32, positions: I64, tokens: I32, logprobs: LogprobColumns | None
    ) -> None:
        """Row i: `tokens[i]` is output token `positions[i]` of the request in slot `rows[i]`."""
        if not len(rows):
            return
        owners = slots.owner[rows]
        first = int(owners[0])
        columns: tuple[Column, ...] = (
            slots.handle[rows],
            slots.attempt[rows],
            slots.execution[rows],
            positions.astype(np.int32),
            tokens,
        )
        if (owners == first).all():
            self.mail(first).rows.append(Rows(len(rows), _packed(columns), logprobs))
            return
        for owner in ints(np.unique(owners)):
            mine = owners == owner
            part = tuple(column[mine] for column in columns)
            self.mail(owner).rows.append(Rows(len(part[0]), _packed(part), select(logprobs, mine)))

    def prompt_logprobs(self, slots: Slots, entry: PromptLogprobs) -> None:
        """`entry.place` is a slot."""
        slot = entry.place
        numbers = int(slots.handle[slot]), int(slots.attempt[slot]), int(slots.execution[slot])
        told = replace(entry, place=numbers[0], attempt=numbers[1], execution=numbers[2])
        self.mail(int(slots.owner[slot])).prompt_logprobs.append(told)


def _packed(columns: tuple[Column, ...]) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    handles, attempts, executions, positions, tokens = (column.tobytes() for column in columns)
    return handles, attempts, executions, positions, tokens


def select(logprobs: LogprobColumns | None, keep: NDArray[np.bool_]) -> LogprobColumns | None:
    """The log-probabilities of the rows where `keep` [rows] holds, with `rows` counted among
    those."""
    if logprobs is None:
        return None
    rows, counts = np.frombuffer(logprobs.rows, np.int32), np.frombuffer(logprobs.counts, np.int32)
    kept = keep[rows]
    if not kept.any():
        return None
    entries = np.repeat(kept, counts)
    return LogprobColumns(
        rows=(np.cumsum(keep) - 1)[rows[kept]].astype(np.int32).tobytes(),
        counts=counts[kept].tobytes(),
        ranks=np.frombuffer(logprobs.ranks, np.int32)[kept].tobytes(),
        ids=np.frombuffer(logprobs.ids, np.int32)[entries].tobytes(),
        values=np.frombuffer(logprobs.values, np.float32)[entries].tobytes(),
    )


def _joined(parts: list[Rows]) -> LogprobColumns | None:
    if all(part.logprobs is None for part in parts):
        return None
    if len(parts) == 1:
        return parts[0].logprobs
    found: list[tuple[int, LogprobColumns]] = []
    before = 0
    for part in parts:
        if part.logprobs is not None:
            found.append((before, part.logprobs))
        before += part.count
    return LogprobColumns(
        rows=b"".join(
            (np.frombuffer(p.rows, np.int32) + np.int32(offset)).tobytes() for offset, p in found
        ),
        counts=b"".join(p.counts for _, p in found),
        ranks=b"".join(p.ranks for _, p in found),
        ids=b"".join(p.ids for _, p in found),
        values=b"".join(p.values for _, p in found),
    )
