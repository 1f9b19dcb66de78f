"""What costs far more to serve than to send: read in processes of their own, shown a few milliseconds
at a time."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from api.checks import refused
from pagewire.config import FrontendConfig
from pagewire.frontend import body_readers, turns
from pagewire.frontend.body_readers import BodyReaders, is_light
from pagewire.frontend.errors import ApiError, as_api_error
from pagewire.frontend.logprobs import FEW_CANDIDATES, PromptScore
from pagewire.frontend.reading import Served, read
from pagewire.frontend.turns import Turn
from pagewire.requests.errors import RequestError
from pagewire.requests.model_facts import ModelFacts
from pagewire_protocol.columns import pack
from pagewire_protocol.structs import PromptLogprobs

SERVED = Served(ModelFacts(max_model_len=4096, vocab_size=1000, longest_token=30), ("m",))
TOKENS = list(range(1000)) * 4
BODIES: tuple[tuple[Any, dict[str, Any]], ...] = (
    ("completion", {"prompt": "hi", "n": 3, "seed": 5, "stop": ["a"], "logit_bias": {"7": 2}}),
    ("completion", {"prompt": [TOKENS, TOKENS[:7]], "use_beam_search": True, "best_of": 4}),
    ("completion", {"prompt": TOKENS, "prompt_logprobs": 2, "allowed_token_ids": TOKENS}),
    ("completion", {"prompt": "hi", "model": "other"}),
    ("completion", {"prompt": "hi", "what": 1}),
    ("completion", {"prompt": "x" * 200_000}),
    ("completion", {"prompt": [1001]}),
    (
        "chat",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}] * 500,
            "stream": True,
            "chat_template_kwargs": {"a": [1]},
            "request_id": "mine",
        },
    ),
    ("chat", {"messages": []}),
    ("tokenize", {"prompt": "hi", "return_token_strs": True}),
    ("tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
    ("detokenize", {"tokens": TOKENS}),
    ("detokenize", {"tokens": [-1]}),
    ("detokenize", {"tokens": [1] * 300_000}),
)


def read_here(body_type: Any, body: bytes) -> Any:
    try:
        return read(body_type, body, SERVED)
    except (ApiError, RequestError) as error:
        return as_api_error(error).body()


@contextlib.asynccontextmanager
async def readers() -> AsyncIterator[BodyReaders]:
    made = BodyReaders()
    try:
        yield made
    finally:
        made.close()
        while made._processes:
            await asyncio.sleep(0.01)


async def test_a_body_says_the_same_in_whichever_process_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body_readers, "is_light", lambda body: False)
    async with readers() as made:
        for body_type, fields in BODIES:
            body = json.dumps(fields).encode()
            try:
                plan = await made.read(body_type, [body[:9], body[9:]], SERVED)
            except ApiError as error:
                plan = error.body()
            assert plan == read_here(body_type, body), fields
        assert len(made._processes) == 1, "one process reads one after the other"


def test_most_bodies_are_light() -> None:
    for fields in (
        {"prompt": "hi"},
        {"prompt": list(range(30_000))},
        {"messages": [{"role": "user", "content": 'It\'s a "test", really. ' * 20}] * 40},
    ):
        assert is_light(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "piece", [b'"k%d":null', b'{"type":"text","text":""}', b'"%d":1', b'"a"', b"[]", b"7", b"{}"]
)
def test_no_body_of_nothing_but_values_is_light(piece: bytes) -> None:
    assert not is_light(b",".join([piece] * (body_readers.LIGHT_BYTES // (len(piece) + 1))))


async def test_what_a_large_body_took_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_readers, "LARGE_BYTES", 300_000)
    monkeypatch.setattr(body_readers, "IDLE_S", 0.1)
    async with readers() as made:
        for size in (290_000, 400_000):
            body = json.dumps({"tokens": [1] * (size // 3)}).encode()
            await made.read("detokenize", [body], SERVED)
            while made._processes:
                await asyncio.sleep(0.01)
            assert not made._idle


async def test_a_process_that_dies_or_takes_too_long_costs_its_own_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heavy = [b'{"tokens":[' + b"1," * 200_000 + b"1]}"]
    async with readers() as made:
        await made.read("detokenize", list(heavy), SERVED)
        (process,) = made._idle
        os.kill(process._process.pid, signal.SIGSTOP)
        monkeypatch.setattr(body_readers, "READ_S", 0.2)
        with pytest.raises(ApiError, match="takes longer than") as late:
            await made.read("detokenize", list(heavy), SERVED)
        assert late.value.status == 413
        monkeypatch.setattr(body_readers, "READ_S", 20.0)
        await made.read("detokenize", list(heavy), SERVED)
        (process,) = made._idle
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(ApiError, match="too much memory"):
            await made.read("detokenize", list(heavy), SERVED)
        assert await made.read("detokenize", list(heavy), SERVED)


async def test_the_largest_bodies_leave_a_process_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body_readers, "LARGE_BYTES", 500_000)
    large = [b'{"tokens":[' + b"1," * 300_000 + b"1]}"]
    heavy = [b'{"tokens":[' + b"1," * 200_000 + b"1]}"]
    async with readers() as made:
        many = [
            asyncio.ensure_future(made.read("detokenize", list(large), SERVED)) for _ in range(6)
        ]
        await asyncio.sleep(0)
        await made.read("detokenize", list(heavy), SERVED)
        assert sum(not task.done() for task in many) >= 4
        await asyncio.wait(many)


def test_a_heavy_body_is_not_read_on_the_event_loop(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("read on the event loop")

    with serve(config=FrontendConfig(max_body_mb=8)) as server:
        monkeypatch.setattr(body_readers, "read", never)
        keys = {f"k{i}": None for i in range(20_000)}
        assert server.complete("hi", **keys).status_code == 200
        refused(server.complete("hi", **keys, what=1), "what", "not supported")
        refused(server.complete("hi", logit_bias={str(i): 1 for i in range(20_000)}), "logit_bias")
        assert server.complete([7] * 100, stop_token_ids=[5]).status_code == 500, "a light one is"


def test_a_client_that_leaves_ends_the_reading(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(config=FrontendConfig(max_body_mb=32)) as server:
        made = server.frontend.service.state.body_readers
        body = b'{"tokens":[' + b"1," * 5_000_000 + b"1]}"
        head = f"POST /detokenize HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.frontend.port)) as client:
            client.sendall(head.encode() + body)
            server.settle(lambda: bool(made._processes))
            (process,) = made._processes
        server.settle(lambda: process._process.poll() is not None)
        server.settle(lambda: not made._processes)


# --- answers


class Clock:
    """Goes forward by a tenth of a turn each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += turns.TURN_S / 10
        return self.now


