"""The answer to one HTTP request, put together from what its streams deliver. Knows no HTTP;
events.py has the answer that is streamed."""

import asyncio
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from pagewire_protocol.columns import unpack
from pagewire_protocol.structs import PromptLogprobs, Started, TokenLogprobs

from ..requests.answers import Output, ReasoningDelta
from ..requests.errors import RequestError
from ..requests.request import OwnedRequest
from .errors import ApiError
from .logprobs import PromptScore
from .responses import ChoiceData, ResponseFormatter, Usage
from .sse import encode
from .turns import Turn


class Echo(Struct, frozen=True):
    """What an answer shows of a prompt: its text; where that is scored, the name of its first token
    and where each of its tokens begins in the text, in characters."""

    text: str = ""
    first: str = ""
    offsets: tuple[int, ...] = ()


class Reply:
    """Gathers its choices. `opened` is set when it is known whether an answer or an error follows,
    `done` when the answer is complete."""

    def __init__(
        self,
        formatter: ResponseFormatter,
        loop: asyncio.AbstractEventLoop,
        echoes: Sequence[Echo],
    ) -> None:
        """`echoes`: one for each prompt."""
        self.formatter = formatter
        self.rendering = formatter.rendering
        self.echoes = echoes
        self.opened: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.error: ApiError | RequestError | None = None
        self.ignored = ""
        """Keywords of the request's schemas that its grammar does not hold."""
        self.requests: Sequence[OwnedRequest] = ()
        """What runs for it; none of a beam search, whose requests change."""
        self.choices: Sequence[Choice] = self._make_choices(len(echoes) * self.rendering.per_prompt)
        self._unfinished = len(self.choices)

    def _make_choices(self, count: int) -> "Sequence[Choice]":
        return [Choice(self, index) for index in range(count)]

    async def body(self) -> bytes:
        """The whole answer as JSON; call when `done`. Of a long answer with log-probabilities a few
        milliseconds' work at a time."""
        best = self._best_choices()
        turn = Turn()
        for choice in best:
            shown: list[Any] = []
            for entry in choice.logprobs:
                shown.append(self.formatter.token(entry))
                if turn.is_over():
                    await turn.next()
            choice.logprobs = shown
            if choice.score:
                await choice.score.encode(turn)
        return encode(self.formatter.whole(best, self.usage()))

    def _best_choices(self) -> list[ChoiceData]:
        """The `n` best choices of each prompt, numbered anew. Only a prompt's first choice has its
        log-probabilities: the others show those."""
        best: list[ChoiceData] = []
        per_prompt, n = self.rendering.per_prompt, self.rendering.n
        for start in range(0, len(self.choices), per_prompt):
            choices = self.choices[start : start + per_prompt]
            score = choices[0].score
            if per_prompt > n:
                choices = sorted(choices, key=lambda choice: -choice.likelihood)[:n]
            for choice in choices:
                choice.data.index = len(best)
                choice.data.score = score
                best.append(choice.data)
        return best

    def usage(self) -> Usage:
        """Prompts count once, however many choices they have; generated tokens count whether their
        choice is shown or not."""
        total = Usage()
        reasoning_tokens = 0
        for index, choice in enumerate(self.choices):
            usage = choice.usage
            total.completion_tokens += usage.completion_tokens
            reasoning_tokens += usage.reasoning_tokens or 0
            if index % self.rendering.per_prompt == 0:
                total.prompt_tokens += usage.prompt_tokens
                total.cached_tokens += usage.cached_tokens
        if self.rendering.has_parts:
            total.reasoning_tokens = reasoning_tokens
        return total

    def used_tokens(self) -> tuple[int, int]:
        """Prompt tokens, and generated ones, so far: also of what ended early."""
        usage = self.usage()
        generated = sum(request.output_tokens for request in self.requests)
        return usage.prompt_tokens, max(usage.completion_tokens, generated)

    def open(self) -> None:
        """An answer follows. Does nothing when that is known already."""
        if not self.opened.done():
            self.opened.set_result(None)

    def choice_finished(self) -> None:
        """One more choice is complete."""
        self._unfinished -= 1
        if not self._unfinished:
            self.close()

    def fail(self, error: ApiError | RequestError) -> None:
        """End the answer with `error`, unless it has ended. The first error counts."""
        if self.error is None and not self.done.done():
            self.error = error
            self.close()

    def close(self) -> None:
        """The answer is complete, or has failed."""
        self.open()
        if not self.done.done():
            self.done.set_result(None)


class Choice:
    """The sink of one choice's stream: keeps all output until the answer is complete."""

    def __init__(self, reply: Reply, index: int) -> None:
        rendering = reply.rendering
        self.wants_tokens = (
            rendering.logprobs >= 0
            or rendering.return_token_ids
            or rendering.per_prompt > rendering.n
        )
        self.usage = Usage()
        self.reply = reply
        self.index = index
        self.data = ChoiceData(index)
        self.echo = reply.echoes[index // rendering.per_prompt]
        self.prefix = self.echo.text or rendering.prefix
        """What the answer begins with, before the generated text: an echoed prompt, or the message
        that the answer continues."""
        self.reason = ""
        """How it ended; empty until then."""
        self.score: PromptScore | None = None
        if rendering.scores_echo or rendering.prompt_logprobs >= 0:
            self.score = PromptScore(
                self.echo.first,
                rendering.logprobs if rendering.echo else -1,
                rendering.prompt_logprobs,
                rendering.ids_as_text,
                self.echo.offsets,
            )
        self._texts: list[Output] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._started = False

    def start(self) -> ChoiceData:
        """What the choice shows before any generated text."""
        return ChoiceData(self.index, self.prefix)

    @property
    def likelihood(self) -> float:
        """The sum of its tokens' log-probabilities."""
        return sum(entry.values[0] for entry in self._logprobs)

    def started(self, started: Started) -> None:
        if self._started:
            return
        self._started = True
        self.usage.prompt_tokens = started.prompt_tokens
        self.usage.cached_tokens = started.cached_tokens
        self.reply.ignored = started.ignored
        if self.reply.rendering.return_token_ids and started.prompt_ids is not None:
            self.data.prompt_ids = unpack("i", started.prompt_ids).tolist()
        self.reply.open()

    def prompt_logprobs(self, entry: PromptLogprobs) -> None:
        if self.score:
            self.score.add(entry)

    def text(self, text: Output, /) -> None:
        self._texts.append(text)

    def shown(self, text: Output) -> Output:
        """The output without what the client does not want to see."""
        if isinstance(text, str) or self.reply.rendering.include_reasoning:
            return text
        return tuple(delta for delta in text if not isinstance(delta, ReasoningDelta))

    def tokens(self, text: Output, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        self._texts.append(text)
        self._tokens += tokens
        self._logprobs += logprobs

    def finished(
        self,
        reason: str,
        stop_reason: int | str | None,
        completion_tokens: int,
        reasoning_tokens: int = 0,
    ) -> None:
        self.reason = reason
        data = self.data
        data.content = self.prefix
        data.add_all(map(self.shown, self._texts))
        data.offset = len(self.echo.text)
        data.tokens = self._tokens
        data.logprobs = self._logprobs
        data.set_end(reason, stop_reason, called_tools=bool(data.tool_calls))
        self.usage.completion_tokens = completion_tokens
        self.usage.reasoning_tokens = reasoning_tokens
        self.reply.choice_finished()

    def failed(self, error: RequestError) -> None:
        self.reply.fail(error)
