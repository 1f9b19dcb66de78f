"""The four acceptance rules and the next attempt, without sockets: each test breaks one rule and
would fail if the owner let it pass."""

import pytest
from pagewire.requests.counters import Counters
from pagewire.requests.errors import ErrorKind, RequestError
from pagewire.requests.owner import (
    BACKOFF_S,
    GRACE_S,
    MAX_INTERRUPTIONS,
    SUSPENSION_S,
    RequestOwner,
)
from pagewire.requests.request import Job
from pagewire_protocol.columns import pack, unpack
from pagewire_protocol.messages import Cancel, Deltas, Generate, Roster
from pagewire_protocol.sampling import Sampling, TextOptions
from pagewire_protocol.structs import NOT_AWAITED, End, Finish, Peer, Prompt, Role, Started

JOB = Job(Prompt(text="hi"), Sampling(seed=1, max_tokens=100), TextOptions())


class Sink:
    wants_tokens = False

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.end: object = None
        self.starts = 0

    def started(self, started) -> None:
        self.starts += 1

    def text(self, text) -> None:
        assert self.end is None
        self.pieces.append(text)

    def tokens(self, text, tokens, logprobs) -> None:
        self.pieces.append(f"{text}{tokens}{[entry.index for entry in logprobs]}")

    def finished(self, *end) -> None:
        assert self.end is None
        *self.end, self.reasoning_tokens = end
        self.end = tuple(self.end)

    def failed(self, error) -> None:
        assert self.end is None
        self.end = error


class Harness:
    """An owner whose messages are kept and whose clock is turned by hand."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, object]] = []
        self.now, self.full, self.counters = 1000.0, False, Counters()
        self.owner = RequestOwner("me", self._send, lambda: self.now, self.counters)
        self.roster(1, t1=True)
        self.sink = Sink()
        self.request = self.owner.submit(JOB, self.sink)

    def _send(self, inbox, message) -> bool:
        if not self.full:
            self.sent.append((inbox, message))
        return not self.full

    def roster(
        self,
        epoch: int,
        worker: bool = True,
        failures: int = 0,
        listed: bool = False,
        **tokenizers: bool,
    ) -> None:
        peers = [
            Peer(Role.TOKENIZER, name, name, int(name[1:]), ready)
            for name, ready in tokenizers.items()
        ]
        peers.append(Peer(Role.WORKER, "w", "w", 99, worker, failures=failures))
        if listed:
            peers.append(Peer(Role.FRONTEND, "f", "me", 5, True))
        self.owner.on_roster(Roster(epoch, tuple(peers), 100, 100, (), True, True))

    def wait(self, seconds: float) -> None:
        """Time passes, and the owner is called as often as it is."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.5)
            self.owner.tick()

    @property
    def last(self) -> Generate:
        return [m for _, m in self.sent if isinstance(m, Generate)][-1]

    def cancels(self) -> list[tuple[str, tuple]]:
        return [(inbox, m.requests) for inbox, m in self.sent if isinstance(m, Cancel)]

    def row(
        self,
        position: int,
        token: int,
        text: str,
        execution: int = 7,
        of: Generate | None = None,
        **change: int,
    ) -> None:
        of = of or self.last
        handle, attempt = change.get("handle", of.handle), change.get("attempt", of.attempt)
        columns = [
            pack("I", [handle]),
            pack("I", [attempt]),
            pack("Q", [execution]),
            pack("i", [position]),
            pack("i", [1]),
            pack("i", [token]),
        ]
        self.owner.on_deltas(Deltas(*columns, (text,)))

    def end(self, finish: Finish, of: Generate | None = None, **more: object) -> None:
        of = of or self.last
        self.owner.on_deltas(
            Deltas(*[b""] * 6, (), ended=(End(of.handle, of.attempt, finish, **more),))
        )

    @property
    def text(self) -> str:
        return "".join(self.sink.pieces)

    @property
    def out(self) -> list[int]:
        return self.request.out.tolist()


@pytest.fixture
def h() -> Harness:
    return Harness()


def test_rows_in_order_are_accepted(h: Harness) -> None:
    h.row(0, 5, "a")
    h.row(1, 6, "")
    h.row(2, 7, "bc")
    h.end(Finish.STOP, stop_reason=7)
    assert (h.text, h.out, h.sink.end) == ("abc", [5, 6, 7], ("stop", 7, 3))
    assert (
        len(h.owner) == 0 and h.counters.generation_tokens == 3 and h.counters.reasons["stop"] == 1
    )


