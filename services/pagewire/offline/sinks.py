"""Gathers accepted output into RequestOutputs and shows how far a batch is. The sinks of `LLM`'s
streams."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from pagewire_protocol.columns import unpack
from pagewire_protocol.structs import PromptLogprobs, Started, TokenLogprobs

from ..requests.beam_driver import BeamResult
from ..requests.errors import ApiError
from ..requests.request import Sink, Stream
from .outputs import CompletionOutput, Logprob, RequestOutput
from .prompts import Entry
from .sampling_params import SamplingParams


class Group:
    """One prompt and its continuations: more are generated than returned where the parameters say
    best_of."""

    def __init__(self, request_id: str, place: int, entry: Entry, params: SamplingParams) -> None:
        self.place, self.params, self.entry = place, params, entry
        completions = [CompletionOutput(index) for index in range(params.width)]
        ids = unpack("i", entry.prompt.ids).tolist() if entry.prompt.ids is not None else []
        self.output = RequestOutput(request_id, entry.text, ids, completions)
        self.output.metrics.arrival_time = time.monotonic()
        self.unfinished = len(completions)

    def started(self, started: Started) -> None:
        output = self.output
        if started.prompt_ids is not None:
            output.prompt_token_ids = unpack("i", started.prompt_ids).tolist()
        if output.num_cached_tokens is None:
            output.num_cached_tokens = started.cached_tokens
            output.metrics.first_scheduled_time = time.monotonic()

    def prompt_logprobs(self, entry: PromptLogprobs) -> None:
        rows = self.output.prompt_logprobs = self.output.prompt_logprobs or [None]
        ranks, counts = unpack("i", entry.ranks).tolist(), unpack("i", entry.counts).tolist()
        ids, values = unpack("i", entry.ids).tolist(), unpack("f", entry.values).tolist()
        rows += [None] * (entry.first + len(counts) - len(rows))
        at = 0
        for place, (count, rank) in enumerate(zip(counts, ranks, strict=True), entry.first):
            end = at + count
            rows[place] = candidates(rank, ids[at:end], values[at:end], entry.texts[at:end])
            at = end

    def ran(self, stream: Stream) -> None:
        """The moments of one of its streams, which has ended."""
        metrics = self.output.metrics
        metrics.last_token_time = max(metrics.last_token_time, stream.last)
        if stream.first:
            metrics.first_token_time = min(metrics.first_token_time or stream.first, stream.first)

    def finish(self) -> None:
        """All continuations are there: the best are kept, numbered anew."""
        output, params = self.output, self.params
        if params.width > params.n and not params.use_beam_search:
            output.outputs = sorted(output.outputs, key=lambda c: -(c.cumulative_logprob or 0.0))[
                : params.n
            ]
            for index, completion in enumerate(output.outputs):
                completion.index = index
                completion.logprobs = completion.logprobs if params.logprobs is not None else None
        if params.prompt_logprobs is not None and output.prompt_logprobs is None:
            output.prompt_logprobs = [None]
        output.finished = True
        output.metrics.finished_time = time.monotonic()

    def take_beams(self, results: Iterable[BeamResult]) -> None:
        wanted = self.params.logprobs is not None
        self.output.outputs = [
            CompletionOutput(
                index,
                result.text,
                result.tokens,
                result.cumulative_logprob,
                [_row_of(entry) for entry in result.logprobs] if wanted else None,
                result.reason,
                result.stop_reason,
            )
            for index, result in enumerate(results)
        ]


class CompletionSink:
    """The sink of one continuation. `timed` notes the moment of every token, at some cost."""

    def __init__(
        self, group: Group, index: int, timed: bool, ended: "Callable[[CompletionSink], None]"
    ) -> None:
        self.group = group
        self.completion = group.output.outputs[index]
        scored = group.params.logprobs is not None or group.params.width > group.params.n
        self.wants_tokens = timed or scored
        self.error: ApiError | None = None
        self.refusals = 0
        self.moments: list[float] = []
        self._timed, self._ended = timed, ended
        self._parts: list[str] = []
        self.text = self._parts.append
        self.started, self.prompt_logprobs = group.started, group.prompt_logprobs
        if scored:
            self.completion.logprobs, self.completion.cumulative_logprob = [], 0.0

    def tokens(self, text: str, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        if text:
            self._parts.append(text)
        if self._timed:
            self.moments += [time.monotonic()] * len(tokens)
        for entry in sorted(logprobs, key=lambda entry: entry.index):
            assert (
                self.completion.logprobs is not None
                and self.completion.cumulative_logprob is not None
            )
            self.completion.logprobs.append(_row_of(entry))
            self.completion.cumulative_logprob += entry.values[0]

    def finished(self, reason: str, stop_reason: int | str | None, completion_tokens: int) -> None:
        self.completion.text = "".join(self._parts)
        self.completion.finish_reason, self.completion.stop_reason = reason, stop_reason
        self._ended(self)

    def failed(self, error: ApiError) -> None:
        self.error = error
        self._ended(self)

    def take(self, stream: Stream) -> bool:
        """The output of its stream, which has ended. True when it was the last of its group."""
        self.completion.token_ids = stream.out.tolist()
        self.group.ran(stream)
        self.group.unfinished -= 1
        return not self.group.unfinished


class BeamStepSink:
    """Between a stream and the sink of one step of a beam search, so that a step for which the
    stack has no room can be sent again."""

    wants_tokens = True

    def __init__(self, group: Group, step: Sink, ended: "Callable[[BeamStepSink], None]") -> None:
        self.group, self.step, self._ended = group, step, ended
        self.error: ApiError | None = None
        self.refusals = 0
        self.text, self.tokens = step.text, step.tokens

    def started(self, started: Started) -> None:
        if started.prompt_ids is not None:
            self.group.started(started)
        self.step.started(started)

    def prompt_logprobs(self, entry: PromptLogprobs) -> None:
        self.group.prompt_logprobs(entry)

    def finished(self, reason: str, stop_reason: int | str | None, completion_tokens: int) -> None:
        self._ended(self)
        self.step.finished(reason, stop_reason, completion_tokens)

    def failed(self, error: ApiError) -> None:
        self.error = error
        self._ended(self)

    def take(self, stream: Stream) -> bool:
        self.group.ran(stream)
        return False


def _row_of(entry: TokenLogprobs) -> dict[int, Logprob]:
    return candidates(entry.rank, entry.ids, entry.values, entry.texts)


def candidates(
    rank: int, ids: Iterable[int], values: Iterable[float], texts: Iterable[bytes]
) -> dict[int, Logprob]:
    """A position's own token, of this rank, then the likeliest ones from rank 1 on; the own token
    is not named twice."""
    found: dict[int, Logprob] = {}
    for place, (token, value, text) in enumerate(zip(ids, values, texts, strict=True)):
        if token not in found:
            found[token] = Logprob(value, place or rank, text.decode("utf-8", "replace"))
    return found


class Bar:
    """A tqdm bar with vLLM's wording; without tqdm, or with `use` False, nothing. `use` may be a
    function with tqdm's signature."""

    def __init__(
        self, use: Any, total: int, description: str = "Processed prompts", initial: int = 0
    ) -> None:
        self._bar: Any = None
        self._began, self._read, self._written = time.monotonic(), 0, 0
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
        written = sum(len(completion.token_ids) for completion in output.outputs)
        self.add(len(output.prompt_token_ids) * len(output.outputs), written)

    def add(self, read: int, written: int) -> None:
        """One more is done, of so many tokens."""
        self._read += read
        self._written += written
        if self._bar is not None:
            elapsed = max(1e-9, time.monotonic() - self._began)
            self._bar.postfix = _speed(self._read / elapsed, self._written / elapsed)
            self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _speed(read: float, written: float) -> str:
    return f"est. speed input: {read:.2f} toks/s, output: {written:.2f} toks/s"
