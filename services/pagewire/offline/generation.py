"""One call of `LLM.generate`, `chat` or `beam_search`: keeps the stack fed, gathers what comes,
sends again what there was no room for."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from msgspec import Struct
from pagewire_protocol.columns import pack
from pagewire_protocol.messages import Detokenize, Tokenized

from ..requests.beam_driver import BeamRun
from ..requests.errors import ErrorKind, RequestError
from ..requests.job_template import JobTemplate
from ..requests.model_facts import ModelFacts
from ..requests.queries import Answer, MakeQuery, OnAnswer, TokenizerQuery
from ..requests.request import Job, OwnedRequest, Sink
from .engine import Engine, EngineError
from .outputs import RequestOutput
from .prompts import Entry
from .sinks import Bar, CompletionSink, RequestGroup, Submission

MAX_QUERIES = 64
"""With the tokenizers at once."""
PAUSE_S = 0.02
"""Before a request goes out again to services that are not ready."""


class OfflineContext(Struct, frozen=True):
    """What a batch needs of the LLM that it belongs to."""

    engine: Engine
    model: ModelFacts
    max_running: int
    """Requests that the stack has at a time."""
    draw_bits: Callable[[int], int]
    """Draws so many random bits, for prompts without a seed."""
    next_request_id: Callable[[], str]


class Batch:
    """The prompts of one call, each with the template of its jobs.

    `timed` notes the moment of every token; `with_prompt_text` decodes the prompts of beam
    searches.
    """

    def __init__(
        self,
        context: OfflineContext,
        entries: Sequence[Entry],
        templates: Sequence[JobTemplate],
        *,
        timed: bool = False,
        with_prompt_text: bool = False,
    ) -> None:
        self._context = context
        self._engine = context.engine
        self._timed = timed
        self._with_prompt_text = with_prompt_text
        self.groups: list[RequestGroup] = []
        self.searches: dict[BeamRun, RequestGroup] = {}
        self.sinks: list[CompletionSink] = []
        self._waiting: deque[Submission] = deque()
        self._running: set[Submission] = set()
        self._ended: list[Submission] = []
        self._ended_searches: list[BeamRun] = []
        self._waiting_queries: deque[tuple[MakeQuery, OnAnswer]] = deque()
        self._queries: set[TokenizerQuery] = set()
        for index, (entry, template) in enumerate(zip(entries, templates, strict=True)):
            self._add(RequestGroup(context.next_request_id(), index, entry, template))
        self._unfinished = len(self.groups)
        self._bar = Bar(False, 0)

    def run(self, use_tqdm: bool | Callable[..., Any] = False) -> list[RequestOutput]:
        """The outputs in the order of the prompts. Batches of several threads run one after
        another. Raises ValueError when a prompt is refused, EngineError when the stack fails."""
        with self._engine.held():
            return self._run(use_tqdm)

    # --- what is to be done ---

    def _add(self, group: RequestGroup) -> None:
        self.groups.append(group)
        entry = group.entry
        jobs = group.template.jobs(
            entry.prompt,
            self._context.draw_bits,
            add_special_tokens=entry.add_special_tokens,
            priority=entry.priority,
            cache_salt=entry.cache_salt,
        )
        if group.choices.beams:
            self._add_search(group, jobs[0])
            return
        for choice, job in enumerate(jobs):
            sink = CompletionSink(group, choice, self._timed)
            self.sinks.append(sink)
            on_success = partial(self._complete, group, sink)
            self._waiting.append(Submission(group, job, sink, on_success, self._ended.append))

    def _add_search(self, group: RequestGroup, job: Job) -> None:
        assert group.choices.beams is not None
        run = BeamRun(
            job,
            group.choices.beams,
            self._context.model,
            partial(self._add_round, group),
            self._add_query,
            self._ended_searches.append,
            self._with_prompt_text,
        )
        self.searches[run] = group
        run.start()

    def _add_round(self, group: RequestGroup, beams: Sequence[tuple[Job, Sink]]) -> None:
        """The jobs of one round of a search. One that has begun goes before others, so that its
        blocks are still cached."""
        add = self._waiting.appendleft if group.output.prompt_token_ids else self._waiting.append
        for job, sink in beams:
            add(Submission(group, job, sink, group.note_times, self._ended.append))

    def _add_query(self, make: MakeQuery, on_answer: OnAnswer) -> None:
        self._waiting_queries.append((make, on_answer))

    # --- the loop ---

    def _run(self, use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        self._bar = Bar(use_tqdm, self._unfinished)
        try:
            self._engine.refresh()
            while self._unfinished:
                self._feed()
                self._engine.pump()
                self._gather()
        finally:
            for submission in self._running:
                if submission.request is not None:
                    self._engine.owner.cancel(submission.request)
            for query in self._queries:
                self._engine.owner.queries.discard(query)
            self._bar.close()
        return [group.output for group in self.groups]

    def _feed(self) -> None:
        while self._waiting and len(self._running) < self._context.max_running:
            submission = self._waiting[0]
            submission.request = self._engine.submit(submission.job, submission)
            if submission.request is None:
                return
            self._waiting.popleft()
            self._running.add(submission)
        while self._waiting_queries and len(self._queries) < MAX_QUERIES:
            if not self._send_query(*self._waiting_queries[0]):
                return
            self._waiting_queries.popleft()

    def _gather(self) -> None:
        ended = self._ended[:]
        self._ended.clear()
        if any(one.error and one.error.kind is ErrorKind.UNAVAILABLE for one in ended):
            time.sleep(PAUSE_S)
        for submission in ended:
            self._running.remove(submission)
            if submission.error is not None:
                self._retry(submission, submission.error)
            elif submission.request is not None:
                submission.on_success(submission.request)
        searches = self._ended_searches[:]
        self._ended_searches.clear()
        for run in searches:
            group = self.searches[run]
            if run.error is not None:
                raise exception_of(group, run.error)
            group.set_beams(run.results)
            self._finish(group)

    def _retry(self, submission: Submission, error: RequestError) -> None:
        """Raises what sending again would not help."""
        if not submission.retries.allows(error):
            raise exception_of(submission.group, error)
        submission.error = None
        self._waiting.append(submission)

    def _complete(self, group: RequestGroup, sink: CompletionSink, request: OwnedRequest) -> None:
        """A choice is complete."""
        sink.completion.token_ids = request.out.tolist()
        group.note_times(request)
        group.unfinished -= 1
        if not group.unfinished:
            self._finish(group)

    def _finish(self, group: RequestGroup) -> None:
        group.finish()
        if group.entry.prompt.chat is not None and self._context.model.has_text:
            self._add_prompt_query(group)
        else:
            self._done(group)

    def _done(self, group: RequestGroup) -> None:
        self._unfinished -= 1
        self._bar.done(group.output)

    # --- queries to the tokenizers ---

    def _add_prompt_query(self, group: RequestGroup) -> None:
        """The text that a conversation became: only the tokenizer's template knows it."""

        def on_answer(answer: Answer) -> None:
            if isinstance(answer, Tokenized):
                group.output.prompt = answer.text
            self._done(group)

        column = pack("i", group.output.prompt_token_ids)
        self._add_query(partial(Detokenize, ids=column), on_answer)

    def _send_query(self, make: MakeQuery, on_answer: OnAnswer) -> bool:
        """False when no tokenizer takes it now."""

        def on_reply(answer: Answer) -> None:
            self._queries.discard(query)
            on_answer(answer)

        try:
            query = self._engine.owner.query(make, on_reply)
        except RequestError:
            return False
        self._queries.add(query)
        return True


def exception_of(group: RequestGroup, error: RequestError) -> Exception:
    """ValueError when the prompt or its parameters are at fault, EngineError when the stack is."""
    exception = ValueError if error.kind is ErrorKind.INVALID else EngineError
    return exception(f"prompt {group.index}: {error.message}")
