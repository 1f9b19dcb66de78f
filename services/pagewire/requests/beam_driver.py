"""One prompt's beam search on a running stack: each live beam is a job of one token with
log-probabilities, round after round.

The prompt and the beams so far are the prompt of the next round, and the prefix cache holds all of
it but the newest block. This module knows jobs and sinks, no socket and no clock.
"""

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from pagewire_protocol.columns import pack, unpack
from pagewire_protocol.messages import Detokenize, Tokenized
from pagewire_protocol.sampling import TextOptions
from pagewire_protocol.structs import Prompt, PromptLogprobs, Started, TokenLogprobs

from .beam_search import Beam, BeamSearch, EarlyStopping, Hypothesis
from .errors import ApiError
from .request import Job, Sink

Question = Callable[[Detokenize, Callable[[Tokenized | ApiError], None]], object]


class BeamOptions(Struct, frozen=True):
    """What a beam search has beside a job's own sampling: `count` is how many hypotheses to
    return."""

    width: int
    count: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False


class BeamModel(Struct, frozen=True):
    """What the search must know of the model."""

    max_model_len: int
    eos_token_ids: frozenset[int]
    has_text: bool = True


class BeamResult(Struct):
    """One hypothesis: its `score` is length-penalized, `cumulative_logprob` is not.
    Log-probabilities only where the job asks for them."""

    tokens: list[int]
    text: str
    score: float
    cumulative_logprob: float
    reason: str
    stop_reason: int | None
    logprobs: list[TokenLogprobs]


class BeamRun:
    """`submit` takes a job and `ask` a question to a tokenizer, at once or later; neither raises.
    `ended` is called once, when `results` or `error` is there. The caller cancels the streams of a
    run that it gives up."""

    def __init__(
        self,
        job: Job,
        options: BeamOptions,
        model: BeamModel,
        submit: Callable[[Job, Sink], object],
        ask: Question,
        ended: "Callable[[BeamRun], None]",
    ) -> None:
        self.job, self.options, self.model = job, options, model
        self.results: list[BeamResult] = []
        self.error: ApiError | None = None
        self.prompt_ids: list[int] = []
        self.prompt_text = ""
        """Known at the end, where there is a tokenizer."""
        self.cached_tokens = 0
        self.prompt_logprobs: list[PromptLogprobs] = []
        self._submit, self._ask, self._ended = submit, ask, ended
        self._search: BeamSearch | None = None
        self._rows: list[TokenLogprobs | None] = []
        self._missing = 0

    def start(self) -> None:
        """The first round: the prompt as it was given."""
        width, ends = self.options.width, self._ends()
        self._search = BeamSearch(
            width, self.job.sampling.max_tokens, ends, min_tokens=self.job.sampling.min_tokens
        )
        self._round([self.job.prompt])

    def _ends(self) -> frozenset[int]:
        sampling = self.job.sampling
        return frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else self.model.eos_token_ids
        )

    def _begin(self, started: Started) -> None:
        """The prompt's ids are known, and with them how long the continuation may be."""
        self.prompt_ids = unpack("i", started.prompt_ids or b"").tolist()
        self.cached_tokens = started.cached_tokens
        sampling, room = self.job.sampling, self.model.max_model_len - len(self.prompt_ids)
        wanted = room if self.job.max_tokens_is_rest else sampling.max_tokens
        if wanted > room:
            return self.fail(
                ApiError(
                    400,
                    _too_long(self.model.max_model_len, len(self.prompt_ids), wanted),
                    param="max_tokens",
                )
            )
        options = self.options
        self._search = BeamSearch(
            options.width,
            wanted,
            self._ends(),
            options.length_penalty,
            options.early_stopping,
            sampling.min_tokens,
        )

    def _round(self, prompts: Sequence[Prompt]) -> None:
        assert self._search is not None
        first = not self.prompt_ids
        self._rows = [None for _ in prompts]
        self._missing = len(prompts)
        sampling = replace(
            self.job.sampling,
            max_tokens=1,
            min_tokens=0,
            temperature=0.0,
            logprobs=self._search.candidates,
            ignore_eos=True,
            stop_token_ids=(),
            prompt_logprobs=self.job.sampling.prompt_logprobs if first else -1,
        )
        text = TextOptions(
            detokenize=False,
            return_prompt_ids=first,
            truncate_prompt=self._truncation() if first else 0,
        )
        for index, prompt in enumerate(prompts):
            job = replace(
                self.job, prompt=prompt, sampling=sampling, text=text, max_tokens_is_rest=False
            )
            self._submit(job, _Step(self, index))

    def _truncation(self) -> int:
        """-1 leaves room for all tokens of the search, not for the one of the job."""
        wanted = self.job.text.truncate_prompt
        room = self.model.max_model_len - (
            1 if self.job.max_tokens_is_rest else self.job.sampling.max_tokens
        )
        return max(1, room) if wanted == -1 else wanted

    def fail(self, error: ApiError) -> None:
        if self.error is None and not self.results:
            self.error = error
            self._ended(self)

    def _arrived(self, index: int, entry: TokenLogprobs) -> None:
        if self.error is not None:
            return
        self._missing -= self._rows[index] is None
        self._rows[index] = entry
        if not self._missing:
            self._advance()

    def _advance(self) -> None:
        assert self._search is not None
        rows = [entry for entry in self._rows if entry is not None]
        self._search.advance(
            [list(zip(entry.ids[1:], entry.values[1:], strict=True)) for entry in rows], kept=rows
        )
        if self._search.live:
            self._round(
                [
                    Prompt(ids=pack("i", self.prompt_ids + beam.tokens()))
                    for beam in self._search.live
                ]
            )
        else:
            _Texts(self, self._search.best(self.options.count), self._ask, self._finish).start()

    def _finish(self, found: Sequence[tuple[Hypothesis, str]]) -> None:
        if self.error is None:
            self.results = [self._result(hypothesis, text) for hypothesis, text in found]
            self._ended(self)

    def _result(self, hypothesis: Hypothesis, text: str) -> BeamResult:
        end, wanted = hypothesis.end, self.job.sampling.logprobs
        named = end if end is not None and end in self.job.sampling.stop_token_ids else None
        path = hypothesis.beam.path()
        return BeamResult(
            tokens=[beam.token for beam in path],
            text=text,
            score=hypothesis.score,
            cumulative_logprob=hypothesis.beam.score,
            reason="length" if end is None else "stop",
            stop_reason=named,
            logprobs=[_entry(beam, i, wanted) for i, beam in enumerate(path)]
            if wanted >= 0
            else [],
        )