def scored(tokens: int, candidates: int) -> PromptLogprobs:
    return PromptLogprobs(
        None,
        1,
        pack("i", [candidates] * tokens),
        pack("i", [1] * tokens),
        pack("i", [7] * tokens * candidates),
        pack("f", [-1.0] * tokens * candidates),
        texts=(b"x",) * tokens * candidates,
    )


async def test_a_long_prompt_s_scores_are_encoded_in_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "time", Clock())
    score = PromptScore("a", -1, 20, False)
    score.add(scored(2000, 21))
    assert not score.is_encoded and len(score.rows) == 1
    others = 0

    async def other() -> None:
        nonlocal others
        while True:
            others += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(other())
    await score.encode(Turn())
    task.cancel()
    assert score.is_encoded and len(score.rows) == 2001
    assert others >= 4, "about ten runs a turn"


def test_a_short_prompt_s_scores_are_encoded_at_once() -> None:
    score = PromptScore("a", 1, 2, False)
    score.add(scored(FEW_CANDIDATES // 4, 3))
    assert score.is_encoded and len(score.rows) == FEW_CANDIDATES // 4 + 1


def test_a_long_echo_streams_its_scores_before_its_text(server) -> None:
    words = " ".join(f"w{i}" for i in range(600))
    events = server.events("/v1/completions", prompt=words, echo=True, logprobs=2, max_tokens=4)
    texts = [choice["text"] for event in events for choice in event["choices"]]
    assert texts[0] == words and len(texts) > 1
    first = events[0]["choices"][0]["logprobs"]
    assert len(first["tokens"]) == len(first["top_logprobs"]) == 600
    whole = server.complete(words, echo=True, logprobs=2, max_tokens=4).json()["choices"][0]
    assert whole["text"] == "".join(texts)
    assert whole["logprobs"]["top_logprobs"][:600] == first["top_logprobs"]


def test_many_choices_are_submitted_in_turns(server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of them the event loop answers others."""
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.append(server.complete("hi", n=128, max_tokens=1).status_code)
    )
    thread.start()
    thread.join(20)
    assert answers == [200]
    assert clock.now > 128 * turns.TURN_S / 10


def test_so_much_of_large_bodies_is_held_at_a_time(serve) -> None:
    fixed = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (4 << 20)
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    most = b" " * (3 << 20)
    with serve(config=FrontendConfig(max_body_mb=4)) as server, contextlib.ExitStack() as open_ones:
        held = server.frontend.service.state.large_bodies
        held.limit = 5 << 20

        def connect(sent: bytes) -> socket.socket:
            client = socket.create_connection(("127.0.0.1", server.frontend.port), 10)
            client.sendall(sent)
            return client

        for sent in (fixed + most, chunked + b"%x\r\n" % len(most) + most):
            open_ones.enter_context(connect(sent))
        server.settle(lambda: held.held == 4 << 20)
        with connect(fixed + most) as late:
            assert late.recv(4096).startswith(b"HTTP/1.1 429")
        for _ in range(20):  # small ones pass, however they are sent
            open_ones.enter_context(connect(chunked + b"1\r\n{"))
        assert server.complete("hi").status_code == 200
        open_ones.close()
        server.settle(lambda: held.held == 0)
