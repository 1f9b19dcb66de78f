"""What the scheduler has to tell each tokenizer since it last did: token rows, placements and ends,
gathered into one Tokens message each.

Knows inboxes by the number of their reply route only; the address behind it is in `peers.py`.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from pagewire_protocol.columns import Slot
from pagewire_protocol.messages import End, LogprobColumns, Placed, PromptLogprobs, Tokens

from .request import ReplyRoute
from .slots import I32, I64, Bools, Slots, ints

Column = NDArray[Any]


class Rows(NamedTuple):
    """The rows of one step for one inbox, as columns of the wire. Empty `counts`: one token a row.
    `logprobs.rows` are indices into these `tokens`."""

    handles: bytes
    attempts: bytes
    executions: bytes
    positions: bytes
    tokens: bytes
    counts: bytes
    logprobs: LogprobColumns | None


@dataclass(slots=True)
class OutgoingTokens:
    """What becomes the next Tokens message to one inbox."""

    rows: list[Rows] = field(default_factory=list[Rows])
    placed: list[Placed] = field(default_factory=list[Placed])
    ended: list[End] = field(default_factory=list[End])
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list[PromptLogprobs])

    def message(self) -> Tokens:
        """All of it."""
        runs = self.rows
        if len(runs) == 1:
            rows = runs[0]
        else:
            rows = Rows(
                b"".join(run.handles for run in runs),
                b"".join(run.attempts for run in runs),
                b"".join(run.executions for run in runs),
                b"".join(run.positions for run in runs),
                b"".join(run.tokens for run in runs),
                _joined_counts(runs),
                _joined_logprobs(runs),
            )
        return Tokens(
            rows.handles,
            rows.attempts,
            rows.executions,
            rows.positions,
            rows.tokens,
            tuple(self.placed),
            tuple(self.ended),
            rows.logprobs,
            tuple(self.prompt_logprobs),
            rows.counts,
        )


class Outgoing:
    """An OutgoingTokens for each reply route."""

    def __init__(self) -> None:
        self._by_route: dict[ReplyRoute, OutgoingTokens] = {}

    def to(self, reply_route: ReplyRoute) -> OutgoingTokens:
        """What goes to this route next, to be added to."""
        outgoing = self._by_route.get(reply_route)
        if outgoing is None:
            outgoing = self._by_route[reply_route] = OutgoingTokens()
        return outgoing

    def take(self) -> dict[ReplyRoute, OutgoingTokens]:
        """All there is, by route; leaves this empty."""
        taken = self._by_route
        self._by_route = {}
        return taken

    def add_tokens(
        self,
        slots: Slots,
        rows: I32,
        positions: I64,
        tokens: I32,
        counts: I32 | None,
        logprobs: LogprobColumns | None,
    ) -> None:
        """The request in slot `rows[i]` gets `counts[i]` tokens, one when `counts` is None, from
        output position `positions[i]` on. `logprobs.rows` are indices into `tokens`."""
        if counts is not None:
            # A row without a token says nothing to the tokenizer.
            brings = counts > 0
            rows = rows[brings]
            positions = positions[brings]
            counts = counts[brings]
        if not len(rows):
            return
        routes = slots.reply_route[rows]
        first = ReplyRoute(int(routes[0]))
        if (routes == first).all():
            self.to(first).rows.append(_packed(slots, rows, positions, tokens, counts, logprobs))
            return
        for route in ints(np.unique(routes)):
            mine = routes == route
            my_tokens = mine if counts is None else np.repeat(mine, counts)
            run = _packed(
                slots,
                rows[mine],
                positions[mine],
                tokens[my_tokens],
                None if counts is None else counts[mine],
                select(logprobs, my_tokens),
            )
            self.to(ReplyRoute(route)).rows.append(run)

    def add_prompt_logprobs(self, slots: Slots, slot: Slot, entry: PromptLogprobs) -> None:
        """`entry` is of the prompt in `slot`."""
        addressed = replace(
            entry,
            slot=None,
            handle=int(slots.handle[slot]),
            attempt=int(slots.attempt[slot]),
            execution=int(slots.execution[slot]),
        )
        self.to(ReplyRoute(int(slots.reply_route[slot]))).prompt_logprobs.append(addressed)


def _packed(
    slots: Slots,
    rows: I32,
    positions: I64,
    tokens: I32,
    counts: I32 | None,
    logprobs: LogprobColumns | None,
) -> Rows:
    return Rows(
        slots.handle[rows].tobytes(),
        slots.attempt[rows].tobytes(),
        slots.execution[rows].tobytes(),
        positions.astype(np.int32).tobytes(),
        tokens.tobytes(),
        b"" if counts is None else counts.tobytes(),
        logprobs,
    )


def select(logprobs: LogprobColumns | None, keep: Bools) -> LogprobColumns | None:
    """The log-probabilities of the tokens where `keep` [tokens] holds, with `rows` counted among
    those."""
    if logprobs is None:
        return None
    rows = np.frombuffer(logprobs.rows, np.int32)
    counts = np.frombuffer(logprobs.counts, np.int32)
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


def _joined_counts(runs: list[Rows]) -> bytes:
    """The counts of all parts; empty where each row of each has one token."""
    if not any(run.counts for run in runs):
        return b""
    ones = np.ones(1, np.int32).tobytes()
    return b"".join(run.counts or ones * (len(run.handles) // 4) for run in runs)


def _joined_logprobs(runs: list[Rows]) -> LogprobColumns | None:
    """The log-probabilities of all parts, with `rows` counted over the tokens of all of them."""
    columns: list[LogprobColumns] = []
    rows: list[bytes] = []
    tokens_before = 0
    for run in runs:
        if run.logprobs is not None:
            columns.append(run.logprobs)
            moved = np.frombuffer(run.logprobs.rows, np.int32) + np.int32(tokens_before)
            rows.append(moved.tobytes())
        tokens_before += len(run.tokens) // 4
    if not columns:
        return None
    return LogprobColumns(
        rows=b"".join(rows),
        counts=b"".join(run.counts for run in columns),
        ranks=b"".join(run.ranks for run in columns),
        ids=b"".join(run.ids for run in columns),
        values=b"".join(run.values for run in columns),
    )
