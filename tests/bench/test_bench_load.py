"""The client: what it makes of the bytes of an answer, however they are cut."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from pagewire.bench.load import Target, send, send_all, send_at

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
EVENT = b'data: {"id": "x", "choices": [{"text": "a"}]}\n\n'
USAGE = (
    b'data: {"id": "x", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n'
)
DONE = b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def server(*pieces: bytes) -> AsyncIterator[Target]:
    """Answers every request with these pieces, a moment apart, and closes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    running = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with running:
        yield Target("127.0.0.1", running.sockets[0].getsockname()[1])


async def test_an_answer_in_pieces() -> None:
    async with server(HEAD, EVENT, EVENT[:3], EVENT[3:], USAGE + DONE) as target:
        sample = await send(target, {"prompt": "x"})
    assert (sample.tokens, sample.chunks, sample.error) == (3, 3, "")
    assert len(sample.gaps) == 2 and sample.began < sample.first < sample.last
    assert sum(sample.gaps) == pytest.approx(sample.last - sample.first)


@pytest.mark.parametrize(
    "pieces",
    [(HEAD, EVENT), (b"HTTP/1.1 503 Unavailable\r\n\r\n", b'{"error": "loading"}'), (HEAD,)],
)
async def test_an_answer_that_breaks_off(pieces: tuple[bytes, ...]) -> None:
    async with server(*pieces) as target:
        sample = await send(target, {"prompt": "x"})
    assert "broke off" in sample.error and sample.tokens == 0


async def test_nobody_there() -> None:
    async with server() as target:
        pass
    assert "no connection" in (await send(target, {})).error


async def test_at_most_so_many_at_a_time() -> None:
    running = most = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.01)
        writer.write(HEAD + EVENT + USAGE + DONE)
        running -= 1
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listening:
        target = Target("127.0.0.1", listening.sockets[0].getsockname()[1])
        samples = await send_all(target, [{}] * 10, 3)
    assert len(samples) == 10 and most == 3 and not [s.error for s in samples if s.error]


async def test_an_open_loop_waits_for_no_answer() -> None:
    async with server(HEAD, EVENT, USAGE + DONE) as target:
        samples = await send_at(target, [{}] * 3, [0.0, 0.05, 0.1])
    began = sorted(sample.began for sample in samples)
    assert began[2] - began[0] >= 0.09 and all(not sample.error for sample in samples)


@pytest.mark.parametrize("url", ["https://x", "ftp://x", "http://"])
def test_addresses_that_cannot_be_loaded(url: str) -> None:
    with pytest.raises(ValueError, match="an address like"):
        Target.of(url)


def test_addresses() -> None:
    assert (
        Target.of("localhost:8000/v1")
        == Target.of("http://localhost:8000")
        == Target("localhost", 8000)
    )
