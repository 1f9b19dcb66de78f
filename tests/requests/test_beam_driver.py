"""A beam search driven by hand: each round's jobs are answered by the test, at once or later."""

import itertools
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace
from pagewire.requests.beam_driver import CONTEXT_TOKENS, BeamRun
from pagewire.requests.choices import BeamOptions
from pagewire.requests.errors import ErrorKind, RequestError, unavailable
from pagewire.requests.model_facts import ModelFacts
from pagewire.requests.queries import MakeQuery
from pagewire.requests.request import Job, Sink
from pagewire_protocol.columns import pack, unpack
from pagewire_protocol.messages import Detokenize, Tokenized
from pagewire_protocol.sampling import Sampling, TextOptions
from pagewire_protocol.structs import Prompt, Started, TokenLogprobs

MODEL = ModelFacts(max_model_len=64, vocab_size=100, eos_token_ids=(2,))
PROMPT = list(range(10, 40))


class Stack:
    """Every token has the candidates 0, 1, 2, ... at -0.5, -1.0, -1.5, ...; a text is its ids in
    brackets. Answers wait until the test lets them go."""

    def __init__(self, prompt_tokens: int = len(PROMPT)) -> None:
        self.rounds: list[list[Job]] = []
        self.decoded: list[list[int]] = []
        self.ended: list[BeamRun] = []
        self._prompt = list(range(10, 10 + prompt_tokens))
        self._sinks: list[tuple[Job, Sink]] = []

    def submit_round(self, beams: Sequence[tuple[Job, Sink]]) -> None:
        self.rounds.append([job for job, _ in beams])
        self._sinks += beams

    def send_query(self, make: MakeQuery, on_answer: Any) -> None:
        message = make(0, "ipc:///run/frontend.sock")
        assert isinstance(message, Detokenize)
        ids = unpack("i", message.ids).tolist()
        self.decoded.append(ids)
        names = [f"<{token}>" for token in ids]
        offsets = [0, *itertools.accumulate(map(len, names))][: len(ids)]
        places = {"offsets": pack("i", offsets)} if message.with_offsets else {}
        on_answer(Tokenized(0, text="".join(names), **places))

    def answer(self) -> None:
        """All jobs of the round."""
        sinks, self._sinks = self._sinks, []
        for job, sink in sinks:
            ids = pack("i", self._prompt) if job.text.return_prompt_ids else None
            sink.started(Started(0, 1, len(self._prompt), 16, ids))
            count = job.sampling.logprobs
            values = tuple(-0.5 * (i + 1) for i in range(count))
            texts = (b"?",) * (count + 1)
            entry = TokenLogprobs(0, 0, 1, (0, *range(count)), (-0.5, *values), texts)
            sink.tokens("", [0], [entry])
            sink.finished("length", None, 1)

    def fail(self, error: RequestError) -> None:
        for _, sink in self._sinks:
            sink.failed(error)


def search(
    stack: Stack, options: BeamOptions, model: ModelFacts = MODEL, **sampling: Any
) -> BeamRun:
    job = Job(
        Prompt(text="hi"),
        Sampling(**{"seed": 1, "max_tokens": 3, **sampling}),
        TextOptions(),
    )
    run = BeamRun(job, options, model, stack.submit_round, stack.send_query, stack.ended.append)
    run.start()
    return run


def test_rounds_extend_the_prompt_and_the_outcome_comes_once() -> None:
    stack = Stack()
    run = search(stack, BeamOptions(2, 2))
    for _ in range(3):
        assert not stack.ended
        stack.answer()
    assert stack.ended == [run] and run.error is None and run.prompt_ids == PROMPT
    assert [len(jobs) for jobs in stack.rounds] == [1, 2, 2]
    assert stack.rounds[0][0].prompt.text == "hi" and stack.rounds[0][0].text.return_prompt_ids
    for number, jobs in enumerate(stack.rounds[1:], 1):
        for job in jobs:
            assert job.prompt.ids is not None
            assert unpack("i", job.prompt.ids).tolist()[: len(PROMPT)] == PROMPT
            assert len(job.prompt.ids) == 4 * (len(PROMPT) + number)
    assert run.results[0].tokens == [0, 0, 0] and run.results[0].cumulative_logprob == -1.5
    assert run.cached_tokens == 16


def test_texts_are_decoded_behind_the_end_of_the_prompt() -> None:
    stack = Stack()
    run = search(stack, BeamOptions(2, 2))
    for _ in range(3):
        stack.answer()
    context = PROMPT[-CONTEXT_TOKENS:]
    assert stack.decoded == [context, *(context + result.tokens for result in run.results)]
    assert run.results[0].text == "<0><0><0>"
    assert run.prompt_text == "", "nobody wants the whole prompt's text"


def test_log_probabilities_say_where_each_token_begins() -> None:
    stack = Stack(prompt_tokens=CONTEXT_TOKENS + 5)
    run = search(stack, BeamOptions(2, 2), logprobs=1)
    for _ in range(3):
        stack.answer()
    for result in run.results:
        assert [result.text[entry.offset :][:3] for entry in result.logprobs] == [
            f"<{token}>" for token in result.tokens
        ]
    stack = Stack()
    run = search(stack, BeamOptions(2, 2), replace(MODEL, has_text=False), logprobs=1)
    for _ in range(3):
        stack.answer()
    assert {entry.offset for result in run.results for entry in result.logprobs} == {0}


def test_without_text_nothing_is_decoded() -> None:
    stack = Stack()
    run = search(stack, BeamOptions(2, 2), replace(MODEL, has_text=False))
    for _ in range(3):
        stack.answer()
    assert stack.decoded == [] and [result.text for result in run.results] == ["", ""]


def test_fewer_hypotheses_than_wanted_are_a_refusal_unless_allowed() -> None:
    ends = {"max_tokens": 1, "min_tokens": 1, "stop_token_ids": tuple(range(3, 15))}
    stack = Stack()
    run = search(stack, BeamOptions(16, 16), **ends)
    stack.answer()
    assert run.error is not None and stack.ended == [run]
    assert (run.error.kind, run.error.param) == (ErrorKind.INVALID, "n")
    assert run.error.message == "There are only 7 continuations, fewer than n=16."
    stack = Stack()
    run = search(stack, BeamOptions(16, 16, fewer_allowed=True), **ends)
    stack.answer()
    assert run.error is None and len(run.results) == 7


def test_what_does_not_fit_is_refused_when_the_prompt_is_known() -> None:
    stack = Stack(prompt_tokens=60)
    run = search(stack, BeamOptions(2, 2), max_tokens=5)
    stack.answer()
    assert run.error is not None and run.error.param == "max_tokens"
    assert "60 in the prompt, 5 for the completion" in run.error.message
    assert stack.ended == [run] and len(stack.rounds) == 1


def test_a_failure_ends_the_search_once() -> None:
    stack = Stack()
    run = search(stack, BeamOptions(2, 2))
    stack.answer()
    stack.fail(unavailable("gone"))
    assert run.error is not None and run.error.message == "gone" and stack.ended == [run]


def test_as_many_candidates_are_reported_as_were_asked_for() -> None:
    stack = Stack()
    run = search(stack, BeamOptions(2, 1), max_tokens=1, logprobs=9, ignore_eos=True)
    stack.answer()
    (result,) = run.results
    (entry,) = result.logprobs
    assert entry.ids == (0, *range(9)) and entry.rank == 1
