"""The answer that is streamed: each piece as an event, as soon as it is there. Knows no HTTP."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from msgspec.structs import replace
from pagewire_protocol.structs import TokenLogprobs

from ..requests.answers import ContentDelta, Delta, Output, ReasoningDelta, ToolCallDelta
from ..requests.request import OwnedRequest
from .errors import as_api_error
from .logprobs import PromptScore
from .reply import Choice, Echo, Reply
from .responses import ChoiceData, ResponseFormatter
from .sse import DONE, HOLE, Flusher, Outlet, decode_text, encode, event, fill, template
from .turns import Turn

REACH: Final = 192
"""How many pieces of an outlet are looked through for a choice's newest event."""


class SseReply(Reply):
    """A streamed answer; its events go to `outlet`."""

    def __init__(
        self,
        formatter: ResponseFormatter,
        loop: asyncio.AbstractEventLoop,
        echoes: Sequence[Echo],
        flusher: Flusher,
        park: Callable[[OwnedRequest, bool], None] = lambda request, parked: None,
    ) -> None:
        """`park`: told of each request when the client reads nothing, and when it reads again."""
        self.flusher = flusher
        self.outlet = Outlet(flusher, self._park_all)
        self._park = park
        self.has_begun = False
        """The first events were made."""
        super().__init__(formatter, loop, echoes)

    def _park_all(self, parked: bool) -> None:
        for request in self.requests:
            self._park(request, parked)

    def _make_choices(self, count: int) -> "Sequence[Choice]":
        kind = ParsedSseChoice if self.rendering.has_parts else SseChoice
        return [kind(self, index) for index in range(count)]

    def first_events(self) -> list[bytes]:
        """The events that precede all generated text."""
        self.has_begun = True
        usage = self.usage() if self.rendering.continuous_usage else None
        starts = [choice.start() for choice in self.choices]
        return [event(chunk) for chunk in self.formatter.first_chunks(starts, usage)]

    def close(self) -> None:
        """Push the events that end the stream. An error before the first event is no event: the
        HTTP answer says it."""
        if self.done.done():
            return
        if self.error is None:
            if self.rendering.include_usage:
                self.outlet.push(event(self.formatter.usage_chunk(self.usage())))
            self.outlet.push(DONE)
        elif self.opened.done():
            self.outlet.push(b"data: " + as_api_error(self.error).body() + b"\n\n", DONE)
        if self.error is not None:
            for choice in self.choices:
                if isinstance(choice, SseChoice):
                    choice.mute()
        super().close()


class UnplacedTokens:
    """Tokens of a streamed completion that begin inside text which is held back: a stop string may
    yet cut it off, and they then begin at the end of the text."""

    def __init__(self) -> None:
        self._length = 0
        """Characters of the text so far."""
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def add(
        self, text: str, tokens: list[int], logprobs: list[TokenLogprobs]
    ) -> tuple[list[int], list[TokenLogprobs]]:
        """The tokens of which it is certain, with `text` and one more row, where they begin."""
        self._length += len(text)
        if not self._logprobs and (not logprobs or logprobs[-1].offset <= self._length):
            return tokens, logprobs
        tokens = self._tokens + tokens
        logprobs = self._logprobs + logprobs
        certain = sum(entry.offset <= self._length for entry in logprobs)
        self._tokens = tokens[certain:]
        self._logprobs = logprobs[certain:]
        return tokens[:certain], logprobs[:certain]

    def rest(self) -> tuple[list[int], list[TokenLogprobs]]:
        """The tokens that no text has come for, at the end."""
        ended = [replace(entry, offset=self._length) for entry in self._logprobs]
        return self._tokens, ended


