"""One prompt's beam search on a running stack: each live beam is a job of one token with
log-probabilities, round after round.

The prompt and the beams so far are the prompt of the next round, and the prefix cache holds all of
it but the newest block. This module knows jobs and sinks, no socket and no clock; the rules of the
search itself are in `beam_search.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from msgspec import Struct
from msgspec.structs import replace
from pagewire_protocol.columns import pack, unpack
from pagewire_protocol.messages import Detokenize, Tokenized
from pagewire_protocol.prompt_checks import kept_prompt_tokens, too_long
from pagewire_protocol.sampling import TextOptions
from pagewire_protocol.structs import Prompt, PromptLogprobs, Started, TokenLogprobs

from .answers import Output
from .beam_search import Beam, BeamSearch, Hypothesis
from .choices import BeamOptions
from .errors import RequestError, failed, invalid
from .model_facts import ModelFacts
from .queries import Answer, MakeQuery, OnAnswer
from .request import Job, Sink

CONTEXT_TOKENS: Final = 16
"""Prompt tokens that a hypothesis is decoded behind: a token may read otherwise where a text
begins, and a character may begin in the prompt and end in the hypothesis."""
SubmitRound = Callable[[Sequence[tuple[Job, Sink]]], object]
"""Takes the jobs of one round with their sinks, at once or later. It does not raise: a job that
cannot be sent fails its sink."""
SendQuery = Callable[[MakeQuery, OnAnswer], object]
"""Takes a query to a tokenizer, at once or later. It does not raise: a query that cannot be sent is
answered with an error."""


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
    """The search for one job. `on_end` is called once, when `results` or `error` is there. The
    caller cancels the requests of a run that it gives up, or that failed.

    with_prompt_text: `prompt_text` is wanted, which costs the decoding of the whole prompt.
    """

    def __init__(
        self,
        job: Job,
        options: BeamOptions,
        model: ModelFacts,
        submit_round: SubmitRound,
        send_query: SendQuery,
        on_end: "Callable[[BeamRun], None]",
        with_prompt_text: bool = False,
    ) -> None:
        self.job = job
        self.options = options
        self.model = model
        self.results: list[BeamResult] = []
        self.error: RequestError | None = None
        self.prompt_ids: list[int] = []
        self.prompt_text = ""
        """Known at the end, where it is wanted and there is a tokenizer."""
        self.cached_tokens = 0
        """Of the prompt, in the first round."""
        self._submit_round = submit_round
        self._send_query = send_query
        self._on_end = on_end
        self._with_prompt_text = with_prompt_text
        self._search: BeamSearch | None = None
        self._rows: list[TokenLogprobs | None] = []
        """What came back of this round, by beam."""
        self._missing = 0
        """Beams of this round without a row."""

    @property
    def ended(self) -> bool:
        """There is an outcome."""
        return self.error is not None or bool(self.results)

    def start(self) -> None:
        """Send the first round: the prompt as it was given."""
        sampling = self.job.sampling
        # How long the continuation may be is known with the prompt's ids, which come with the first
        # round. That round needs no more of the search than the number of its candidates.
        self._search = BeamSearch(self.options.width, sampling.max_tokens, self._end_ids())
        self._send_round([self.job.prompt])

    def fail(self, error: RequestError) -> None:
        """End the search with `error`. Does nothing when it has ended."""
        if not self.ended:
            self.error = error
            self._on_end(self)

    # --- rounds ---

    def _end_ids(self) -> frozenset[int]:
        sampling = self.job.sampling
        stops = frozenset(sampling.stop_token_ids)
        return stops if sampling.ignore_eos else stops | frozenset(self.model.eos_token_ids)

    def _send_round(self, prompts: Sequence[Prompt]) -> None:
        assert self._search is not None
        first = not self.prompt_ids
        self._rows = [None for _ in prompts]
        self._missing = len(prompts)
        # The end-of-sequence tokens are candidates like others: the search decides what they end.
        sampling = replace(
            self.job.sampling,
            max_tokens=1,
            min_tokens=0,
            temperature=0.0,
            logprobs=max(self._search.candidates, self.job.sampling.logprobs),
            ignore_eos=True,
            stop_token_ids=(),
        )
        text = TextOptions(
            detokenize=False,
            return_prompt_ids=first,
            truncate_prompt=self._truncation() if first else 0,
        )
        template = replace(self.job, sampling=sampling, text=text, max_tokens_is_rest=False)
        self._submit_round(
            [
                (replace(template, prompt=prompt), _BeamSink(self, index))
                for index, prompt in enumerate(prompts)
            ]
        )

    def _truncation(self) -> int:
        """-1 leaves room for all tokens of the search, not for the one of a round's job."""
        completion = 1 if self.job.max_tokens_is_rest else self.job.sampling.max_tokens
        return kept_prompt_tokens(
            self.job.text.truncate_prompt, self.model.max_model_len, completion
        )

    def on_prompt(self, started: Started) -> None:
        """The prompt's ids are known, and with them how long the continuation may be."""
        self.prompt_ids = unpack("i", started.prompt_ids or b"").tolist()
        self.cached_tokens = started.cached_tokens
        sampling = self.job.sampling
        prompt_tokens = len(self.prompt_ids)
        room = self.model.max_model_len - prompt_tokens
        max_tokens = sampling.max_tokens
        if self.job.max_tokens_is_rest:
            max_tokens = min(room, max_tokens)
        if max_tokens > room:
            text = too_long(self.model.max_model_len, prompt_tokens, max_tokens)
            self.fail(invalid(text, "max_tokens"))
            return
        self._search = BeamSearch(
            self.options.width,
            max_tokens,
            self._end_ids(),
            self.options.length_penalty,
            self.options.early_stopping,
            sampling.min_tokens,
        )

    def on_row(self, index: int, entry: TokenLogprobs) -> None:
        """The candidates that continue beam `index` of this round."""
        if self.error is not None:
            return
        if self._rows[index] is None:
            self._missing -= 1
        self._rows[index] = entry
        if not self._missing:
            self._advance()

    def _advance(self) -> None:
        assert self._search is not None
        rows = [entry for entry in self._rows if entry is not None]
        # Entry 0 is the token that was sampled, which the candidates in falling order name again.
        candidates = [list(zip(row.ids[1:], row.values[1:], strict=True)) for row in rows]
        self._search.advance(candidates, kept=rows)
        if self._search.live:
            self._send_round(
                [
                    Prompt(ids=pack("i", self.prompt_ids + beam.tokens()))
                    for beam in self._search.live
                ]
            )
            return
        count = self.options.count
        best = self._search.best(self.options.count)
        if len(best) < count and not self.options.fewer_allowed:
            self.fail(
                invalid(f"There are only {len(best)} continuations, fewer than n={count}.", "n")
            )
            return
        _HypothesisTexts(self, best, self._send_query, self._with_prompt_text).start()

    # --- the outcome ---

    def finish(
        self,
        best: Sequence[Hypothesis],
        texts: Sequence[str],
        offsets: Sequence[Sequence[int]],
    ) -> None:
        """All is known: of each hypothesis its text, and where its tokens begin in it."""
        if self.error is None:
            self.results = [
                self._result(*parts) for parts in zip(best, texts, offsets, strict=True)
            ]
            self._on_end(self)

    def _result(self, hypothesis: Hypothesis, text: str, offsets: Sequence[int]) -> BeamResult:
        end = hypothesis.end
        wanted = self.job.sampling.logprobs
        path = hypothesis.beam.path()
        return BeamResult(
            tokens=[beam.token for beam in path],
            text=text,
            score=hypothesis.score,
            cumulative_logprob=hypothesis.beam.score,
            reason="length" if end is None else "stop",
            stop_reason=end if end in self.job.sampling.stop_token_ids else None,
            logprobs=[
                _own_first(beam, i, wanted, offsets[i] if i < len(offsets) else 0)
                for i, beam in enumerate(path)
            ]
            if wanted >= 0
            else [],
        )


