"""Clients of the scripts in this folder: one connection a request, so cheap that what is measured is
the stack and not they."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

HEAD_LIMIT = 1 << 16


@dataclass
class Answer:
    """What came of one request."""

    status: int = 0
    """0: the connection broke before an answer began."""
    status_s: float = 0.0
    """Seconds from before the connection was made until the status came."""
    tokens: list[int] = field(default_factory=list[int])
    reason: str = ""
    """As the server said it; empty: the stream broke."""
    arrivals: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """(monotonic seconds, tokens) of each event with tokens."""

    @property
    def gaps(self) -> list[float]:
        """Seconds between two events with tokens."""
        times = [at for at, _ in self.arrivals]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def tokens_until(self, end: float) -> int:
        """How many had come by then, in monotonic seconds."""
        return sum(count for at, count in self.arrivals if at < end)


def body_of(prompt: Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    """A streamed completion whose tokens come back as ids."""
    return {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "stream": True,
        "return_token_ids": True,
        **more,
    }


async def ask(
    url: str, body: dict[str, Any], leave_after: int = 0, path: str = "/completions"
) -> Answer:
    """Send one request to the API at `url` and read what comes. leave_after: the connection is
    closed once so many tokens are there; 0: never. A broken connection is no error here: `reason`
    stays empty."""
    answer = Answer()
    began = time.monotonic()
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await _request(url + path, body)
        answer.status = int((await reader.readline()).split()[1])
        answer.status_s = time.monotonic() - began
        while (await reader.readline()).strip():
            pass
        await _read_events(reader, answer, leave_after)
    except (OSError, IndexError, ValueError, asyncio.IncompleteReadError):
        pass
    finally:
        if writer is not None:
            writer.close()
    return answer


async def _request(
    url: str, body: dict[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """HTTP 1.0, whose answers end with the connection and have no chunks."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=HEAD_LIMIT)
    data = json.dumps(body).encode()
    head = f"POST {parts.path} HTTP/1.0\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    return reader, writer


async def _read_events(reader: asyncio.StreamReader, answer: Answer, leave_after: int) -> None:
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            answer.reason = "error"
            return
        tokens = event["choices"][0].get("token_ids") if event["choices"] else None
        if tokens:
            answer.tokens += tokens
            answer.arrivals.append((time.monotonic(), len(tokens)))
        for choice in event["choices"]:
            answer.reason = choice["finish_reason"] or answer.reason
        if leave_after and len(answer.tokens) >= leave_after:
            answer.reason = "left"
            return


async def until(what: Callable[[], Any], seconds: float, every_s: float = 0.2) -> bool:
    """Whether `what`, which may block, becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if await asyncio.to_thread(what):
            return True
        await asyncio.sleep(every_s)
    return False


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them are; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