class SseChoice(Choice):
    """The sink of one streamed choice whose text is all content.

    `text` runs for every token of a plain stream: one template, no dict, no parser, no wake-up.
    A client that asks for more than text (log-probabilities, ids, usage in each event) gets its
    events from `tokens`.
    """

    reply: SseReply

    def __init__(self, reply: SseReply, index: int) -> None:
        super().__init__(reply, index)
        self.wants_tokens = self.wants_tokens or reply.rendering.continuous_usage
        self._head, self._tail = template(reply.formatter.chunk(ChoiceData(index, HOLE)))
        self._outlet = reply.outlet
        self._pieces = reply.outlet.pieces
        self._called_tools = False
        self._last_event: bytes | None = None
        """The newest event that came as one piece, and what it was made of."""
        self._last_content: ChoiceData | Delta = ChoiceData(index)
        self._owes_score = reply.rendering.scores_echo
        """The echoed prompt with its log-probabilities was not sent yet."""
        self._held: list[Callable[[], None]] = []
        """What came while the prompt's log-probabilities were being encoded."""
        self._encoding: asyncio.Task[None] | None = None
        rendering = reply.rendering
        shows_offsets = rendering.logprobs >= 0 and not rendering.chat
        self._unplaced = UnplacedTokens() if shows_offsets else None

    def start(self) -> ChoiceData:
        """With the prompt's token ids, if they are known by now."""
        data = super().start()
        if self.reply.formatter.has_first_chunks:
            self._move_prompt_ids(data)
        return data

    def _move_prompt_ids(self, data: ChoiceData) -> None:
        """Show the prompt's token ids in `data`, unless they were shown already, or belong to an
        event before all text that is not made yet."""
        if self.reply.has_begun or not self.reply.formatter.has_first_chunks:
            data.prompt_ids = data.prompt_ids or self.data.prompt_ids
            self.data.prompt_ids = None

    def text(self, text: Output, /) -> None:
        pieces = self._pieces
        if not pieces:
            self._outlet.touch()
            self.reply.open()
        pieces += (self._head, encode(text), self._tail)

    def tokens(self, text: Output, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        if self._holds(partial(self.tokens, text, tokens, logprobs)):
            return
        rendering = self.reply.rendering
        self.usage.completion_tokens += len(tokens)
        self.reply.open()
        self._send_score()
        if self._unplaced is not None and isinstance(text, str):
            tokens, logprobs = self._unplaced.add(text, tokens, logprobs)
        if (
            text
            or (logprobs and rendering.logprobs >= 0)
            or (tokens and rendering.return_token_ids)
        ):
            # What a row brings beside its text goes with the first of its events.
            first, *more = self._deltas(text) or (ContentDelta(""),)
            data = ChoiceData(
                self.index,
                tokens=tokens,
                logprobs=logprobs,
                offset=len(self.echo.text),
            )
            self._move_prompt_ids(data)
            data.add(first)
            self._send(data)
            for delta in more:
                self._send_delta(delta)

    def finished(
        self,
        reason: str,
        stop_reason: int | str | None,
        completion_tokens: int,
        reasoning_tokens: int = 0,
    ) -> None:
        if self._holds(
            partial(self.finished, reason, stop_reason, completion_tokens, reasoning_tokens)
        ):
            return
        self.reason = reason
        self.usage.completion_tokens = completion_tokens
        self.usage.reasoning_tokens = reasoning_tokens
        self.reply.open()
        self._send_score()
        data = self._take_back_last()
        self._move_prompt_ids(data)
        if self._unplaced is not None:
            tokens, logprobs = self._unplaced.rest()
            data.tokens = [*data.tokens, *tokens]
            data.logprobs = [*data.logprobs, *logprobs]
            data.offset = len(self.echo.text)
        data.set_end(reason, stop_reason, called_tools=self._called_tools)
        self._send(data)
        self.reply.choice_finished()

    def _holds(self, call: Callable[[], None]) -> bool:
        """Whether `call` has to wait until the prompt's log-probabilities are encoded, which comes
        first and may take a while; it is made then."""
        if self._encoding is None and (self.score is None or self.score.is_encoded):
            return False
        self._held.append(call)
        if self._encoding is None:
            self._encoding = asyncio.ensure_future(self._encode_score(self.score))
        return True

    async def _encode_score(self, score: PromptScore | None) -> None:
        if score is not None:
            await score.encode(Turn())
        self._encoding = None
        held, self._held = self._held, []
        if not self.reply.done.done():
            for call in held:
                call()

    def _take_back_last(self) -> ChoiceData:
        """What the choice's newest event shows, taken out of the outlet, so that the finish reason
        comes with the last text; nothing where that event was written already."""
        pieces = self._pieces
        data = ChoiceData(self.index)
        for at in range(len(pieces) - 1, max(-1, len(pieces) - 1 - REACH), -1):
            if pieces[at] is self._tail:
                data.content = decode_text(pieces[at - 1])
                del pieces[at - 2 : at + 1]
                break
            if pieces[at] is self._last_event:
                last = self._last_content
                if isinstance(last, ChoiceData):
                    data = last
                else:
                    data.add(last)
                if data.tool_calls or data.score:  # programs read calls alone; scores are long
                    return ChoiceData(self.index)
                del pieces[at]
                break
        return data

    def mute(self) -> None:
        """The stream has ended: what still comes, before the request is cancelled, goes nowhere."""
        if self._encoding is not None:
            self._encoding.cancel()
        self._outlet = Outlet(self.reply.flusher)
        self._pieces = self._outlet.pieces

    def _deltas(self, text: Output) -> Sequence[Delta]:
        """The parts that are shown; remembers whether one is of a tool call, which decides the
        finish reason."""
        shown = self.shown(text)
        if isinstance(shown, str):
            return (ContentDelta(shown),) if shown else ()
        if any(isinstance(delta, ToolCallDelta) for delta in shown):
            self._called_tools = True
        return shown

    def _send_delta(self, delta: Delta) -> None:
        data = ChoiceData(self.index)
        data.add(delta)
        self._send(data)

    def _send_score(self) -> None:
        """The echoed prompt with its log-probabilities, which are complete before the first token
        comes."""
        if self._owes_score and self.score:
            self._owes_score = False
            self._send(ChoiceData(self.index, self.echo.text, score=self.score))

    def _send(self, data: ChoiceData) -> None:
        usage = self.reply.usage() if self.reply.rendering.continuous_usage else None
        self._last_content = data
        self._last_event = event(self.reply.formatter.chunk(data, usage))
        self._outlet.push(self._last_event)


class ParsedSseChoice(SseChoice):
    """The sink of one streamed choice whose answer comes in parts. Each kind of delta that
    repeats has a template of its own, made when it first occurs."""

    def __init__(self, reply: SseReply, index: int) -> None:
        super().__init__(reply, index)
        self._content_template = (self._head, self._tail)
        self._reasoning_template: tuple[bytes, ...] = ()
        self._argument_templates: dict[int, tuple[bytes, ...]] = {}
        """By the index of the tool call."""

    def text(self, text: Output, /) -> None:
        self.reply.open()
        for delta in self._deltas(text):
            self._last_content = delta
            self._last_event = self._event_of(delta)
            self._outlet.push(self._last_event)

    def _event_of(self, delta: Delta) -> bytes:
        match delta:
            case ContentDelta(text):
                return fill(self._content_template, text)
            case ReasoningDelta(text):
                if not self._reasoning_template:
                    self._reasoning_template = self._make_template(ReasoningDelta(HOLE))
                return fill(self._reasoning_template, text)
            case ToolCallDelta(index, name="", arguments=text):
                if index not in self._argument_templates:
                    opened = ToolCallDelta(index, arguments=HOLE)
                    self._argument_templates[index] = self._make_template(opened)
                return fill(self._argument_templates[index], text)
            case ToolCallDelta():
                # The delta that opens a call has more than text, and comes once.
                data = ChoiceData(self.index)
                data.add(delta)
                return event(self.reply.formatter.chunk(data))

    def _make_template(self, delta: Delta) -> tuple[bytes, ...]:
        data = ChoiceData(self.index)
        data.add(delta)
        return template(self.reply.formatter.chunk(data))
