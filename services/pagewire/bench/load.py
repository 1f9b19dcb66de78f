"""A client that costs little: streams completions over raw connections and notes when bytes come.

It parses no event; it counts them, so that on a small machine the measured server and not the
client is the limit. Figures that need the number of tokens take it from the usage in the last
event.
"""

import asyncio
import json
import re
import time
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

EVENT, DONE = b"data: {", b"data: [DONE]"
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
TAIL = 4096


@dataclass
class Sample:
    """One request: moments in seconds on the monotonic clock, the first before connecting. `chunks`
    counts events, `gaps` the pauses between arrivals."""

    began: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    chunks: int = 0
    error: str = ""
    gaps: list[float] = field(default_factory=list)


class _Stream(asyncio.Protocol):
    """Sends one request and counts the events of its answer until the server closes."""

    def __init__(self, request: bytes, ended: "asyncio.Future[None]") -> None:
        self.sample = Sample(began=time.monotonic())
        self._request = request
        self._ended = ended
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        sample = self.sample
        text = self._tail[-len(EVENT) + 1 :] + data
        events = text.count(EVENT)
        if events:
            if sample.first:
                sample.gaps.append(now - sample.last)
            else:
                sample.first = now
            sample.last = now
            sample.chunks += events
        self._tail = (self._tail + data)[-TAIL:]

    def connection_lost(self, exc: Exception | None) -> None:
        counts = USAGE.findall(self._tail)
        self.sample.tokens = int(counts[-1]) if counts else 0
        if DONE not in self._tail:
            line = self._tail.rpartition(b"\r\n\r\n")[2].decode(errors="replace")
            self.sample.error = f"the answer broke off: {line[:200]}"
        if not self._ended.done():
            self._ended.set_result(None)


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    path: str = "/v1/completions"
    key: str = ""

    @classmethod
    def of(cls, url: str, key: str = "") -> "Target":
        """Raises ValueError for anything but http://host:port."""
        wrong = ValueError(f"{url}: an address like http://localhost:8000 is needed")
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
            host = parts.hostname
            port = parts.port or 80
        except ValueError:
            raise wrong from None
        if parts.scheme != "http" or not host:
            raise wrong
        return cls(
            host,
            port,
            parts.path.rstrip("/").removesuffix("/v1") + "/v1/completions",
            key,
        )

    def request(self, body: dict[str, Any]) -> bytes:
        content = json.dumps(
            {**body, "stream": True, "stream_options": {"include_usage": True}}
        ).encode()
        lines = [
            f"POST {self.path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            "Connection: close",
        ]
        lines += [
            f"Content-Length: {len(content)}",
            *([f"Authorization: Bearer {self.key}"] if self.key else []),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


async def send(target: Target, body: dict[str, Any]) -> Sample:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    try:
        _, stream = await loop.create_connection(
            lambda: _Stream(target.request(body), ended), target.host, target.port
        )
    except OSError as error:
        return Sample(
            error=f"no connection to {target.host}:{target.port}: {error.strerror or error}"
        )
    await ended
    return stream.sample


async def send_all(
    target: Target, bodies: Iterable[dict[str, Any]], concurrency: int
) -> list[Sample]:
    """All requests, at most `concurrency` at a time."""
    waiting = iter(bodies)
    samples = list[Sample]()

    async def lane() -> None:
        for body in waiting:
            samples.append(await send(target, body))

    await asyncio.gather(*(lane() for _ in range(concurrency)))
    return samples


async def send_at(
    target: Target, bodies: Iterable[dict[str, Any]], moments: Iterable[float]
) -> list[Sample]:
    """Each request at its moment, in seconds from now, whether or not earlier ones have been
    answered."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def one(body: dict[str, Any], moment: float) -> Sample:
        await asyncio.sleep(began + moment - loop.time())
        return await send(target, body)

    return await asyncio.gather(
        *(one(body, moment) for body, moment in zip(bodies, moments, strict=True))
    )