def test_rule_1_a_dead_handle_is_nobodys(h: Harness) -> None:
    h.row(0, 5, "a", handle=h.last.handle + 1)
    assert h.out == []
    h.end(Finish.STOP)
    h.row(0, 5, "late")
    h.end(Finish.STOP)
    assert h.text == "" and h.sink.end == ("stop", None, 0)


def test_rule_2_another_attempt_is_dropped(h: Harness) -> None:
    h.row(0, 5, "a", attempt=2)
    h.end(
        Finish.STOP,
        of=Generate(b"0" * 16, 9, h.last.handle, "me", JOB.prompt, b"", JOB.sampling, JOB.text),
    )
    assert (h.out, h.sink.end) == ([], None)


def test_rows_of_a_former_attempt_are_dropped(h: Harness) -> None:
    first = h.last
    h.row(0, 5, "a")
    h.end(Finish.LOST)
    h.row(1, 66, "STALE", of=first)
    h.end(Finish.STOP, of=first)
    h.row(1, 6, "b", execution=8)
    assert (h.text, h.out, h.sink.end) == ("ab", [5, 6], None)


def test_rule_3_only_the_first_execution_of_an_attempt_counts(h: Harness) -> None:
    h.row(0, 5, "a", execution=7)
    h.row(1, 66, "SPLICE", execution=8)
    h.row(1, 6, "b", execution=7)
    assert (h.text, h.out) == ("ab", [5, 6])
    assert len(h.sent) == 1


def test_rule_4_a_repetition_is_dropped(h: Harness) -> None:
    h.row(0, 5, "a")
    h.row(0, 5, "a")
    h.row(1, 6, "b")
    h.row(0, 5, "a")
    assert (h.text, h.out, len(h.sent)) == ("ab", [5, 6], 1)


def test_rule_4_a_gap_leads_to_the_next_attempt(h: Harness) -> None:
    first = h.last
    h.row(0, 5, "a")
    h.row(2, 7, "c")
    assert (h.text, h.out) == ("a", [5])
    again = h.last
    assert (again.rid, again.attempt) == (first.rid, 2) and again.handle != first.handle
    assert (
        unpack("i", again.output).tolist() == [5]
        and again.sampling == first.sampling
        and again.prompt == first.prompt
    )
    h.row(1, 6, "b", execution=9)
    assert h.text == "ab"


def test_rules_hold_for_rows_of_several_tokens(h: Harness) -> None:
    def rows(positions, counts, tokens, texts) -> None:
        n, last = len(positions), h.last
        columns = [
            pack("I", [last.handle] * n),
            pack("I", [last.attempt] * n),
            pack("Q", [7] * n),
            pack("i", positions),
            pack("i", counts),
        ]
        h.owner.on_deltas(Deltas(*columns, pack("i", tokens), tuple(texts)))

    rows([0, 3], [3, 1], [1, 2, 3, 4], ["abc", "d"])
    rows([1, 4], [2, 2], [2, 3, 5, 6], ["REPEAT", "ef"])
    rows([6], [0], [], ["held back"])
    assert (h.text, h.out) == ("abcdefheld back", [1, 2, 3, 4, 5, 6])
    rows([8], [1], [9], ["gap"])
    assert h.last.attempt == 2 and unpack("i", h.last.output).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("broken", range(7))
def test_columns_that_do_not_fit_change_nothing(h: Harness, broken: int) -> None:
    last = h.last
    columns = [
        pack("I", [last.handle]),
        pack("I", [last.attempt]),
        pack("Q", [7]),
        pack("i", [0]),
        pack("i", [1]),
        pack("i", [5]),
        ("a",),
    ]
    columns[broken] = columns[broken] * 2
    with pytest.raises((ValueError, TypeError)):
        h.owner.on_deltas(Deltas(*columns))
    with pytest.raises((ValueError, TypeError)):
        h.owner.on_deltas(Deltas(b"123", *columns[1:]))
    assert h.out == [] and h.text == ""


def test_lost_resubmits_with_the_output_so_far(h: Harness) -> None:
    h.row(0, 5, "a")
    h.end(Finish.LOST)
    assert (
        unpack("i", h.last.output).tolist() == [5]
        and h.last.attempt == 2
        and h.counters.resubmissions == 1
    )


