"""One call of `LLM.generate`, `chat` or `beam_search`: keeps the stack fed, gathers what comes,
sends again what there was no room for."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pagewire_protocol.columns import pack
from pagewire_protocol.messages import Detokenize, Roster, Tokenized

from ..requests.beam_driver import BeamModel, BeamOptions, BeamRun
from ..requests.errors import ApiError
from ..requests.queries import Answered
from ..requests.request import Job, Sink, Stream
from .engine import EngineError
from .outputs import RequestOutput
from .prompts import Entry
from .sampling_params import SamplingParams
from .sinks import Bar, BeamStepSink, CompletionSink, Group
from .translate import JobTemplate, beam_options

if TYPE_CHECKING:
    from .llm import LLM

AHEAD = 2
"""Requests sent, in multiples of what a worker runs at once; more would only lengthen queues."""
MAX_QUESTIONS = 64
"""Put to the tokenizers at once."""
MAX_REFUSALS, PAUSE_S = 200, 0.02
"""How often a request goes out again to services that are not ready, and the wait before."""
Taker = CompletionSink | BeamStepSink


class Batch:
    """`timed` notes the moment of every token; `beams` makes every prompt a beam search."""

    def __init__(
        self,
        llm: "LLM",
        entries: Sequence[Entry],
        params: Sequence[SamplingParams],
        timed: bool = False,
        beams: BeamOptions | None = None,
    ) -> None:
        self._engine, self._has_text = llm._engine, not llm._config.model.skip_tokenizer_init
        self._limit = AHEAD * llm._config.scheduler.num_seqs() * llm._config.num_workers
        self._draw, self._model = llm._random.getrandbits, beam_model(llm._roster, self._has_text)
        self._molds: dict[int, JobTemplate] = {}
        self.groups: list[Group] = []
        self.searches: dict[BeamRun, Group] = {}
        self.collectors: list[CompletionSink] = []
        self._ended: list[Taker] = []
        self._searched: list[BeamRun] = []
        self._waiting: deque[tuple[Taker, Job]] = deque()
        self._running: dict[Taker, tuple[Stream, Job]] = {}
        self._questions: deque[tuple[Detokenize, Answered]] = deque()
        self._asked: set[Any] = set()
        for place, (entry, chosen) in enumerate(zip(entries, params, strict=True)):
            group = Group(llm.next_id(), place, entry, chosen)
            self.groups.append(group)
            self._plan(group, timed, beams or beam_options(chosen))
        self._left = len(self.groups)
        self._bar = Bar(False, 0)

    def _plan(self, group: Group, timed: bool, beams: BeamOptions | None) -> None:
        mold = self._molds.get(id(group.params))
        if mold is None:
            mold = self._molds[id(group.params)] = JobTemplate(group.params, self._has_text)
        entry = group.entry
        if beams is not None:
            job = mold.job(entry.prompt, 0, 0, entry.special, entry.cache_salt, entry.priority)
            run = BeamRun(
                job, beams, self._model, self._step(group), self._ask, self._searched.append
            )
            self.searches[run] = group
            return run.start()
        for index in range(group.params.width):
            collector = CompletionSink(group, index, timed, self._ended.append)
            self.collectors.append(collector)
            job = mold.job(
                entry.prompt, index, self._draw(63), entry.special, entry.cache_salt, entry.priority
            )
            self._waiting.append((collector, job))

    def _step(self, group: Group) -> Callable[[Job, Sink], None]:
        """Takes the jobs of a beam search; one that has begun goes before others, so that its
        blocks are still cached."""

        def submit(job: Job, step: Sink) -> None:
            relay = BeamStepSink(group, step, self._ended.append)
            (self._waiting.appendleft if group.output.prompt_token_ids else self._waiting.append)(
                (relay, job)
            )

        return submit

    def run(self, use_tqdm: bool | Callable[..., Any] = False) -> list[RequestOutput]:
        """Batches of several threads run one after another."""
        with self._engine.lock:
            return self._run(use_tqdm)

    def _run(self, use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        self._engine.check_open()
        self._bar = Bar(use_tqdm, self._left)
        try:
            self._engine.refresh()
            while self._left:
                self._feed()
                self._engine.pump()
                self._gather()
        finally:
            for stream, _ in self._running.values():
                self._engine.owner.cancel(stream)
            for question in self._asked:
                self._engine.owner.asks.forget(question)
            self._bar.close()
        return [group.output for group in self.groups]

    def _feed(self) -> None:
        while self._waiting and len(self._running) < self._limit:
            taker, job = self._waiting[0]
            stream = self._engine.submit(job, taker)
            if stream is None:
                return
            self._waiting.popleft()
            self._running[taker] = (stream, job)
        while (
            self._questions and len(self._asked) < MAX_QUESTIONS and self._sent(*self._questions[0])
        ):
            self._questions.popleft()

    def _gather(self) -> None:
        ended, self._ended[:] = self._ended[:], []
        if any(taker.error and taker.error.status == 503 for taker in ended):
            time.sleep(PAUSE_S)
        for taker in ended:
            stream, job = self._running.pop(taker)
            if taker.error is None:
                if taker.take(stream):
                    self._finish(taker.group)
            else:
                self._retry(taker, job, taker.error)
        searched, self._searched[:] = self._searched[:], []
        for run in searched:
            group = self.searches[run]
            if run.error is not None:
                raise failure(group, run.error)
            group.take_beams(run.results)
            self._finish(group)

    def _retry(self, taker: Taker, job: Job, error: ApiError) -> None:
        """Full queues empty themselves, and a service that is starting again will be ready. Raises
        what sending again would not help."""
        taker.refusals += error.status != 429
        if error.status not in (429, 503) or taker.refusals > MAX_REFUSALS:
            raise failure(taker.group, error)
        taker.error = None
        self._waiting.append((taker, job))

    def _finish(self, group: Group) -> None:
        group.finish()
        if group.entry.prompt.chat is not None and self._has_text:
            self._ask_text(group)
        else:
            self._done(group)

    def _done(self, group: Group) -> None:
        self._left -= 1
        self._bar.done(group.output)

    def _ask_text(self, group: Group) -> None:
        """The text that a conversation became: only the tokenizer's template knows it."""

        def answered(answer: Tokenized | ApiError) -> None:
            if isinstance(answer, Tokenized):
                group.output.prompt = answer.text
            self._done(group)

        self._ask(Detokenize(0, "-", pack("i", group.output.prompt_token_ids)), answered)

    def _ask(self, question: Detokenize, answered: Answered) -> None:
        self._questions.append((question, answered))

    def _sent(self, question: Detokenize, answered: Answered) -> bool:
        """False when nobody can be asked now."""

        def came(answer: Tokenized | ApiError) -> None:
            self._asked.discard(asked)
            answered(answer)

        try:
            asked = self._engine.owner.ask(question, came)
        except ApiError:
            return False
        self._asked.add(asked)
        return True


def beam_model(roster: Roster, has_text: bool) -> BeamModel:
    return BeamModel(roster.max_model_len, frozenset(roster.eos_token_ids), has_text)


def failure(group: Group, error: ApiError) -> Exception:
    """ValueError when the prompt or its parameters are at fault, EngineError when the stack is."""
    kind = ValueError if 400 <= error.status < 500 else EngineError
    return kind(f"prompt {group.place}: {error.message}")
