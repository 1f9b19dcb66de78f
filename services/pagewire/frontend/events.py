"""The answer that is sent as it comes: each piece as an event, as soon as it is there. Knows no
HTTP."""

import asyncio
from collections.abc import Sequence

from pagewire_protocol.structs import TokenLogprobs

from .logprobs import token_text
from .reply import Choice, Echo, Reply
from .responses import ChoiceData, Shape
from .sse import DONE, HOLE, Flusher, Outlet, encode, event, template


class SseReply(Reply):
    def __init__(
        self,
        shape: Shape,
        loop: asyncio.AbstractEventLoop,
        echoes: Sequence[Echo],
        flusher: Flusher,
    ) -> None:
        self.outlet = Outlet(flusher)
        super().__init__(shape, loop, echoes)

    def _make_choices(self, count: int) -> "Sequence[SseChoice]":
        return [SseChoice(self, index) for index in range(count)]

    def greet(self) -> list[bytes]:
        """The first events: who speaks, and what comes before the generated text."""
        plan, usage = self.plan, self.usage() if self.plan.continuous_usage else None
        if plan.chat:
            said = [
                event(self.shape.chunk(ChoiceData(choice.index), usage, role=True))
                for choice in self.choices
            ]
            continued = self.choices if plan.opening else ()
            return said + [
                event(self.shape.chunk(ChoiceData(choice.index, plan.opening), usage))
                for choice in continued
            ]
        if not plan.echo or plan.scores_echo:
            return []
        return [
            event(self.shape.chunk(ChoiceData(choice.index, choice.echo.text), usage))
            for choice in self.choices
        ]

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
        self._owes_score = reply.plan.scores_echo

    def text(self, text: str, /) -> None:
        pieces = self._pieces
        if not pieces:
            self._outlet.touch()
            self.reply.open()
        pieces += (self._head, encode(text), self._tail)

    def tokens(self, text: str, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        plan = self.reply.plan
        self.usage.completion_tokens += len(tokens)
        self.reply.open()
        self._pay_score()
        if text or (logprobs and plan.logprobs >= 0) or plan.return_token_ids:
            self._send(
                ChoiceData(
                    self.index,
                    text,
                    tokens,
                    logprobs,
                    offset=self._offset,
                    prompt_ids=self.data.prompt_ids,
                )
            )
            self.data.prompt_ids = None
            self._advance(
                [token_text(entry.texts[0], entry.ids[0], plan.ids_as_text) for entry in logprobs]
            )

    def finished(self, reason: str, stop_reason: int | str | None, completion_tokens: int) -> None:
        self.usage.completion_tokens = completion_tokens
        self.reply.open()
        self._pay_score()
        self._send(
            ChoiceData(
                self.index, reason=reason, stop_reason=stop_reason, prompt_ids=self.data.prompt_ids
            )
        )
        self.reply.choice_finished()

    def _pay_score(self) -> None:
        """The prompt with its log-probabilities, which are complete before the first token
        comes."""
        if self._owes_score and self.score:
            self._owes_score = False
            self._send(ChoiceData(self.index, self.echo.text, score=self.score))
            self._advance(self.score.tokens)

    def _advance(self, tokens: Sequence[str]) -> None:
        self._offset += sum(map(len, tokens))

    def _send(self, data: ChoiceData) -> None:
        usage = self.reply.usage() if self.reply.plan.continuous_usage else None
        self._outlet.push(event(self.reply.shape.chunk(data, usage)))
