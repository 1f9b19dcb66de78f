"""Queries that belong to no request, and prompt log-probabilities, as the owner handles them;
without sockets."""

from functools import partial

import pytest
from pagewire.requests.counters import Counters
from pagewire.requests.errors import ErrorKind, RequestError, unavailable
from pagewire.requests.owner import RequestOwner
from pagewire.requests.queries import ANSWER_S, MAX_DEATHS
from pagewire.requests.request import Job
from pagewire_protocol.columns import pack
from pagewire_protocol.messages import Deltas, Detokenize, Roster, Tokenize, Tokenized
from pagewire_protocol.sampling import Sampling, TextOptions
from pagewire_protocol.structs import Peer, Prompt, PromptLogprobs, Role

QUERY = partial(Tokenize, prompt=Prompt(text="hi"), with_texts=True)


class Harness:
    def __init__(self, *tokenizers: int) -> None:
        self.sent: list[tuple[str, object]] = []
        self.answers: list[object] = []
        self.now, self.full = 1000.0, False
        self.owner = RequestOwner("me", self._send, lambda: self.now, Counters())
        self.roster(*tokenizers)

    def _send(self, inbox, message) -> bool:
        if not self.full:
            self.sent.append((inbox, message))
        return not self.full

    def roster(self, *tokenizers: int) -> None:
        peers = [Peer(Role.TOKENIZER, f"t{i}", f"t{i}", i, True) for i in tokenizers]
        self.owner.on_roster(
            Roster(1, (*peers, Peer(Role.WORKER, "w", "w", 99, True)), 100, 100, (), True, True)
        )

    def queried(self) -> list[tuple[str, int]]:
        return [
            (inbox, message.handle)
            for inbox, message in self.sent
            if isinstance(message, Tokenize | Detokenize)
        ]


def test_a_query_is_answered_once() -> None:
    h = Harness(1)
    h.owner.query(QUERY, h.answers.append)
    ((inbox, message),) = h.sent
    assert (
        inbox == "t1"
        and message == Tokenize(0, "me", Prompt(text="hi"), with_texts=True)
        and len(h.owner) == 1
    )
    answer = Tokenized(0, pack("i", [5, 6]), ("a", "b"))
    for _ in range(2):
        h.owner.queries.on_answer(answer)
    assert h.answers == [answer] and len(h.owner) == 0


def test_queries_spread_over_tokenizers() -> None:
    h = Harness(1, 2)
    for _ in range(4):
        h.owner.query(partial(Detokenize, ids=b""), h.answers.append)
    assert sorted(h.queried()) == [("t1", 0), ("t1", 2), ("t2", 1), ("t2", 3)]


def test_without_a_tokenizer_there_is_none() -> None:
    with pytest.raises(RequestError) as raised:
        Harness().owner.query(QUERY, print)
    assert raised.value.kind is ErrorKind.UNAVAILABLE


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (400, ErrorKind.INVALID, "no such id"),
        (500, ErrorKind.FAILED, "The tokenizer could not handle this request."),
    ],
)
def test_a_refusal_is_an_error(status: int, kind: ErrorKind, text: str) -> None:
    h = Harness(1)
    h.owner.query(QUERY, h.answers.append)
    h.owner.queries.on_answer(Tokenized(0, status=status, message="no such id", param="tokens"))
    (error,) = h.answers
    assert isinstance(error, RequestError) and (error.kind, error.message) == (kind, text)


def test_a_query_outlives_its_tokenizer_but_not_for_ever() -> None:
    h = Harness(1)
    h.owner.query(QUERY, h.answers.append)
    for i in range(2, MAX_DEATHS + 1):
        h.roster(i)
        assert h.queried()[-1] == (f"t{i}", 0) and h.answers == []
    h.roster(99)
    (error,) = h.answers
    assert isinstance(error, RequestError) and error.kind is ErrorKind.FAILED and len(h.owner) == 0


def test_a_query_waits_for_a_tokenizer_until_its_time_is_over() -> None:
    h = Harness(1)
    h.owner.query(QUERY, h.answers.append)
    h.owner.queries.on_answer(Tokenized(0, status=503, message="still loading"))
    h.roster()
    assert h.answers == [] and len(h.queried()) == 1
    h.now += ANSWER_S
    h.owner.tick()
    (error,) = h.answers
    assert isinstance(error, RequestError) and error.kind is ErrorKind.UNAVAILABLE


def test_a_discarded_query_has_no_answer() -> None:
    h = Harness(1)
    query = h.owner.query(QUERY, h.answers.append)
    h.owner.queries.discard(query)
    h.owner.queries.on_answer(Tokenized(0))
    h.owner.fail_all(unavailable("over"))
    assert h.answers == []


def test_the_end_of_the_process_ends_its_queries() -> None:
    h = Harness(1)
    h.owner.query(QUERY, h.answers.append)
    error = unavailable("over")
    h.owner.fail_all(error)
    assert h.answers == [error]


class PromptSink:
    wants_tokens = False

    def __init__(self) -> None:
        self.runs: list[int] = []

    def prompt_logprobs(self, entry) -> None:
        self.runs.append(entry.first)

    def started(self, *_) -> None: ...
    def text(self, *_) -> None: ...


def test_prompt_logprobs_pass_by_handle_attempt_and_execution() -> None:
    h, sink = Harness(1), PromptSink()
    h.owner.submit(Job(Prompt(text="hi"), Sampling(1, 10, prompt_logprobs=0), TextOptions()), sink)

    def said(first: int, handle: int = 0, attempt: int = 1, execution: int = 7) -> None:
        entry = PromptLogprobs(
            None,
            first,
            pack("i", [1]),
            pack("i", [1]),
            pack("i", [5]),
            pack("f", [-1.0]),
            attempt,
            execution,
            handle=handle,
        )
        h.owner.on_deltas(Deltas(*[b""] * 6, (), prompt_logprobs=(entry,)))

    said(1)
    said(2, handle=1)
    said(3, attempt=2)
    said(4, execution=8)
    said(2)
    said(1)
    assert sink.runs == [1, 2, 1]
