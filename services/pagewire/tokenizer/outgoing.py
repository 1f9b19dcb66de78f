"""What the tokenizer is about to send to one frontend: the rows, starts and ends of one drain. No
sockets.

Everything that one drain of the inbox brings for a frontend leaves as one Deltas message, so that a
step of 256 requests costs each process one message and not 256.
"""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from pagewire_protocol.messages import (
    Deltas,
    End,
    PromptLogprobs,
    Started,
    TokenLogprobs,
    pack,
)

from .answers.parser import Part

Row = tuple[int, int, int, int, str]
"""The frontend's handle, attempt, execution, output position of the first token, text."""


class OutgoingDeltas:
    """Collects one frontend's part of a drain; `messages` empties it."""

    __slots__ = (
        "counts",
        "ended",
        "logprobs",
        "parts",
        "prompt_logprobs",
        "rows",
        "started",
        "tokens",
    )

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tokens: list[int] = []
        """Those of all rows, one row after the other."""
        self.counts: dict[int, int] = {}
        """Tokens of a row by its index, for the rows that have not exactly 1."""
        self.started: list[Started] = []
        self.ended: list[End] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[PromptLogprobs] = []
        self.parts: list[tuple[int, Part]] = []
        """Parts of answers, each with the index of its row."""

    def __bool__(self) -> bool:
        return bool(self.rows or self.started or self.ended or self.prompt_logprobs)

    def messages(self) -> list[Deltas]:
        """All of it, in the order in which the frontend reads it; leaves this empty.

        Log-probabilities of prompts are long, so each run of them is a message of its own, after
        the starts and before the rows.
        """
        if not self.prompt_logprobs:
            return [self.take()]
        messages: list[Deltas] = []
        if self.started:
            messages.append(_without_rows(started=tuple(self.started)))
            self.started = []
        messages += [_without_rows(prompt_logprobs=(entry,)) for entry in self.prompt_logprobs]
        self.prompt_logprobs = []
        if self:
            messages.append(self.take())
        return messages

    def take(self) -> Deltas:
        """One message with all but the log-probabilities of prompts; leaves that part empty."""
        started = tuple(self.started)
        ended = tuple(self.ended)
        deltas = self._with_rows() if self.rows else _without_rows(started, ended)
        self.rows = []
        self.tokens = []
        self.counts = {}
        self.started = []
        self.ended = []
        self.logprobs = []
        if self.parts:
            deltas = self._with_parts(deltas)
        return deltas

    def _with_parts(self, deltas: Deltas) -> Deltas:
        # A stream's parts follow each other; a row that got some in two runs has them in order.
        self.parts.sort(key=lambda entry: entry[0])
        rows = [row for row, _ in self.parts]
        kinds, calls, texts = zip(*(part for _, part in self.parts), strict=True)
        self.parts = []
        return replace(
            deltas,
            part_rows=pack("i", rows),
            part_kinds=bytes(kinds),
            part_calls=pack("i", calls),
            part_texts=texts,
        )

    def add_parts(self, row: int, parts: Sequence[Part]) -> None:
        """Parts of the answer of the row with this index."""
        self.parts += [(row, part) for part in parts]

    def _with_rows(self) -> Deltas:
        handles, attempts, executions, positions, texts = zip(*self.rows, strict=True)
        counts = np.ones(len(self.rows), np.int32)
        for row, count in self.counts.items():
            counts[row] = count
        return Deltas(
            pack("I", handles),
            pack("I", attempts),
            pack("Q", executions),
            pack("i", positions),
            counts.tobytes(),
            pack("i", self.tokens),
            texts,
            tuple(self.started),
            tuple(self.ended),
            tuple(self.logprobs),
        )

    def extend_row(self, index: int, text: str, tokens: int = 1) -> None:
        """Append text, and the number of tokens that follow those of the row, to the row
        `index`."""
        row = self.rows[index]
        self.rows[index] = (*row[:4], row[4] + text)
        if tokens:
            self.counts[index] = self.counts.get(index, 1) + tokens

    def add_text(self, row: Row, parts: Sequence[Part] = ()) -> None:
        """Text, or parts, that come without a token: appended to the newest row of its attempt in
        this drain; `row` itself, with 0 tokens, where there is none."""
        handle, attempt, _, _, text = row
        for index in range(len(self.rows) - 1, -1, -1):
            if self.rows[index][:2] == (handle, attempt):
                self.extend_row(index, text, 0)
                self.add_parts(index, parts)
                return
        self.counts[len(self.rows)] = 0
        self.add_parts(len(self.rows), parts)
        self.rows.append(row)


def _without_rows(
    started: tuple[Started, ...] = (),
    ended: tuple[End, ...] = (),
    prompt_logprobs: tuple[PromptLogprobs, ...] = (),
) -> Deltas:
    empty = b""
    return Deltas(
        handles=empty,
        attempts=empty,
        executions=empty,
        positions=empty,
        counts=empty,
        tokens=empty,
        texts=(),
        started=started,
        ended=ended,
        prompt_logprobs=prompt_logprobs,
    )