def test_too_many_losses_fail_the_request(h: Harness) -> None:
    for _ in range(MAX_INTERRUPTIONS + 1):
        h.end(Finish.LOST)
        h.now += 10
        h.owner.tick()
    assert isinstance(h.sink.end, RequestError) and h.sink.end.kind is ErrorKind.FAILED
    assert len(h.owner) == 0 and h.last.attempt == MAX_INTERRUPTIONS + 1


def test_a_new_scheduler_means_a_next_attempt_that_does_not_count_against_it(h: Harness) -> None:
    h.row(0, 5, "a")
    for epoch in range(2, 2 * MAX_INTERRUPTIONS):
        h.roster(epoch, t1=True)
        assert h.last.attempt == epoch
    assert h.sink.end is None
    h.roster(3, t1=True)
    assert h.last.attempt == 2 * MAX_INTERRUPTIONS - 1, "an older epoch is ignored"


def test_a_vanished_tokenizer_hands_its_requests_to_another(h: Harness) -> None:
    h.roster(1, t1=True, t2=True)
    assert len(h.sent) == 1
    h.roster(1, t2=True)
    inbox, message = h.sent[-1]
    assert inbox == "t2" and message.attempt == 2 and h.cancels() == []


def test_a_tokenizer_that_is_listed_but_not_ready_keeps_its_requests(h: Harness) -> None:
    h.roster(1, t1=False, t2=True)
    assert len(h.sent) == 1 and h.sent[0][0] == "t1"


def test_the_old_tokenizer_hears_when_a_request_moves_on(h: Harness) -> None:
    h.roster(1, t1=True, t2=True)
    h.owner.submit(JOB, Sink())
    h.owner.submit(JOB, Sink())
    h.owner.submit(JOB, Sink())
    assert [inbox for inbox, _ in h.sent] == ["t1", "t2", "t1", "t2"]
    h.owner.on_deltas(
        Deltas(
            *[b""] * 6,
            (),
            ended=(End(1, 1, Finish.STOP), End(3, 1, Finish.STOP), End(0, 1, Finish.LOST)),
        )
    )
    assert h.sent[-2][0] == "t2" and h.sent[-1] == ("t1", Cancel(((h.request.rid, 1),)))


def test_interrupted_requests_wait_for_a_stack(h: Harness) -> None:
    h.roster(2, worker=False, t5=True)
    assert len(h.sent) == 1 and len(h.owner.suspended) == 1
    h.now += SUSPENSION_S / 2
    h.roster(2, t5=True)
    assert h.sent[-1][0] == "t5" and h.last.attempt == 2 and not h.owner.suspended


def test_waiting_has_an_end(h: Harness) -> None:
    h.roster(2)
    h.wait(SUSPENSION_S + 1)
    assert isinstance(h.sink.end, RequestError) and len(h.owner) == 0
    assert h.sink.end.kind is ErrorKind.UNAVAILABLE


def test_a_full_queue_suspends_the_next_attempt_and_refuses_a_first(h: Harness) -> None:
    h.full = True
    h.end(Finish.LOST)
    assert len(h.owner.suspended) == 1
    with pytest.raises(RequestError) as error:
        h.owner.submit(JOB, Sink())
    assert error.value.kind is ErrorKind.UNAVAILABLE
    h.full = False
    h.owner.tick()
    assert h.last.attempt == 2


def test_a_resubmission_that_meets_a_full_queue_tries_again(h: Harness) -> None:
    h.end(Finish.LOST)
    h.end(Finish.REFUSED, status=429)
    h.now += 5
    h.owner.tick()
    assert h.last.attempt == 3 and h.sink.end is None


@pytest.mark.parametrize(
    ("end", "kind", "text"),
    [
        (
            {
                "finish": Finish.REFUSED,
                "status": 400,
                "message": "too long: 9 > 8",
                "param": "prompt",
            },
            ErrorKind.INVALID,
            "too long: 9 > 8",
        ),
        (
            {"finish": Finish.REFUSED, "status": 429, "message": "full"},
            ErrorKind.OVERLOADED,
            "full",
        ),
        (
            {
                "finish": Finish.FAILED,
                "status": 500,
                "message": "boom at 0x7f00aa11 in /usr/lib/x.py",
            },
            ErrorKind.FAILED,
            "could not finish",
        ),
        ({"finish": Finish.CANCELLED}, ErrorKind.UNAVAILABLE, "cancelled"),
    ],
)
def test_ends_without_a_generation(h: Harness, end: dict, kind: ErrorKind, text: str) -> None:
    h.wait(GRACE_S + 1)
    h.end(**end)
    assert (
        isinstance(h.sink.end, RequestError)
        and h.sink.end.kind is kind
        and text in h.sink.end.message
    )
    assert "/" not in h.sink.end.message and (
        kind is not ErrorKind.OVERLOADED or h.sink.end.retry_after_s >= 1
    )


