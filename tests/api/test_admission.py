"""429 from the frontend itself: at once, without a tokenizer, with the wait that was measured."""

import socket
from types import SimpleNamespace

import pytest
from pagewire.frontend.admission import USUAL_RETRY_S, Admission
from pagewire.requests.errors import ErrorKind, RequestError
from pagewire_protocol.messages import Roster

STATS = {
    "num_requests_waiting": 8.0,
    "num_tokens_waiting": 800.0,
    "max_queued_reqs": 10.0,
    "max_queued_tokens": 1000.0,
    "queue_requests_per_second": 0.5,
    "queue_tokens_per_second": 50.0,
}


def roster(**stats: float) -> Roster:
    return Roster(1, (), 4096, 1000, (), True, True, {**STATS, **stats})


def admission(waiting: int = 0, tokens: int = 0, **stats: float):
    owner = SimpleNamespace(waiting=waiting, waiting_tokens=tokens)
    made = Admission(owner)  # type: ignore[arg-type]
    made.on_roster(roster(**stats))
    return made, owner


def refused(made: Admission, *size: int) -> RequestError:
    with pytest.raises(RequestError) as error:
        made.check(*size)
    assert error.value.kind is ErrorKind.OVERLOADED
    return error.value


def test_what_finds_room_passes():
    made, _ = admission()
    made.check(2, 200)
    assert "8 requests" in refused(made, 3, 1).message
    assert "800 tokens" in refused(made, 1, 201).message


def test_the_wait_is_the_measured_one():
    made, _ = admission()
    assert refused(made, 3).retry_after_s == 16, "8 requests at 0.5 a second"
    made, _ = admission(num_tokens_waiting=990.0, queue_tokens_per_second=5.0)
    assert refused(made, 1, 100).retry_after_s == 198, "990 tokens at 5 a second"
    made, _ = admission(queue_requests_per_second=0.0)
    assert refused(made, 3).retry_after_s == USUAL_RETRY_S, "nothing was measured yet"


def test_what_this_frontend_has_sent_since_counts_and_what_was_placed_does_not():
    made, owner = admission(waiting=3, tokens=300)
    made.check(2)
    owner.waiting = 5
    refused(made, 1)
    owner.waiting = 0
    made.check(5)
    owner.waiting_tokens = 600
    refused(made, 1, 1)


def test_nothing_is_refused_while_nothing_waits():
    """How many find a slot at once only the scheduler knows."""
    made, owner = admission(num_requests_waiting=0.0, num_tokens_waiting=0.0)
    owner.waiting = 1000
    made.check(100, 10_000)


def test_a_roster_without_figures_changes_nothing():
    made, _ = admission()
    made.on_roster(Roster(1, (), 4096, 1000, (), True, True))
    refused(made, 3)


@pytest.fixture
def full(server):
    state = server.frontend.service.state
    state.admission._stats = {**STATS, "num_requests_waiting": 10.0}
    state.admission._others = 10.0
    yield server
    state.admission._stats = {}
    state.admission._others = 0.0


def test_a_full_queue_is_an_answer_at_once(full):
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = full.post(path, prompt="hi", messages=[{"role": "user", "content": "hi"}])
        assert answer.status_code == 429, answer.text
        assert answer.headers["retry-after"] == "20"
        assert "10 requests" in answer.json()["error"]["message"]
    assert not full.stack.received, "no tokenizer has heard of it"
    assert full.post("/tokenize", prompt="hi").status_code == 200


def test_a_full_queue_does_not_wait_for_the_body(full):
    with socket.create_connection(("127.0.0.1", full.frontend.port), 10) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 429")


def test_an_owner_knows_which_of_its_requests_wait(server):
    owner = server.owner
    server.complete("hi", n=3)
    server.complete("refuse400")
    server.settle(lambda: len(owner) == 0)
    assert (owner.waiting, owner.waiting_tokens) == (0, 0)
    with server.http.stream(
        "POST", "/v1/completions", json={"prompt": "mum " * 40, "stream": True, "n": 2}
    ):
        pass
    server.settle(lambda: (owner.waiting, owner.waiting_tokens) == (0, 0))