class _BeamSink:
    """The sink of one beam's job."""

    wants_tokens = True

    def __init__(self, run: BeamRun, index: int) -> None:
        self._run = run
        self._index = index
        self._entry: TokenLogprobs | None = None

    def started(self, started: Started) -> None:
        if started.prompt_ids is not None and not self._run.prompt_ids:
            self._run.on_prompt(started)

    def prompt_logprobs(self, entry: PromptLogprobs) -> None:
        """Never called: no round asks for them."""

    def text(self, text: Output, /) -> None:
        """Never called: `wants_tokens`."""

    def tokens(self, text: Output, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        if logprobs:
            self._entry = logprobs[0]

    def finished(
        self,
        reason: str,
        stop_reason: int | str | None,
        completion_tokens: int,
        reasoning_tokens: int = 0,
    ) -> None:
        if self._entry is None:
            self._run.fail(failed())
        else:
            self._run.on_row(self._index, self._entry)

    def failed(self, error: RequestError) -> None:
        self._run.fail(error)


class _HypothesisTexts:
    """The texts of hypotheses: what the prompt's last tokens and theirs stand for together, less
    what the prompt's stand for alone."""

    def __init__(
        self,
        run: BeamRun,
        best: Sequence[Hypothesis],
        send_query: SendQuery,
        with_prompt_text: bool,
    ) -> None:
        self._run = run
        self._best = best
        self._send_query = send_query
        self._with_prompt_text = with_prompt_text
        self._answers: dict[int, Tokenized] = {}
        self._queries = 0

    def start(self) -> None:
        if not self._run.model.has_text or not self._run.job.text.detokenize:
            nothing: list[list[int]] = [[] for _ in self._best]
            self._run.finish(self._best, [""] * len(self._best), nothing)
            return
        context = self._run.prompt_ids[-CONTEXT_TOKENS:]
        queries = [context, *(context + self._shown(hypothesis) for hypothesis in self._best)]
        if self._with_prompt_text:
            queries.append(self._run.prompt_ids)
        self._queries = len(queries)
        skip_special_tokens = self._run.job.text.skip_special_tokens
        for index, tokens in enumerate(queries):
            make = partial(
                Detokenize,
                ids=pack("i", tokens),
                skip_special_tokens=skip_special_tokens,
                with_offsets=self._run.job.sampling.logprobs >= 0,
            )
            self._send_query(make, lambda answer, index=index: self._on_answer(index, answer))

    def _shown(self, hypothesis: Hypothesis) -> list[int]:
        tokens = hypothesis.beam.tokens()
        return tokens if hypothesis.end is None or self._run.job.text.include_stop else tokens[:-1]

    def _on_answer(self, index: int, answer: Answer) -> None:
        if isinstance(answer, RequestError):
            self._run.fail(answer)
            return
        self._answers[index] = answer
        if len(self._answers) < self._queries:
            return
        if self._with_prompt_text:
            self._run.prompt_text = self._answers[self._queries - 1].text
        # The prompt may end within a character, which only the hypothesis makes whole.
        before = self._answers[0].text.rstrip("\ufffd")
        answers = [self._answers[number] for number in range(1, len(self._best) + 1)]
        self._run.finish(
            self._best,
            [answer.text.removeprefix(before) for answer in answers],
            [self._offsets(answer, len(before)) for answer in answers],
        )

    def _offsets(self, answer: Tokenized, before: int) -> list[int]:
        """Where each token of a hypothesis begins in its text. A token that ends it without being
        shown begins at the text's end."""
        context = len(self._run.prompt_ids[-CONTEXT_TOKENS:])
        offsets = unpack("i", answer.offsets).tolist()[context:]
        return [max(0, offset - before) for offset in (*offsets, len(answer.text))]


def _own_first(beam: Beam, index: int, candidates: int, offset: int) -> TokenLogprobs:
    """The entry of the beam's own token, token `index` of its hypothesis, which begins at `offset`
    of its text: the token first, then the most likely ones."""
    row: TokenLogprobs = beam.kept
    rank = row.ids.index(beam.token, 1)
    order = [rank, *range(1, candidates + 1)]
    return TokenLogprobs(
        0,
        index,
        rank,
        tuple(row.ids[i] for i in order),
        tuple(row.values[i] for i in order),
        tuple(row.texts[i] for i in order),
        offset,
    )
