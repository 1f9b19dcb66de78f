"""The answer that is streamed: each piece as an event, as soon as it is there. Knows no HTTP."""

import asyncio
from collections.abc import Sequence

from pagewire_protocol.structs import TokenLogprobs

from .answers import PLAIN, ContentDelta, Delta, ParserFactory, ReasoningDelta, ToolCallDelta
from .errors import as_api_error
from .reply import Choice, Echo, Reply
from .responses import ChoiceData, ResponseFormatter
from .sse import DONE, HOLE, Flusher, Outlet, encode, event, fill, template


class SseReply(Reply):
    """A streamed answer; its events go to `outlet`."""

    def __init__(
        self,
        formatter: ResponseFormatter,
        loop: asyncio.AbstractEventLoop,
        echoes: Sequence[Echo],
        flusher: Flusher,
        make_parser: ParserFactory = PLAIN,
    ) -> None:
        self.flusher = flusher
        self.outlet = Outlet(flusher)
        super().__init__(formatter, loop, echoes, make_parser)

    def _make_choices(self, count: int) -> "Sequence[SseChoice]":
        kind = SseChoice if self.make_parser is PLAIN else ParsedSseChoice
        return [kind(self, index) for index in range(count)]

    def first_events(self) -> list[bytes]:
        """The events that precede all generated text."""
        usage = self.usage() if self.rendering.continuous_usage else None
        prefixes = [choice.prefix for choice in self.choices]
        return [event(chunk) for chunk in self.formatter.first_chunks(prefixes, usage)]

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
        for choice in self.choices:
            if isinstance(choice, SseChoice):
                choice.mute()
        super().close()


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
        self._parser = reply.make_parser()
        self._called_tools = False
        self._owes_score = reply.rendering.scores_echo
        """The echoed prompt with its log-probabilities was not sent yet."""

    def text(self, text: str, /) -> None:
        pieces = self._pieces
        if not pieces:
            self._outlet.touch()
            self.reply.open()
        pieces += (self._head, encode(text), self._tail)

    def tokens(self, text: str, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        rendering = self.reply.rendering
        self.usage.completion_tokens += len(tokens)
        self.reply.open()
        self._send_score()
        if text or (logprobs and rendering.logprobs >= 0) or rendering.return_token_ids:
            # What a row brings beside its text goes with the first of its events.
            first, *more = self._noted(self._parser.feed(text)) or (ContentDelta(""),)
            data = ChoiceData(
                self.index,
                tokens=tokens,
                logprobs=logprobs,
                offset=len(self.echo.text),
                prompt_ids=self.data.prompt_ids,
            )
            data.add(first)
            self._send(data)
            for delta in more:
                self._send_delta(delta)
            self.data.prompt_ids = None

    def finished(self, reason: str, stop_reason: int | str | None, completion_tokens: int) -> None:
        self.reason = reason
        self.usage.completion_tokens = completion_tokens
        self.reply.open()
        self._send_score()
        for delta in self._noted(self._parser.finish()):
            self._send_delta(delta)
        data = ChoiceData(self.index, prompt_ids=self.data.prompt_ids)
        data.set_end(reason, stop_reason, called_tools=self._called_tools)
        self._send(data)
        self.reply.choice_finished()

    def mute(self) -> None:
        """The stream has ended: what still comes, before the request is cancelled, goes nowhere."""
        self._outlet = Outlet(self.reply.flusher)
        self._pieces = self._outlet.pieces

    def _noted(self, deltas: Sequence[Delta]) -> Sequence[Delta]:
        """The deltas; remembers whether one is of a tool call, which decides the finish reason."""
        if any(isinstance(delta, ToolCallDelta) for delta in deltas):
            self._called_tools = True
        return deltas

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
        self._outlet.push(event(self.reply.formatter.chunk(data, usage)))


class ParsedSseChoice(SseChoice):
    """The sink of one streamed choice whose text a parser takes apart. Each kind of delta that
    repeats has a template of its own, made when it first occurs."""

    def __init__(self, reply: SseReply, index: int) -> None:
        super().__init__(reply, index)
        self._content_template = (self._head, self._tail)
        self._reasoning_template: tuple[bytes, ...] = ()
        self._argument_templates: dict[int, tuple[bytes, ...]] = {}
        """By the index of the tool call."""

    def text(self, text: str, /) -> None:
        self.reply.open()
        for delta in self._noted(self._parser.feed(text)):
            self._outlet.push(self._event_of(delta))

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