class _Step:
    """The sink of one beam's job."""

    wants_tokens = True

    def __init__(self, run: BeamRun, index: int) -> None:
        self._run, self._index = run, index
        self._entry: TokenLogprobs | None = None

    def started(self, started: Started) -> None:
        if started.prompt_ids is not None and not self._run.prompt_ids:
            self._run._begin(started)

    def prompt_logprobs(self, entry: PromptLogprobs) -> None:
        self._run.prompt_logprobs.append(entry)

    def text(self, text: str, /) -> None:
        """Never called: `wants_tokens`."""

    def tokens(self, text: str, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        if logprobs:
            self._entry = logprobs[0]

    def finished(self, reason: str, stop_reason: int | str | None, completion_tokens: int) -> None:
        if self._entry is None:
            self._run.fail(ApiError(500, "The server could not finish this request; try it again."))
        else:
            self._run._arrived(self._index, self._entry)

    def failed(self, error: ApiError) -> None:
        self._run.fail(error)


class _Texts:
    """The texts of hypotheses: what the prompt's tokens and theirs stand for together, less what
    the prompt's stand for alone, since a tokenizer may write a token otherwise where a text
    begins."""

    def __init__(
        self, run: BeamRun, found: list[Hypothesis], ask: Question, done: Callable[[Any], None]
    ) -> None:
        self._run, self._found, self._ask, self._done = run, found, ask, done
        self._answers: dict[int, str] = {}

    def start(self) -> None:
        if not self._run.model.has_text or not self._run.job.text.detokenize:
            return self._done([(hypothesis, "") for hypothesis in self._found])
        ids = [
            self._run.prompt_ids,
            *(self._run.prompt_ids + self._shown(hypothesis) for hypothesis in self._found),
        ]
        for index, tokens in enumerate(ids):
            question = Detokenize(0, "-", pack("i", tokens), self._run.job.text.skip_special_tokens)
            self._ask(question, lambda answer, index=index: self._on_answer(index, answer))

    def _shown(self, hypothesis: Hypothesis) -> list[int]:
        tokens = hypothesis.beam.tokens()
        return tokens if hypothesis.end is None or self._run.job.text.include_stop else tokens[:-1]

    def _on_answer(self, index: int, answer: Tokenized | ApiError) -> None:
        if isinstance(answer, ApiError):
            return self._run.fail(answer)
        self._answers[index] = answer.text
        if len(self._answers) == len(self._found) + 1:
            self._run.prompt_text = self._answers[0]
            before = self._answers[0].removesuffix("\ufffd")
            texts = [self._answers[i + 1].removeprefix(before) for i in range(len(self._found))]
            self._done(list(zip(self._found, texts, strict=True)))


def _entry(beam: Beam, index: int, wanted: int) -> TokenLogprobs:
    """The beam's own token first, then the likeliest ones."""
    row: TokenLogprobs = beam.kept
    place = row.ids.index(beam.token, 1)
    order = [place, *range(1, wanted + 1)]
    return TokenLogprobs(
        0,
        index,
        place,
        tuple(row.ids[i] for i in order),
        tuple(row.values[i] for i in order),
        tuple(row.texts[i] for i in order),
    )


def _too_long(context: int, prompt: int, completion: int) -> str:
    return (
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + completion} tokens "
        f"({prompt} in the prompt, {completion} for the completion). Reduce the prompt or max_tokens."
    )
