"""The text of one attempt that is being generated: decoding, stop strings, what is shown and what
is held back. No sockets, no policy."""

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec.structs import replace
from pagewire_protocol.messages import End, Finish, Generate, Started

from .answers.model import StreamParser
from .answers.parser import Part
from .decode import Decoder
from .outgoing import OutgoingDeltas
from .stop import Matcher

NO_EXECUTION: Final = -1
"""No row of the attempt has come yet."""
NEVER: Final = 2**31
"""An output position that no stream reaches."""


class Stream:
    """One attempt of one request.

    A token's text comes from one of two paths:

        +------------+------------------------------------+--------------------------------+
        |            | fast                               | slow                           |
        +------------+------------------------------------+--------------------------------+
        | when       | `needs_step` is False and          | else                           |
        |            | `texts[token]` is not None         |                                |
        | the text   | `texts[token]`, read by rows.fill  | `step(token)`                  |
        | position   | advanced by rows.fill              | advanced by `step`             |
        +------------+------------------------------------+--------------------------------+

    Most tokens take the fast one: a list look-up instead of a call. `needs_step` says that the
    next token's text depends on what came before, or that the text passes on to something that
    must see it. That is so in exactly these cases:

    - there are stop strings: the matcher must see all text;
    - log-probabilities are asked for: the text is counted, for where each token begins in it;
    - the decoder holds something back: the first bytes of a character, or a space at the beginning
      of the text that is not shown;
    - the stream has reached the token whose text is hidden (`hide_from`);

    - the answer is taken apart (ParsedStream).

    `step` and `hide_from` alone change these, so they alone set `needs_step`. `texts[token]` is
    None for a token that is no whole character by itself: it begins a case of the second kind.
    """

    __slots__ = (
        "_always_steps",
        "_counts_text",
        "_decoder",
        "_hidden_from",
        "_length",
        "_matcher",
        "_unmatched",
        "attempt",
        "execution",
        "frontend_handle",
        "handle",
        "ignored",
        "includes_stop",
        "needs_step",
        "outgoing",
        "parts",
        "position",
        "prompt_ids",
        "prompt_tokens",
        "reply_to",
        "rid",
        "text_offset",
        "texts",
    )

    def __init__(
        self,
        request: Generate,
        handle: int,
        prompt: bytes,
        decoder: Decoder,
        outgoing: OutgoingDeltas,
    ) -> None:
        """`handle`: this tokenizer's, which the scheduler uses. `prompt`: int32 column."""
        options = request.text
        self.rid = request.rid
        self.attempt = request.attempt
        self.frontend_handle = request.handle
        self.reply_to = request.reply_to
        """The frontend's inbox."""
        self.handle = handle
        self.outgoing = outgoing
        """Where what the frontend gets is collected."""
        self.execution = NO_EXECUTION
        self.position = 0
        """Tokens so far, which is the output position of the next one."""
        self.prompt_tokens = len(prompt) // 4
        self.prompt_ids = prompt if options.return_prompt_ids else None
        self.includes_stop = options.include_stop
        """The text that ended the stream is shown: a stop string, or a stop token's text."""
        self.ignored = ""
        """Keywords of its schema that its grammar does not hold."""
        self.parts: Sequence[Part] = ()
        """Those of an answer that is taken apart, since they were last sent."""
        self.texts = decoder.texts
        """By token id: the text of a token that stands by itself."""
        self._decoder = decoder
        self._matcher = Matcher(options.stop, options.include_stop) if options.stop else None
        self._unmatched = request.sampling.min_tokens if options.stop else 0
        """Tokens at the beginning whose text takes no part in stop strings."""
        self._hidden_from = NEVER
        self.text_offset = 0
        """Where the last token begins in the text, in characters; only with log-probabilities."""
        self._length = 0
        """Characters of the text so far, those held back included."""
        self._counts_text = request.sampling.logprobs >= 0
        self._always_steps = self._matcher is not None or self._counts_text
        self.needs_step = self._always_steps or not decoder.can_look_up
        """The next token's text comes from `step`, not from `texts`; see the box above."""

    def hide_from(self, position: int) -> None:
        """Tokens from this output position on have no text: the one that ends the stream counts,
        but a stop token's own text is not shown."""
        self._hidden_from = position
        self._always_steps = self.needs_step = True

    def step(self, token: int) -> str:
        """The text to show after one more token; advances the position. `stop_string` is set
        afterwards if that token completed one."""
        position = self.position
        decoder = self._decoder
        self.position = position + 1
        lead = 0
        if position >= self._hidden_from:
            text = ""
        elif not decoder.can_look_up or (text := self.texts[token]) is None:
            text = decoder.step(token)
            lead = decoder.lead
        if self._counts_text:
            self.text_offset = self._length + lead
            self._length += len(text)
        self.needs_step = self._always_steps or not decoder.can_look_up
        return self._match(text, position)

    def _match(self, text: str, position: int) -> str:
        if self._matcher is None or position < self._unmatched:
            return text
        return self._matcher.feed(text)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the stream; None as long as there is none."""
        return self._matcher.matched if self._matcher else None

    def replay(self, output: Iterable[int]) -> None:
        """Restore the state after `output`, whose text was shown already."""
        for token in output:
            self.step(token)

    def flush(self) -> str:
        """The text held back, when no token follows. May complete a stop string (one that ends in
        U+FFFD, for an unfinished character)."""
        text = self._match(self._decoder.flush(), self.position)
        if self._matcher is not None and self.stop_string is None:
            text += self._matcher.flush()
        return text

    def send_rest(self) -> None:
        """Send what `flush` returns, as text without a token."""
        text = self.flush()
        if text or self.parts:
            execution = max(self.execution, 0)
            row = (self.frontend_handle, self.attempt, execution, self.position, text)
            self.outgoing.add_text(row, self.take_parts())

    def take_parts(self) -> "Sequence[Part]":
        """The parts that came since they were last taken."""
        parts = self.parts
        self.parts = ()
        return parts

    def ended(self, end: End) -> End:
        """The scheduler's End for the frontend, which knows another handle."""
        return replace(end, handle=self.frontend_handle, attempt=self.attempt)

    def started(self, cached_tokens: int) -> Started:
        """What the frontend is told when the attempt got a slot on a worker."""
        return Started(
            self.frontend_handle,
            self.attempt,
            self.prompt_tokens,
            cached_tokens,
            self.prompt_ids,
            self.ignored,
        )

    def stopped(self) -> End:
        """The end by `stop_string`."""
        return End(self.frontend_handle, self.attempt, Finish.STOP, self.stop_string)

    def lost(self, message: str) -> End:
        """The end that makes the frontend send the request again."""
        return End(self.frontend_handle, self.attempt, Finish.LOST, message=message)

    def refused(self, message: str, status: int, retry_after_s: int) -> End:
        """The end that passes `status` and `message` on to the client."""
        return End(
            self.frontend_handle,
            self.attempt,
            Finish.REFUSED,
            status=status,
            message=message,
            retry_after_s=retry_after_s,
        )


