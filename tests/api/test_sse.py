"""The way of events to a socket, with a transport and a clock turned by hand."""

import json

import pytest
from pagewire.frontend import sse
from pagewire.frontend.logprobs import completion_logprobs
from pagewire_protocol.structs import TokenLogprobs


class Transport:
    def __init__(self) -> None:
        self.written, self.waiting, self.closing, self.aborted = [], 0, False, False

    def write(self, data: bytes) -> None:
        assert not self.closing
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.aborted = True


class Loop:
    def __init__(self) -> None:
        self.now, self.timers = 100.0, []

    def time(self) -> float:
        return self.now

    def call_later(self, delay, call):
        self.timers.append((self.now + delay, call))
        return self

    def cancel(self) -> None:
        self.timers.clear()


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def flusher(loop: Loop) -> sse.Flusher:
    return sse.Flusher(loop)


def attached(flusher: sse.Flusher, chunked: bool = True) -> tuple[sse.Outlet, Transport]:
    outlet, transport = sse.Outlet(flusher), Transport()
    outlet.attach(transport, chunked)
    return outlet, transport


@pytest.mark.parametrize("text", ["", "plain", '"quoted"\\', "\n\u2028\x00", "世界🦙"])
def test_a_template_makes_the_event_that_encoding_would(text: str) -> None:
    def body(said: str) -> dict:
        return {"id": "x", "choices": [{"text": said, "n": 1}], "model": "text"}

    head, tail = sse.template(body(sse.HOLE))
    made = head + sse.encode(text) + tail
    assert (
        made == sse.event(body(text))
        and json.loads(made[6:-2]) == body(text)
        and made.count(b"\n") == 2
    )


def test_events_of_one_round_leave_in_one_write(flusher: sse.Flusher) -> None:
    outlet, transport = attached(flusher)
    outlet.push(b"one", b"two")
    outlet.push(b"three")
    assert transport.written == []
    flusher.soon()
    flusher.soon()
    assert transport.written == [b"b\r\nonetwothree\r\n"]


def test_events_wait_for_the_transport_and_stay_in_order(flusher: sse.Flusher) -> None:
    outlet, transport = sse.Outlet(flusher), Transport()
    outlet.push(b"one")
    flusher.flush()
    outlet.push(b"two")
    outlet.attach(transport, False)
    assert transport.written == [b"onetwo"]


def test_rounds_are_spaced_by_the_number_of_clients(flusher: sse.Flusher, loop: Loop) -> None:
    many = [attached(flusher) for _ in range(256)]

    def send() -> None:
        for outlet, _ in many:
            outlet.push(b"x")
        flusher.soon()

    send()
    loop.now += 0.001
    send()
    send()
    assert {len(transport.written) for _, transport in many} == {1}
    ((at, fire),) = loop.timers
    assert at == pytest.approx(100.0 + 256 * sse.SPACING_S)
    fire()
    assert {transport.written[-1] for _, transport in many} == {b"2\r\nxx\r\n"}
    few = many[0][0]
    few.push(b"y")
    flusher.soon()
    assert not loop.timers and many[0][1].written[-1] == b"1\r\ny\r\n"


def test_nothing_is_written_to_a_closing_transport(flusher: sse.Flusher) -> None:
    outlet, transport = attached(flusher)
    transport.closing = True
    outlet.push(b"x")
    flusher.soon()
    assert outlet.pieces == []


def test_a_client_that_does_not_read_is_cut_off(flusher: sse.Flusher, loop: Loop) -> None:
    _, transport = attached(flusher)
    transport.waiting = sse.FULL
    flusher.check()
    loop.now += sse.NOT_READING_S - 1
    flusher.check()
    assert not transport.aborted
    transport.waiting = 0
    flusher.check()
    transport.waiting = sse.FULL
    loop.now += 2
    flusher.check()
    assert not transport.aborted, "it has read in between"
    loop.now += sse.NOT_READING_S + 1
    flusher.check()
    assert transport.aborted


def test_an_overfull_buffer_is_cut_off_at_once(flusher: sse.Flusher) -> None:
    outlet, transport = attached(flusher)
    transport.waiting = sse.OVERFULL + 1
    flusher.check()
    assert transport.aborted
    outlet.detach()
    assert not flusher.attached


def test_a_token_without_text_is_called_by_its_id() -> None:
    entry = TokenLogprobs(
        row=0, index=0, rank=1, ids=(7, 8), values=(-0.5, float("-inf")), texts=(b"", b"")
    )
    shown = json.loads(sse.encode(completion_logprobs([entry], 5)))
    assert shown["tokens"] == ["token_id:7"] and shown["top_logprobs"] == [
        {"token_id:7": -0.5, "token_id:8": -9999.0}
    ]
    assert shown["text_offset"] == [5]


def test_only_silent_streams_are_pinged(loop: Loop) -> None:
    flusher = sse.Flusher(loop, keep_alive_s=15)
    (talker, said), (_, heard) = attached(flusher), attached(flusher)
    for _ in range(400):
        loop.now += 0.1
        if loop.now < 120:
            talker.push(b"x")
        flusher.check()
        flusher.flush()
    pings = [b"8\r\n: ping\n\n\r\n"]
    assert heard.written == pings * 2
    assert (
        said.written[-1:] == pings and said.written.count(pings[0]) == 1 and len(said.written) > 100
    )
