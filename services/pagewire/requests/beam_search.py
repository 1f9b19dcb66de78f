"""Beam search as a state machine: log-probabilities in, the next beams out. No I/O, no text, no
stack.

The rules are those of transformers' `generate(num_beams=..., do_sample=False)`. Of all one-token
continuations of the live beams only the `width` most likely may finish a hypothesis; the `width`
most likely that do not end live on. A hypothesis scores its cumulative log-probability divided by
length ** length_penalty, where the length counts the generated tokens, the ending one included.

    search = BeamSearch(4, max_tokens=32, ends={2})
    while search.live:
        search.advance([top_tokens(beam.tokens(), search.candidates) for beam in search.live])
    best = search.best(1)
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

from pagewire_protocol.sampling import MAX_LOGPROBS

MAX_WIDTH: Final = 16
MAX_CANDIDATES: Final = MAX_LOGPROBS
"""As many log-probabilities as the stack reports for a token."""
EarlyStopping = bool | Literal["never"]


class Beam:
    """A continuation of the prompt; beams share their beginnings. `score` is the cumulative
    log-probability, `kept` what the caller wants to remember of its last token."""

    __slots__ = ("kept", "length", "parent", "score", "token")

    def __init__(self, parent: "Beam | None", token: int, score: float, kept: Any = None) -> None:
        self.parent = parent
        self.token = token
        self.score = score
        self.kept = kept
        self.length: int = parent.length + 1 if parent else 0

    def path(self) -> "list[Beam]":
        """From the first token on."""
        path: list[Beam] = []
        beam = self
        while beam.parent is not None:
            path.append(beam)
            beam = beam.parent
        return path[::-1]

    def tokens(self) -> list[int]:
        """The generated ids, without the prompt's."""
        return [beam.token for beam in self.path()]


class Hypothesis(NamedTuple):
    """A finished continuation: its score with the length penalty, and the id that ended it (None:
    max_tokens did)."""

    score: float
    beam: Beam
    end: int | None


class BeamSearch:
    """One prompt's search. `live` are the beams to continue, most likely first, none when the
    search is over.

    early_stopping: True ends the search as soon as `width` hypotheses are there; False when the
    most likely beam, at its present length, scores no better than the worst of them; "never" when
    it could not even at its best length. The first `min_tokens` tokens are none that end. Raises
    ValueError naming the parameter that is out of bounds.
    """

    def __init__(
        self,
        width: int,
        max_tokens: int,
        ends: Iterable[int] = (),
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        min_tokens: int = 0,
    ) -> None:
        if not 1 <= width <= MAX_WIDTH:
            raise ValueError(f"a beam search may be 1 to {MAX_WIDTH} beams wide, got {width}")
        if early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping must be True, False or 'never', got {early_stopping!r}"
            )
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.width = width
        self.max_tokens = max_tokens
        self.ends = frozenset(ends)
        self._penalty = length_penalty
        self._early = early_stopping
        self._min_tokens = min_tokens
        self.live: list[Beam] = [Beam(None, -1, 0.0)]
        self.finished: list[Hypothesis] = []
        """At most `width`, best first."""

    @property
    def candidates(self) -> int:
        """How many of the most likely tokens of each beam `advance` needs. One beam can continue
        with `width` tokens at most, and those that end may come before them: more would not change
        the result."""
        return min(MAX_CANDIDATES, self.width + len(self.ends))

    def advance(
        self, rows: Sequence[Sequence[tuple[int, float]]], kept: Sequence[Any] | None = None
    ) -> None:
        """One round. rows[i]: (token, log-probability) of the most likely next tokens of live[i];
        kept[i]: what its continuations remember.

        Raises ValueError when there is not one row for each live beam."""
        if len(rows) != len(self.live):
            raise ValueError(f"{len(rows)} rows for {len(self.live)} live beams")
        length = self.live[0].length + 1
        ending = self.ends if length > self._min_tokens else frozenset[int]()
        passed = self.ends - ending
        grown = [
            Beam(beam, token, beam.score + logprob, kept[i] if kept else None)
            for i, (beam, row) in enumerate(zip(self.live, rows, strict=True))
            for token, logprob in row
            if token not in passed
        ]
        grown.sort(key=lambda beam: -beam.score)
        for beam in grown[: self.width]:
            if beam.token in ending or length == self.max_tokens:
                self.finished.append(
                    Hypothesis(
                        self._scored(beam.score, length),
                        beam,
                        beam.token if beam.token in ending else None,
                    )
                )
        self.finished = sorted(self.finished, key=lambda hypothesis: -hypothesis.score)[
            : self.width
        ]
        self.live = [beam for beam in grown if beam.token not in ending][: self.width]
        if length == self.max_tokens or self._cannot_improve(length):
            self.live = []

    def best(self, count: int) -> list[Hypothesis]:
        """The `count` best, best first: fewer only where the model had no further continuation."""
        return self.finished[:count]

    def _scored(self, score: float, length: int) -> float:
        return score / length**self._penalty

    def _cannot_improve(self, length: int) -> bool:
        if not self.live or len(self.finished) < self.width:
            return False
        if self._early is True:
            return True
        reach = self.max_tokens if self._early == "never" and self._penalty > 0 else length
        return self._scored(self.live[0].score, reach) <= self.finished[-1].score
