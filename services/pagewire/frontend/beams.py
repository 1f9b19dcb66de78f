"""Beam searches of one HTTP request: `pagewire.requests.beam_driver` runs them; here their
hypotheses become the reply's choices."""

from collections.abc import Callable, Sequence

from pagewire_protocol.columns import pack
from pagewire_protocol.structs import Started

from ..requests.beam_driver import BeamResult, BeamRun
from ..requests.choices import BeamOptions
from ..requests.errors import RequestError
from ..requests.queries import MakeQuery, OnAnswer, TokenizerQuery
from ..requests.request import Job, OwnedRequest, Sink
from .reply import Choice, Reply
from .state import State


def start_beams(
    state: State, options: BeamOptions, jobs: Sequence[Job], reply: Reply
) -> Callable[[], None]:
    """Search each job's prompt; the hypotheses go to the prompt's choices, all at once. What goes
    wrong becomes the reply's error. Returns a function that cancels what still runs."""
    n = options.count
    searches = [
        _Search(state, options, job, reply.choices[i * n : (i + 1) * n])
        for i, job in enumerate(jobs)
    ]

    def cancel() -> None:
        for search in searches:
            search.cancel()

    for search in searches:
        search.run.start()
    return cancel


class _Search:
    """One prompt's search, and what of it the stack has."""

    def __init__(
        self,
        state: State,
        options: BeamOptions,
        job: Job,
        choices: Sequence[Choice],
    ) -> None:
        self._owner = state.owner
        self._choices = choices
        self._round: list[OwnedRequest] = []
        self._queries: list[TokenizerQuery] = []
        self.run = BeamRun(
            job, options, state.stack.model(), self._submit_round, self._send_query, self._on_end
        )

    def cancel(self) -> None:
        """Does nothing for what has ended."""
        for request in self._round:
            self._owner.cancel(request)
        for query in self._queries:
            self._owner.queries.discard(query)

    def _submit_round(self, beams: Sequence[tuple[Job, Sink]]) -> None:
        self._round = []
        for job, sink in beams:
            try:
                self._round.append(self._owner.submit(job, sink))
            except RequestError as error:
                sink.failed(error)
                return

    def _send_query(self, make: MakeQuery, on_answer: OnAnswer) -> None:
        try:
            self._queries.append(self._owner.query(make, on_answer))
        except RequestError as error:
            on_answer(error)

    def _on_end(self, run: BeamRun) -> None:
        if run.error is not None:
            self.cancel()
            self._choices[0].failed(run.error)
            return
        prompt_ids = pack("i", run.prompt_ids) if run.job.text.return_prompt_ids else None
        started = Started(0, 1, len(run.prompt_ids), run.cached_tokens, prompt_ids)
        for choice, result in zip(self._choices, run.results, strict=True):
            _deliver(choice, result, started)


def _deliver(choice: Choice, result: BeamResult, started: Started) -> None:
    choice.started(started)
    if choice.wants_tokens:
        choice.tokens(result.text, result.tokens, result.logprobs)
    elif result.text:
        choice.text(result.text)
    choice.finished(result.reason, result.stop_reason, len(result.tokens))
