"""The state of one attempt that is being generated, and the letters under way to one frontend. No
sockets, no policy."""

from collections.abc import Iterable

import numpy as np
from pagewire_protocol.messages import (
    Deltas,
    End,
    Generate,
    PromptLogprobs,
    Started,
    TokenLogprobs,
    pack,
)

from .decode import Decoder
from .stop import Matcher

Row = tuple[int, int, int, int, str]
"""The owner's handle, attempt, execution, position, text."""


class Mail:
    """What one frontend gets at the end of this drain."""

    __slots__ = ("counts", "ended", "logprobs", "prompt_logprobs", "rows", "started", "tokens")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tokens: list[int] = []
        self.counts: dict[int, int] = {}
        """Tokens of a row, where they are not 1."""
        self.started: list[Started] = []
        self.ended: list[End] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[PromptLogprobs] = []

    def __bool__(self) -> bool:
        return bool(self.rows or self.started or self.ended or self.prompt_logprobs)

    def messages(self) -> list[Deltas]:
        """All of it, in order; leaves this empty. Log-probabilities of prompts are long: each run
        of them is a message of its own."""
        if not self.prompt_logprobs:
            return [self.take()]
        prompts, self.prompt_logprobs, started, self.started = (
            self.prompt_logprobs,
            [],
            tuple(self.started),
            [],
        )
        nothing = (b"", b"", b"", b"", b"", b"", ())
        first = [Deltas(*nothing, started)] if started else []
        whole = [*first, *(Deltas(*nothing, prompt_logprobs=(prompt,)) for prompt in prompts)]
        return [*whole, self.take()] if self else whole

    def take(self) -> Deltas:
        """The message of all but prompts; leaves that empty."""
        deltas = self._deltas()
        self.rows, self.tokens, self.counts, self.started, self.ended, self.logprobs = (
            [],
            [],
            {},
            [],
            [],
            [],
        )
        return deltas

    def _deltas(self) -> Deltas:
        if not self.rows:
            return Deltas(b"", b"", b"", b"", b"", b"", (), tuple(self.started), tuple(self.ended))
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

    def extend_row(self, at: int, text: str, tokens: int = 1) -> None:
        """More text, and tokens that follow those of the row, for the row `at`."""
        row = self.rows[at]
        self.rows[at] = (*row[:4], row[4] + text)
        if tokens:
            self.counts[at] = self.counts.get(at, 1) + tokens

    def add_text(self, stream: "Stream", text: str) -> None:
        """Text without a token: to the newest row of the attempt in this drain, else as a row of 0
        tokens."""
        for at in range(len(self.rows) - 1, -1, -1):
            if self.rows[at][:2] == (stream.owner, stream.attempt):
                self.extend_row(at, text, 0)
                return
        self.counts[len(self.rows)] = 0
        self.rows.append(
            (stream.owner, stream.attempt, max(stream.execution, 0), stream.position, text)
        )


class Stream:
    """`careful` says that a token needs more than a look into `texts`."""

    __slots__ = (
        "always_careful",
        "attempt",
        "careful",
        "decoder",
        "execution",
        "handle",
        "include_stop",
        "mail",
        "matcher",
        "muted_from",
        "owner",
        "position",
        "prompt_ids",
        "prompt_tokens",
        "reply_to",
        "rid",
        "texts",
        "unchecked",
    )

    def __init__(
        self, request: Generate, handle: int, prompt: bytes, decoder: Decoder, mail: Mail
    ) -> None:
        options = request.text
        self.rid, self.attempt, self.owner, self.reply_to = (
            request.rid,
            request.attempt,
            request.handle,
            request.reply_to,
        )
        self.handle, self.mail, self.decoder, self.texts = handle, mail, decoder, decoder.texts
        self.execution = -1
        self.position = 0
        self.prompt_tokens = len(prompt) // 4
        self.prompt_ids = prompt if options.return_prompt_ids else None
        self.matcher = Matcher(options.stop, options.include_stop) if options.stop else None
        self.include_stop = options.include_stop
        self.unchecked = request.sampling.min_tokens if options.stop else 0
        """Tokens whose text takes no part in stop strings."""
        self.muted_from = 2**31
        """The output position from which on tokens have no text: a stop token's own text is not
        shown."""
        self.always_careful = self.matcher is not None
        self.careful = self.always_careful or not decoder.clean

    def take(self, token: int) -> str:
        """The text to show after one more token; advances the position. `found` tells whether a
        stop string ended it."""
        position, decoder = self.position, self.decoder
        self.position = position + 1
        if position >= self.muted_from:
            text = ""
        elif not decoder.clean or (text := self.texts[token]) is None:
            text = decoder.step(token)
        self.careful = self.always_careful or not decoder.clean
        return self._match(text, position)

    def _match(self, text: str, position: int) -> str:
        if self.matcher is None or position < self.unchecked:
            return text
        return self.matcher.feed(text)

    @property
    def found(self) -> str | None:
        return self.matcher.found if self.matcher else None

    def replay(self, output: Iterable[int]) -> None:
        """Restore the state after `output`, whose text was shown already."""
        for token in output:
            self.take(token)

    def finish(self) -> str:
        """The text held back, when no token follows. May find a stop string (that ends in
        U+FFFD)."""
        text = self._match(self.decoder.flush(), self.position)
        return text + self.matcher.flush() if self.matcher and self.found is None else text
