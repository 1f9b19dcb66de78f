"""Gathers accepted output into RequestOutputs and shows how far a batch is. The sinks of `LLM`'s
requests."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from pagewire_protocol.columns import unpack
from pagewire_protocol.structs import PromptLogprobs, Started, TokenLogprobs

from ..requests.answers import Output
from ..requests.beam_driver import BeamResult
from ..requests.errors import RequestError
from ..requests.job_template import JobTemplate
from ..requests.request import Job, OwnedRequest, Sink
from ..requests.retries import RetryBudget
from .outputs import CompletionOutput, Logprob, RequestOutput
from .prompts import Entry


class RequestGroup:
    """One prompt and its choices: more are generated than returned where the parameters say
    best_of. `index` is the prompt's among those of the call."""

    def __init__(self, request_id: str, index: int, entry: Entry, template: JobTemplate) -> None:
        self.index = index
        self.entry = entry
        self.template = template
        self.choices = template.choices
        self.wants_logprobs = template.sampling.logprobs >= 0
        completions = [CompletionOutput(choice) for choice in range(self.choices.per_prompt)]
        ids = unpack("i", entry.prompt.ids).tolist() if entry.prompt.ids is not None else []
        self.output = RequestOutput(request_id, entry.text, ids, completions)
        self.output.metrics.arrival_time = time.time()
        self.unfinished = len(completions)
        """Choices that still run."""

    def started(self, started: Started) -> None:
        """One of its requests got a slot; the first tells the prompt's ids."""
        output = self.output
        if started.prompt_ids is not None:
            output.prompt_token_ids = unpack("i", started.prompt_ids).tolist()
        if output.num_cached_tokens is None:
            output.num_cached_tokens = started.cached_tokens
            output.metrics.first_scheduled_time = time.time()

    def prompt_logprobs(self, entry: PromptLogprobs) -> None:
        """A run of prompt tokens. The same positions may come again."""
        rows = self.output.prompt_logprobs = self.output.prompt_logprobs or [None]
        ranks = unpack("i", entry.ranks).tolist()
        counts = unpack("i", entry.counts).tolist()
        ids = unpack("i", entry.ids).tolist()
        values = unpack("f", entry.values).tolist()
        rows += [None] * (entry.first + len(counts) - len(rows))
        begin = 0
        for position, (count, rank) in enumerate(zip(counts, ranks, strict=True), entry.first):
            end = begin + count
            rows[position] = candidates(
                rank, ids[begin:end], values[begin:end], entry.texts[begin:end]
            )
            begin = end

    def note_times(self, request: OwnedRequest) -> None:
        """The moments of one of its requests, which has ended."""
        metrics = self.output.metrics
        epoch = time.time() - time.monotonic()
        metrics.last_token_time = max(metrics.last_token_time, epoch + request.last_token_time)
        if request.first_token_time:
            first = epoch + request.first_token_time
            metrics.first_token_time = min(metrics.first_token_time or first, first)

    def finish(self) -> None:
        """All choices are complete: the best are kept, numbered anew."""
        output = self.output
        if self.choices.ranked:
            by_likelihood = sorted(output.outputs, key=lambda c: -(c.cumulative_logprob or 0.0))
            output.outputs = by_likelihood[: self.choices.n]
            for index, completion in enumerate(output.outputs):
                completion.index = index
                completion.logprobs = completion.logprobs if self.wants_logprobs else None
        if self.template.sampling.prompt_logprobs >= 0 and output.prompt_logprobs is None:
            output.prompt_logprobs = [None]
        output.finished = True
        output.metrics.finished_time = time.time()

    def set_beams(self, results: Iterable[BeamResult]) -> None:
        """The hypotheses of a beam search are its choices."""
        self.output.outputs = [
            CompletionOutput(
                index,
                result.text,
                result.tokens,
                result.cumulative_logprob,
                [_row_of(entry) for entry in result.logprobs] if self.wants_logprobs else None,
                result.reason,
                result.stop_reason,
            )
            for index, result in enumerate(results)
        ]