def test_a_request_that_nobody_takes_is_tried_again_and_refused_in_the_end(h: Harness) -> None:
    """However long the first refusal took, as where the tokenizer was stopped meanwhile."""
    h.wait(GRACE_S + 1)
    for attempt in range(1, MAX_INTERRUPTIONS + 2):
        assert h.sink.end is None and h.last.attempt == attempt
        h.end(finish=Finish.REFUSED, status=503, message="/run/x.sock")
        h.wait(BACKOFF_S[-1])
        h.owner.tick()
    h.end(finish=Finish.REFUSED, status=503, message="/run/x.sock")
    assert isinstance(h.sink.end, RequestError)
    assert h.sink.end.kind is ErrorKind.UNAVAILABLE and "cannot take" in h.sink.end.message
    assert "/" not in h.sink.end.message and len(h.owner) == 0


def test_cancel_reaches_the_tokenizer_once(h: Harness) -> None:
    h.owner.cancel(h.request)
    h.owner.cancel(h.request)
    assert h.cancels() == [("t1", ((h.request.rid, 1),))] and len(h.owner) == 0
    h.row(0, 5, "a")
    assert h.text == "" and h.counters.reasons["abort"] == 1


def test_cancel_of_a_suspended_request_cancels_its_last_attempt(h: Harness) -> None:
    h.full = True
    h.end(Finish.LOST)
    h.full = False
    h.owner.cancel(h.request)
    h.owner.tick()
    assert (
        h.cancels() == [("t1", ((h.request.rid, 1),))] and len(h.owner) == 0 and h.last.attempt == 1
    )


def test_usage_comes_from_the_first_start(h: Harness) -> None:
    last = h.last
    for prompt_tokens in (11, 12):
        h.owner.on_deltas(
            Deltas(*[b""] * 6, (), started=(Started(last.handle, 1, prompt_tokens, 4),))
        )
    h.owner.on_deltas(Deltas(*[b""] * 6, (), started=(Started(last.handle, 2, 99, 4),)))
    assert (h.counters.prompt_tokens, h.counters.cached_tokens, h.sink.starts) == (11, 4, 2)


class BrokenSink(Sink):
    def text(self, text) -> None:
        raise RuntimeError("a fault of the program")


def test_a_sink_that_raises_ends_its_own_request_alone(caplog) -> None:
    """The other requests of the same message get theirs."""
    h = Harness()
    broken = BrokenSink()
    other = h.owner.submit(JOB, broken)
    handles = [other.handle, h.request.handle]
    columns = [
        pack("I", handles),
        pack("I", [1, 1]),
        pack("Q", [5, 6]),
        pack("i", [0, 0]),
        pack("i", [1, 1]),
        pack("i", [7, 8]),
    ]
    deltas = Deltas(*columns, ("x", "y"))
    h.owner.on_deltas(deltas)
    assert h.sink.pieces == ["y"] and isinstance(broken.end, RequestError)
    assert "a fault of the program" in caplog.text
    assert (("t1", Cancel(((other.rid, 1),)))) in h.sent and len(h.owner) == 1


def test_an_owner_that_was_given_up_sends_everything_again(h: Harness) -> None:
    """As after a pause: the scheduler dropped this process, and the tokenizers its requests."""
    h.row(0, 5, "a")
    h.roster(1, listed=True, t1=True)
    h.roster(1, listed=True, t1=True)
    assert h.last.attempt == 1
    h.roster(1, t1=True)
    assert h.last.attempt == 2 and unpack("i", h.last.output).tolist() == [5]
    h.roster(1, t1=True)
    assert h.last.attempt == 2, "the next roster may still not list it"
    h.roster(1, listed=True, t1=True)
    assert h.last.attempt == 2 and h.request.interruptions == 0


def test_a_request_at_which_three_workers_die_is_poisoned(h: Harness) -> None:
    h.row(0, 5, "a")
    for deaths in (1, 2):
        h.end(Finish.LOST, worker_died=True)
        h.now += 1
        h.owner.tick()
        assert h.last.worker_deaths == deaths
    h.end(Finish.LOST, worker_died=True)
    error = h.sink.end
    assert isinstance(error, RequestError)
    assert (error.kind, error.type) == (ErrorKind.FAILED, "request_poisoned")
    assert len(h.owner) == 0


