"""Streams of the APIs of agents: events with names, in which an answer is a row of blocks (text,
reasoning, calls) that are opened, filled and closed one after the other. Knows no API's words."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pagewire_protocol.structs import TokenLogprobs

from ..requests.answers import ContentDelta, Delta, Output, ToolCallDelta
from ..requests.request import OwnedRequest
from .errors import ApiError, as_api_error, renamed
from .events import SseReply
from .reply import Choice, Echo, Reply
from .responses import ResponseFormatter, Usage, block_of
from .sse import Flusher, encode

Json = dict[str, Any]


def named_event(body: Json) -> bytes:
    """The server-sent event of a body, under the name that is its `type`."""
    return b"event: %b\ndata: %b\n\n" % (body["type"].encode(), encode(body))


class EventWriter(ABC):
    """The events of one answer. A block is open until one of another kind begins."""

    names: ClassVar[Mapping[str, str]]
    """What the parameters of chats are called here, for errors."""

    def __init__(self) -> None:
        self.blocks = -1
        """The number of the block that is open, or was last; from 0."""
        self._open: tuple[type[Delta], int] | None = None

    @abstractmethod
    def first(self, usage: Usage) -> list[Json]:
        """Before everything."""

    @abstractmethod
    def opened(self, delta: Delta) -> list[Json]:
        """A block begins with this."""

    @abstractmethod
    def grown(self, delta: Delta) -> Json | None:
        """More of the open block."""

    @abstractmethod
    def closed(self, *, is_cut: bool) -> list[Json]:
        """The open block ends; `is_cut`: by the length of the answer."""

    @abstractmethod
    def last(self, reason: str, stop_reason: int | str | None, usage: Usage) -> list[Json]:
        """After everything; `reason` is stop, length or tool_calls."""

    @abstractmethod
    def failed(self, error: ApiError) -> list[Json]:
        """The answer ends with an error."""

    def deltas(self, deltas: Sequence[Delta]) -> list[Json]:
        """The events of parts of the answer."""
        events: list[Json] = []
        for delta in deltas:
            block = block_of(delta)
            if block != self._open:
                events += self.close()
                self._open = block
                self.blocks += 1
                events += self.opened(delta)
            event = self.grown(delta)
            if event is not None:
                events.append(event)
        return events

    def close(self, *, is_cut: bool = False) -> list[Json]:
        """End the open block, if there is one; `is_cut`: by the length of the answer."""
        if self._open is None:
            return []
        self._open = None
        return self.closed(is_cut=is_cut)


class TypedSseReply(SseReply):
    """A streamed answer of one choice, as the events of a writer."""

    def __init__(
        self,
        formatter: ResponseFormatter,
        loop: asyncio.AbstractEventLoop,
        echoes: Sequence[Echo],
        flusher: Flusher,
        park: Callable[[OwnedRequest, bool], None],
        writer: EventWriter,
    ) -> None:
        self.writer = writer
        super().__init__(formatter, loop, echoes, flusher, park)

    def _make_choices(self, count: int) -> "Sequence[TypedChoice]":
        return [TypedChoice(self, index) for index in range(count)]

    def first_events(self) -> list[bytes]:
        self.has_begun = True
        return [named_event(body) for body in self.writer.first(self.usage())]

    def push(self, bodies: Sequence[Json]) -> None:
        """Events for the next round of writes."""
        if bodies:
            self.outlet.push(*map(named_event, bodies))

    def close(self) -> None:
        if self.done.done():
            return
        if self.error is not None and self.opened.done():
            error = renamed(as_api_error(self.error), self.writer.names)
            self.push(self.writer.failed(error))
        for choice in self.choices:
            if isinstance(choice, TypedChoice):
                choice.is_muted = True
        Reply.close(self)


class TypedChoice(Choice):
    """The sink of its choice."""

    reply: TypedSseReply

    def __init__(self, reply: TypedSseReply, index: int) -> None:
        super().__init__(reply, index)
        self.wants_tokens = False
        self.is_muted = False
        """The stream has ended: what still comes goes nowhere."""
        self._called_tools = False

    def text(self, text: Output, /) -> None:
        if self.is_muted:
            return
        shown = self.shown(text)
        deltas = (ContentDelta(shown),) if isinstance(shown, str) else shown
        if any(isinstance(delta, ToolCallDelta) for delta in deltas):
            self._called_tools = True
        self.reply.open()
        self.reply.push(self.reply.writer.deltas(deltas))

    def tokens(self, text: Output, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        if text:
            self.text(text)

    def finished(
        self,
        reason: str,
        stop_reason: int | str | None,
        completion_tokens: int,
        reasoning_tokens: int = 0,
    ) -> None:
        self.reason = "tool_calls" if self._called_tools and reason == "stop" else reason
        self.usage.completion_tokens = completion_tokens
        self.usage.reasoning_tokens = reasoning_tokens
        self.reply.open()
        writer = self.reply.writer
        closing = writer.close(is_cut=self.reason == "length")
        ending = writer.last(self.reason, stop_reason, self.reply.usage())
        self.reply.push([*closing, *ending])
        self.reply.choice_finished()