class CompletionSink:
    """The sink of one choice. `timed` notes the moment of every token, at some cost."""

    def __init__(self, group: RequestGroup, index: int, timed: bool) -> None:
        self.completion = group.output.outputs[index]
        self.wants_tokens = timed or group.wants_logprobs or group.choices.ranked
        self.token_times: list[float] = []
        self._timed = timed
        self._texts: list[Any] = []
        # Called for every token of a plain request: the list's own method, without a frame between.
        self.text = self._texts.append
        self.prompt_logprobs = group.prompt_logprobs
        if group.wants_logprobs or group.choices.ranked:
            self.completion.logprobs = []
            self.completion.cumulative_logprob = 0.0

    def started(self, started: Started) -> None:
        """The submission tells the group."""

    def tokens(self, text: Output, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        if text:
            self._texts.append(text)
        if self._timed:
            self.token_times += [time.monotonic()] * len(tokens)
        completion = self.completion
        for entry in sorted(logprobs, key=lambda entry: entry.index):
            assert completion.logprobs is not None and completion.cumulative_logprob is not None
            completion.logprobs.append(_row_of(entry))
            completion.cumulative_logprob += entry.values[0]

    def finished(
        self,
        reason: str,
        stop_reason: int | str | None,
        completion_tokens: int,
        reasoning_tokens: int = 0,
    ) -> None:
        self.completion.text = "".join(self._texts)
        self.completion.finish_reason = reason
        self.completion.stop_reason = stop_reason

    def failed(self, error: RequestError) -> None:
        """The batch raises it."""


class Submission:
    """One job on its way through the stack, sent again as long as there is no room for it: between
    the request and the sink that its output is for, which hears of no failure that passes."""

    def __init__(
        self,
        group: RequestGroup,
        job: Job,
        sink: Sink,
        on_success: Callable[[OwnedRequest], None],
        on_end: "Callable[[Submission], None]",
    ) -> None:
        """`on_end` is called at each end; `on_success` is for who then sees that it was none of
        failure."""
        self.group = group
        self.job = job
        self.on_success = on_success
        self.retries = RetryBudget(time.monotonic)
        self.request: OwnedRequest | None = None
        """Of the latest attempt, from its submission on."""
        self.error: RequestError | None = None
        """Why the latest attempt ended, if it failed."""
        self._sink = sink
        self._on_end = on_end
        self.wants_tokens = sink.wants_tokens
        # Once a token: the sink's own methods, without a frame between.
        self.text = sink.text
        self.tokens = sink.tokens
        self.prompt_logprobs = sink.prompt_logprobs

    def started(self, started: Started) -> None:
        if started.prompt_ids is not None:
            self.group.started(started)
        self._sink.started(started)

    def finished(
        self,
        reason: str,
        stop_reason: int | str | None,
        completion_tokens: int,
        reasoning_tokens: int = 0,
    ) -> None:
        self._on_end(self)
        self._sink.finished(reason, stop_reason, completion_tokens, reasoning_tokens)

    def failed(self, error: RequestError) -> None:
        self.error = error
        self._on_end(self)


def _row_of(entry: TokenLogprobs) -> dict[int, Logprob]:
    return candidates(entry.rank, entry.ids, entry.values, entry.texts)


def candidates(
    rank: int, ids: Iterable[int], values: Iterable[float], texts: Iterable[bytes]
) -> dict[int, Logprob]:
    """A position's own token, of this rank, then the most likely ones from rank 1 on; the own token
    is not named twice."""
    by_token: dict[int, Logprob] = {}
    for position, (token, value, text) in enumerate(zip(ids, values, texts, strict=True)):
        if token not in by_token:
            by_token[token] = Logprob(value, position or rank, text.decode("utf-8", "replace"))
    return by_token


class Bar:
    """A tqdm bar with vLLM's wording; without tqdm, or with `use` False, nothing. `use` may be a
    function with tqdm's signature."""

    def __init__(
        self, use: Any, total: int, description: str = "Processed prompts", initial: int = 0
    ) -> None:
        self._bar: Any = None
        self._began = time.monotonic()
        self._prompt_tokens = 0
        self._output_tokens = 0
        if not use:
            return
        if not callable(use):
            try:
                from tqdm.auto import tqdm as use
            except ImportError:
                return
        self._bar = use(
            total=total,
            desc=description,
            initial=initial,
            dynamic_ncols=True,
            postfix=_speed(0.0, 0.0),
        )

    def done(self, output: RequestOutput) -> None:
        """One more prompt is done."""
        output_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        self.add(len(output.prompt_token_ids) * len(output.outputs), output_tokens)

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        """One more is done, of so many tokens."""
        self._prompt_tokens += prompt_tokens
        self._output_tokens += output_tokens
        if self._bar is not None:
            elapsed = max(1e-9, time.monotonic() - self._began)
            self._bar.postfix = _speed(self._prompt_tokens / elapsed, self._output_tokens / elapsed)
            self._bar.update(1)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _speed(prompt_rate: float, output_rate: float) -> str:
    return f"est. speed input: {prompt_rate:.2f} toks/s, output: {output_rate:.2f} toks/s"