def test_a_request_that_gets_further_between_two_deaths_is_not_what_causes_them(h: Harness) -> None:
    for position in range(2 * MAX_INTERRUPTIONS):
        h.row(position, 5, "a", execution=position)
        h.end(Finish.LOST, worker_died=True)
        h.now += 1
        h.owner.tick()
        assert h.sink.end is None and h.last.worker_deaths == 1


def test_deaths_that_it_had_no_part_in_do_not_count(h: Harness) -> None:
    for _ in range(5):
        h.end(Finish.LOST)
        h.now += 1
        h.owner.tick()
    assert h.last.worker_deaths == 0 and h.sink.end is None


def test_new_requests_wait_for_what_is_being_started_again(h: Harness) -> None:
    h.now += 100
    h.roster(1, worker=False, failures=1, t1=True)
    sink = Sink()
    h.now += 30
    assert h.owner.can_hold
    held = h.owner.submit(JOB, sink)
    assert h.last.rid != held.rid and len(h.owner.suspended) == 1
    h.roster(1, t1=True)
    assert h.last.rid == held.rid and h.last.attempt == 1 and not h.owner.can_hold


def test_a_held_request_can_be_cancelled_and_ends_when_nobody_comes(h: Harness) -> None:
    h.roster(1, worker=False, failures=1, t1=True)
    cancelled, kept = Sink(), Sink()
    h.owner.cancel(h.owner.submit(JOB, cancelled))
    h.owner.submit(JOB, kept)
    h.wait(SUSPENSION_S + 1)
    assert cancelled.end is None and h.cancels() == []
    assert isinstance(kept.end, RequestError) and kept.end.kind is ErrorKind.UNAVAILABLE


def test_nobody_waits_for_a_first_start_or_for_what_keeps_failing(h: Harness) -> None:
    h.roster(1, worker=False, failures=NOT_AWAITED, t1=True)
    h.now += GRACE_S + 1
    assert not h.owner.can_hold
    with pytest.raises(RequestError):
        h.owner.submit(JOB, Sink())
    fresh = RequestOwner("me", lambda *_: True, lambda: 0.0, Counters())
    assert not fresh.can_hold


def test_each_new_scheduler_has_time_to_hear_of_the_others(h: Harness) -> None:
    """One after the other ends before it has heard of all: to a request each is the first."""
    h.roster(2, worker=False)
    h.wait(GRACE_S - 1)
    h.roster(3, worker=False)
    h.wait(GRACE_S - 1)
    sink = Sink()
    h.owner.submit(JOB, sink)
    h.roster(3, t1=True)
    assert h.last.attempt == 1 and sink.end is None
    # the same scheduler's next roster is no news
    h.roster(3, worker=False)
    h.wait(GRACE_S - 1)
    h.roster(3, worker=False)
    h.wait(GRACE_S - 1)
    with pytest.raises(RequestError):
        h.owner.submit(JOB, Sink())


def test_a_pause_of_the_owner_s_process_counts_for_no_deadline(h: Harness) -> None:
    """The refusal came while it stood still, and is read when it goes on."""
    h.roster(1, worker=False, t1=True)
    sink, waiting = Sink(), Sink()
    h.owner.submit(JOB, waiting)
    h.roster(1, t1=True)
    h.owner.submit(JOB, sink)
    refused = h.last
    h.roster(1, worker=False, t1=True)
    h.now += 2 * SUSPENSION_S
    h.end(Finish.REFUSED, refused, status=503)
    h.owner.tick()
    assert sink.end is None and waiting.end is None
    h.roster(1, t1=True)
    h.wait(1)
    assert h.last.attempt == 2
    h.roster(1, worker=False, t1=True)
    h.wait(GRACE_S + 1)
    with pytest.raises(RequestError):
        h.owner.submit(JOB, Sink())


def test_a_first_attempt_that_meets_a_service_which_has_just_started_is_tried_again(
    h: Harness,
) -> None:
    h.roster(1, worker=False, failures=1, t1=True)
    sink = Sink()
    h.owner.submit(JOB, sink)
    h.roster(1, t1=True)
    h.end(Finish.REFUSED, status=503)
    assert sink.end is None
    h.now += 1
    h.owner.tick()
    assert h.last.attempt == 2
