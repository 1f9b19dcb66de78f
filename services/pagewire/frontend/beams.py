"""Beam search over the stack: each round continues every live beam by one token, as requests of
their own whose beginnings lie in the prefix cache. The rules are those of
`pagewire.requests.beam_search`; this module drives it and hands the outcome to the choices."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace
from pagewire_protocol.columns import pack
from pagewire_protocol.sampling import Sampling, TextOptions
from pagewire_protocol.structs import Prompt, PromptLogprobs, Started, TokenLogprobs

from pagewire.requests.beam_search import Beam, BeamSearch, Hypothesis

from ..requests.errors import ApiError, bad, request_failed
from ..requests.request import Job, Stream
from .params import Plan
from .questions import ids_of, text_of, truncated
from .reply import Choice, Reply
from .state import State

log = logging.getLogger("pagewire.frontend")
CONTEXT: Final = 4 * 16
"""Bytes of prompt ids that an output is decoded with: a token may read otherwise at the beginning
of a text."""


async def search_all(state: State, plan: Plan, jobs: Sequence[Job], reply: Reply) -> None:
    """Find and deliver the choices of every prompt; whatever goes wrong becomes the reply's
    error."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for i, job in enumerate(jobs):
                tasks.create_task(
                    _search(state, plan, job, reply.choices[i * plan.n : (i + 1) * plan.n])
                )
    except BaseExceptionGroup as failed:
        error = failed.exceptions[0]
        if not isinstance(error, ApiError):
            log.error("beam search failed", exc_info=error)
        reply.fail(error if isinstance(error, ApiError) else request_failed())


async def _search(state: State, plan: Plan, job: Job, choices: Sequence[Choice]) -> None:
    assert plan.beams
    model, asked = state.stack.model(), job.sampling
    prompt = truncated(
        job, await ids_of(state, job.prompt, job.add_special_tokens), model.max_model_len
    )
    size, most = len(prompt) // 4, asked.max_tokens
    if job.max_tokens_is_rest:
        most = max(1, model.max_model_len - size)
    if not size or (model.max_model_len and size + most > model.max_model_len):
        raise bad(
            f"The prompt has {size} tokens and max_tokens is {most}; the context holds {model.max_model_len}.",
            "max_tokens",
        )
    ends = {*asked.stop_token_ids, *(() if asked.ignore_eos else model.eos_token_ids)}
    beams = plan.beams
    search = BeamSearch(
        beams.width, most, ends, beams.length_penalty, beams.early_stopping, asked.min_tokens
    )
    cached = -1
    while search.live:
        probes = await _round(state, job, prompt, search)
        cached = probes[0].cached_tokens if cached < 0 else cached
        search.advance([probe.row() for probe in probes], [probe.entry for probe in probes])
    found = search.best(len(choices))
    if len(found) < len(choices):
        raise bad(f"There are only {len(found)} continuations, fewer than n={len(choices)}.", "n")
    texts = await asyncio.gather(*(_text(state, job, prompt, hypothesis) for hypothesis in found))
    started = Started(0, 1, size, cached, prompt if job.text.return_prompt_ids else None)
    for choice, hypothesis, text in zip(choices, found, texts, strict=True):
        _deliver(choice, hypothesis, text, started, job)


class _Probe:
    """A sink for one more token of one beam."""

    wants_tokens = True

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cached_tokens = 0
        self.entry: TokenLogprobs | None = None

    def row(self) -> list[tuple[int, float]]:
        """The likeliest tokens with their log-probabilities. Raises ApiError when there are
        none."""
        if self.entry is None:
            raise request_failed()
        return list(zip(self.entry.ids[1:], self.entry.values[1:], strict=True))

    def started(self, started: Started) -> None:
        self.cached_tokens = started.cached_tokens

    def prompt_logprobs(self, entry: PromptLogprobs) -> None:
        pass

    def text(self, text: str, /) -> None:
        pass

    def tokens(self, text: str, tokens: list[int], logprobs: list[TokenLogprobs], /) -> None:
        self.entry = logprobs[0] if logprobs else None

    def finished(self, reason: str, stop_reason: int | str | None, completion_tokens: int) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def failed(self, error: ApiError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


async def _round(state: State, job: Job, prompt: bytes, search: BeamSearch) -> list[_Probe]:
    sampling = Sampling(
        job.sampling.seed, 1, temperature=0.0, logprobs=search.candidates, ignore_eos=True
    )
    options = TextOptions(skip_special_tokens=False)
    probes = [_Probe() for _ in search.live]
    prompts = [Prompt(ids=prompt + pack("i", beam.tokens())) for beam in search.live]
    jobs = [
        Job(one, sampling, options, False, False, job.priority, job.cache_salt) for one in prompts
    ]
    streams: list[Stream] = []
    try:
        for one, probe in zip(jobs, probes, strict=True):
            streams.append(state.owner.submit(one, probe))
        await asyncio.gather(*(probe.done for probe in probes))
    finally:
        for stream in streams:
            state.owner.cancel(stream)
    return probes


async def _text(state: State, job: Job, prompt: bytes, hypothesis: Hypothesis) -> str:
    tokens = hypothesis.beam.tokens()
    if hypothesis.end is not None and not job.text.include_stop:
        tokens.pop()
    if not tokens or not state.stack.model().has_text:
        return ""
    context, skip = prompt[-CONTEXT:], job.text.skip_special_tokens
    before, whole = await asyncio.gather(
        text_of(state, context, skip), text_of(state, context + pack("i", tokens), skip)
    )
    return whole.removeprefix(
        before.rstrip("\ufffd")
    )  # a character that the prompt begins and the output ends


def _deliver(choice: Choice, hypothesis: Hypothesis, text: str, started: Started, job: Job) -> None:
    path, end = hypothesis.beam.path(), hypothesis.end
    choice.started(started)
    if choice.wants_tokens:
        shown = choice.reply.plan.logprobs
        choice.tokens(
            text,
            [beam.token for beam in path],
            [_entry(i, beam, shown) for i, beam in enumerate(path)],
        )
    else:
        choice.text(text)
    choice.finished(
        "length" if end is None else "stop",
        end if end in job.sampling.stop_token_ids else None,
        len(path),
    )


def _entry(index: int, beam: Beam, shown: int) -> TokenLogprobs:
    """What was known when the beam grew by this token: the token first, then the `shown`
    likeliest."""
    known: TokenLogprobs = beam.kept
    at = known.ids.index(beam.token, 1)
    places = [at, *range(1, min(len(known.ids), shown + 1))]
    columns = [
        tuple(column[i] for i in places) for column in (known.ids, known.values, known.texts)
    ]
    return replace(known, index=index, rank=at, ids=columns[0], values=columns[1], texts=columns[2])
