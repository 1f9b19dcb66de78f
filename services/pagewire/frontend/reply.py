"""The answer to one HTTP request, put together from what its streams deliver: whole, or as events. Knows no HTTP."""

import asyncio
from collections.abc import Sequence

from pagewire_protocol.columns import unpack
from pagewire_protocol.parts import Started, TokenLogprobs

from .errors import ApiError
from .responses import ChoiceData, Shape, Usage, token_text
from .sse import DONE, HOLE, Flusher, Outlet, encode, event, template


class Reply:
    """Gathers its choices. `opened` is set when the outcome is known to be an answer or an error, `done` when all is there."""

    def __init__(self, shape: Shape, loop: asyncio.AbstractEventLoop) -> None:
        self.shape, self.plan = shape, shape.plan
        self.opened: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.error: ApiError | None = None
        self.choices: Sequence[Choice] = [Choice(self, index) for index in range(len(self.plan.jobs))]
        self._unfinished = len(self.choices)

    def body(self) -> bytes:
        return encode(self.shape.whole([choice.data for choice in self.choices], self.usage()))

    def usage(self) -> Usage:
        """Prompts count once, however many choices they have."""
        firsts = self.choices[:: self.plan.n]
        return Usage(
            sum(choice.usage.prompt_tokens for choice in firsts),
            sum(choice.usage.completion_tokens for choice in self.choices),
            sum(choice.usage.cached_tokens for choice in firsts),
        )

    def open(self) -> None:
        if not self.opened.done():
            self.opened.set_result(None)

    def choice_finished(self) -> None:
        self._unfinished -= 1
        if not self._unfinished:
            self.close()

    def fail(self, error: ApiError) -> None:
        if self.error is None and not self.done.done():
            self.error = error
            self.close()

    def close(self) -> None:
        self.open()
        if not self.done.done():
            self.done.set_result(None)


class Choice:
    """A sink that keeps everything."""

    def __init__(self, reply: Reply, index: int) -> None:
        plan = reply.plan
        self.wants_tokens = plan.logprobs or plan.return_token_ids
        self.usage = Usage()
        self.reply = reply
        self.data = ChoiceData(index)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._started = False

    def started(self, started: Started) -> None:
        if self._started:
            return
        self._started = True
        self.usage.prompt_tokens, self.usage.cached_tokens = started.prompt_tokens, started.cached_tokens
        if self.reply.plan.return_token_ids and started.prompt_ids is not None:
            self.data.prompt_ids = unpack("i", started.prompt_ids).tolist()
        self.reply.open()

    def text(self, text: str, /) -> None:
        self._text.append(text)

    def tokens(self, text: str, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        self._text.append(text)
        self._tokens += tokens
        self._logprobs += logprobs

    def finished(self, reason: str, stop_reason: int | str | None, completion_tokens: int) -> None:
        data = self.data
        data.text, data.tokens, data.logprobs = "".join(self._text), self._tokens, self._logprobs
        data.reason, data.stop_reason = reason, stop_reason
        self.usage.completion_tokens = completion_tokens
        self.reply.choice_finished()

    def failed(self, error: ApiError) -> None:
        self.reply.fail(error)


class SseReply(Reply):
    """Sends each piece as an event as soon as it is there."""

    def __init__(self, shape: Shape, loop: asyncio.AbstractEventLoop, flusher: Flusher) -> None:
        super().__init__(shape, loop)
        self.outlet = Outlet(flusher)
        self.choices = [SseChoice(self, index) for index in range(len(self.plan.jobs))]

    def greet(self) -> list[bytes]:
        """The first events of a chat: who speaks."""
        if not self.plan.chat:
            return []
        usage = self.usage() if self.plan.continuous_usage else None
        return [event(self.shape.chunk(ChoiceData(i), usage, role=True)) for i in range(len(self.choices))]

    def close(self) -> None:
        if self.done.done():
            return
        if self.error is None:
            if self.plan.include_usage:
                self.outlet.push(event(self.shape.chunk(None, self.usage())))
            self.outlet.push(DONE)
        elif self.opened.done():
            self.outlet.push(b"data: " + self.error.body() + b"\n\n", DONE)
        super().close()


class SseChoice(Choice):
    """A sink whose `text` is the path of every token: one template, no dict, no wake-up."""

    reply: SseReply

    def __init__(self, reply: SseReply, index: int) -> None:
        super().__init__(reply, index)
        self.wants_tokens = self.wants_tokens or reply.plan.continuous_usage
        self._head, self._tail = template(reply.shape.chunk(ChoiceData(index, HOLE)))
        self._outlet, self._pieces = reply.outlet, reply.outlet.pieces
        self._offset = 0

    def text(self, text: str, /) -> None:
        pieces = self._pieces
        if not pieces:
            self._outlet.touch()
            self.reply.open()
        pieces += (self._head, encode(text), self._tail)

    def tokens(self, text: str, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        self.usage.completion_tokens += len(tokens)
        self.reply.open()
        plan = self.reply.plan
        if text or logprobs or plan.return_token_ids:
            self._send(ChoiceData(self.data.index, text, tokens, logprobs, offset=self._offset, prompt_ids=self.data.prompt_ids))
            self.data.prompt_ids = None
            self._offset += sum(len(token_text(entry)) for entry in logprobs)

    def finished(self, reason: str, stop_reason: int | str | None, completion_tokens: int) -> None:
        self.usage.completion_tokens = completion_tokens
        self.reply.open()
        self._send(ChoiceData(self.data.index, reason=reason, stop_reason=stop_reason, prompt_ids=self.data.prompt_ids))
        self.reply.choice_finished()

    def _send(self, data: ChoiceData) -> None:
        usage = self.reply.usage() if self.reply.plan.continuous_usage else None
        self._outlet.push(event(self.reply.shape.chunk(data, usage)))
