"""Gathers accepted output into RequestOutputs and shows how far a batch is. The sinks of `LLM`'s streams."""

import time
from collections.abc import Callable
from typing import Any

from pagewire_protocol.columns import unpack
from pagewire_protocol.parts import Prompt, Started, TokenLogprobs

from .frontend.errors import ApiError
from .outputs import CompletionOutput, Logprob, RequestOutput
from .params import SamplingParams


class Group:
    """One prompt and its `n` continuations."""

    def __init__(self, request_id: str, place: int, prompt: Prompt, params: SamplingParams) -> None:
        self.place, self.params, self.prompt = place, params, prompt
        completions = [CompletionOutput(index) for index in range(params.n)]
        ids = unpack("i", prompt.ids).tolist() if prompt.ids is not None else []
        self.output = RequestOutput(request_id, prompt.text, ids, completions)
        self.output.metrics.arrival_time = time.monotonic()
        self.unfinished = params.n


class Collector:
    """The sink of one continuation. `timed` notes the moment of every token, at some cost."""

    def __init__(self, group: Group, index: int, timed: bool, ended: "Callable[[Collector], None]") -> None:
        self.group = group
        self.completion = group.output.outputs[index]
        self.wants_tokens = timed or group.params.logprobs is not None
        self.error: ApiError | None = None
        self.moments: list[float] = []
        self._timed, self._ended = timed, ended
        self._parts: list[str] = []
        self.text = self._parts.append
        if group.params.logprobs is not None:
            self.completion.logprobs, self.completion.cumulative_logprob = [], 0.0

    def started(self, started: Started) -> None:
        output = self.group.output
        if started.prompt_ids is not None:
            output.prompt_token_ids = unpack("i", started.prompt_ids).tolist()
        if output.num_cached_tokens is None:
            output.num_cached_tokens = started.cached_tokens

    def tokens(self, text: str, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        if text:
            self._parts.append(text)
        if self._timed:
            self.moments += [time.monotonic()] * len(tokens)
        for entry in sorted(logprobs, key=lambda entry: entry.index):
            self._add_logprobs(entry)

    def _add_logprobs(self, entry: TokenLogprobs) -> None:
        assert self.completion.logprobs is not None and self.completion.cumulative_logprob is not None
        rows = list(zip(entry.ids, entry.values, (text.decode(errors="replace") for text in entry.texts), strict=True))
        chosen = {token: Logprob(value, rank, text) for rank, (token, value, text) in enumerate(rows[1:], 1)}
        token, value, text = rows[0]
        self.completion.logprobs.append({token: Logprob(value, entry.rank, text)} | {t: c for t, c in chosen.items() if t != token})
        self.completion.cumulative_logprob += value

    def finished(self, reason: str, stop_reason: int | str | None, completion_tokens: int) -> None:
        self.completion.text = "".join(self._parts)
        self.completion.finish_reason, self.completion.stop_reason = reason, stop_reason
        self._ended(self)

    def failed(self, error: ApiError) -> None:
        self.error = error
        self._ended(self)


class Bar:
    """A tqdm bar with vLLM's wording; without tqdm, or with `use` False, nothing. `use` may be a function with tqdm's signature."""

    def __init__(self, use: Any, total: int, description: str = "Processed prompts") -> None:
        self._bar: Any = None
        self._began, self._read, self._written = time.monotonic(), 0, 0
        if not use:
            return
        if not callable(use):
            try:
                from tqdm.auto import tqdm as use
            except ImportError:
                return
        self._bar = use(total=total, desc=description, dynamic_ncols=True, postfix=_speed(0.0, 0.0))

    def done(self, output: RequestOutput) -> None:
        self._read += len(output.prompt_token_ids) * len(output.outputs)
        self._written += sum(len(completion.token_ids) for completion in output.outputs)
        if self._bar is not None:
            elapsed = max(1e-9, time.monotonic() - self._began)
            self._bar.postfix = _speed(self._read / elapsed, self._written / elapsed)
            self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _speed(read: float, written: float) -> str:
    return f"est. speed input: {read:.2f} toks/s, output: {written:.2f} toks/s"
