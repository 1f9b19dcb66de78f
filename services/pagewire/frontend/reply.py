"""The answer to one HTTP request, put together from what its streams deliver. Knows no HTTP;
events.py has the answer that is sent as it comes."""

import asyncio
from collections.abc import Sequence

from msgspec import Struct
from pagewire_protocol.columns import unpack
from pagewire_protocol.structs import PromptLogprobs, Started, TokenLogprobs

from ..requests.errors import ApiError
from .logprobs import PromptScore
from .responses import ChoiceData, Shape, Usage
from .sse import encode


class Echo(Struct, frozen=True):
    """What is shown of a prompt: its text, and what its first token is called."""

    text: str = ""
    first: str = ""


class Reply:
    """Gathers its choices. `opened` is set when the outcome is known to be an answer or an error,
    `done` when all is there.

    echoes: one for each prompt.
    """

    def __init__(
        self, shape: Shape, loop: asyncio.AbstractEventLoop, echoes: Sequence[Echo]
    ) -> None:
        self.shape, self.plan, self.echoes = shape, shape.plan, echoes
        self.opened: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.error: ApiError | None = None
        self.choices: Sequence[Choice] = self._make_choices(len(echoes) * self.plan.per_prompt)
        self._unfinished = len(self.choices)

    def _make_choices(self, count: int) -> "Sequence[Choice]":
        return [Choice(self, index) for index in range(count)]

    def body(self) -> bytes:
        return encode(self.shape.whole(self._shown(), self.usage()))

    def _shown(self) -> list[ChoiceData]:
        """The best of each prompt, in their places. What is known of a prompt is known by its first
        choice."""
        shown: list[ChoiceData] = []
        each, n = self.plan.per_prompt, self.plan.n
        for start in range(0, len(self.choices), each):
            group = self.choices[start : start + each]
            best = group if each == n else sorted(group, key=lambda choice: -choice.likelihood)[:n]
            for choice in best:
                choice.data.index, choice.data.score = len(shown), group[0].score
                shown.append(choice.data)
        return shown

    def usage(self) -> Usage:
        """Prompts count once, however many choices they have; tokens count whether their choice is
        shown or not."""
        firsts = self.choices[:: self.plan.per_prompt]
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
        self.wants_tokens = plan.logprobs >= 0 or plan.return_token_ids or plan.per_prompt > plan.n
        self.usage = Usage()
        self.reply, self.index = reply, index
        self.data = ChoiceData(index)
        self.echo = reply.echoes[index // plan.per_prompt]
        self.score: PromptScore | None = None
        if plan.scores_echo or plan.prompt_logprobs >= 0:
            self.score = PromptScore(
                self.echo.first,
                plan.logprobs if plan.echo else -1,
                plan.prompt_logprobs,
                plan.ids_as_text,
            )
        self._text: list[str] = [self.echo.text or plan.opening]
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._started = False

    @property
    def likelihood(self) -> float:
        """The sum of its tokens' log-probabilities."""
        return sum(entry.values[0] for entry in self._logprobs)

    def started(self, started: Started) -> None:
        if self._started:
            return
        self._started = True
        self.usage.prompt_tokens, self.usage.cached_tokens = (
            started.prompt_tokens,
            started.cached_tokens,
        )
        if self.reply.plan.return_token_ids and started.prompt_ids is not None:
            self.data.prompt_ids = unpack("i", started.prompt_ids).tolist()
        self.reply.open()

    def prompt_logprobs(self, entry: PromptLogprobs) -> None:
        if self.score:
            self.score.add(entry)

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