class ParsedStream(Stream):
    """A stream whose text is taken apart into reasoning, content and calls: `step` returns no text,
    and `parts` has what is certain.

    Special tokens that are markers have their text, the others have none unless the request wants
    them. Stop strings come first: what they hide is no part either.
    """

    __slots__ = ("_hidden", "_only_first", "_parser", "_reasoning_tokens", "_shows_special")

    def __init__(
        self,
        request: Generate,
        handle: int,
        prompt: bytes,
        decoder: Decoder,
        outgoing: OutgoingDeltas,
        parsing: StreamParser,
    ) -> None:
        """`decoder`: one that shows special tokens."""
        super().__init__(request, handle, prompt, decoder, outgoing)
        self._parser = parsing.parser
        self._hidden = parsing.hidden
        self._only_first = parsing.only_first
        self._shows_special = not request.text.skip_special_tokens
        self._reasoning_tokens = 0
        self._always_steps = self.needs_step = True

    def step(self, token: int) -> str:
        was_reasoning = self._parser.is_reasoning
        if token in self._hidden and not self._shows_special:
            hidden_from = self._hidden_from
            self.hide_from(self.position)
            text = super().step(token)
            self.hide_from(hidden_from)
        else:
            text = super().step(token)
        self._take(self._parser.feed(text))
        self._reasoning_tokens += was_reasoning or self._parser.is_reasoning
        if self.stop_string is not None:
            self._take(self._parser.finish())
        return ""

    def _take(self, parts: "list[Part]") -> None:
        if self._only_first:
            parts = [part for part in parts if not part[1]]
        if parts:
            self.parts = [*self.parts, *parts]

    def replay(self, output: Iterable[int]) -> None:
        super().replay(output)
        self.take_parts()

    def flush(self) -> str:
        self._take(self._parser.feed(super().flush()))
        self._take(self._parser.finish())
        return ""

    def stopped(self) -> End:
        return replace(super().stopped(), reasoning_tokens=self._reasoning_tokens)

    def ended(self, end: End) -> End:
        return replace(super().ended(end), reasoning_tokens=self._reasoning_tokens)
