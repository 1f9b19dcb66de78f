"""Clients of the fake model, which check each token that they get, and note what went wrong and
when."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import aiohttp
from pagewire.worker.fake import chain

from .engine import VOCAB

END_S: Final = 60.0
"""How long the streams under way may take once no more faults come."""
REFUSED_WAIT_S: Final = 0.05
"""After an error, before a client asks again."""


@dataclass
class Trouble:
    """What one client met. Times are monotonic seconds."""

    at: float
    what: str
    """`lost`, `wrong`, `refused` where no answer began, or an HTTP status."""
    detail: str = ""


@dataclass
class Record:
    """What all clients met."""

    requests: int = 0
    tokens: int = 0
    troubles: list[Trouble] = field(default_factory=list[Trouble])
    gaps: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """(beginning, seconds) of silences on a stream, the wait for the first token included."""
    firsts: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """(time of the request, seconds to its first token), of requests that were answered."""

    def since(self, began: float, ended: float) -> list[Trouble]:
        """What was met in that time."""
        return [trouble for trouble in self.troubles if began <= trouble.at < ended]

    def answered_since(self, began: float) -> bool:
        """Whether a first token has come after that."""
        return any(at + wait > began for at, wait in self.firsts[-1:])

    def longest_gap(self, began: float, ended: float) -> float:
        """Seconds of the longest silence that reaches into that time."""
        return max(
            (length for at, length in self.gaps if at < ended and at + length > began),
            default=0.0,
        )


class Clients:
    """`count` clients, each with one stream after the other, of `shortest` to `longest` tokens."""

    def __init__(self, url: str, count: int, shortest: int = 50, longest: int = 500) -> None:
        self.record = Record()
        self.shortest = shortest
        self.longest = longest
        self.under_way = 0
        self.stopping = False
        self._url = url
        self._count = count
        self._make = random.Random()
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Clients":
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping = True
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            tasks = [asyncio.create_task(self._client(session)) for _ in range(self._count)]
            while not self.stopping:
                await asyncio.sleep(0.1)
            _, pending = await asyncio.wait(tasks, timeout=END_S)
            for task in pending:
                task.cancel()
                self._met("lost", "a stream never ended")
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self.stopping:
            prompt = [self._make.randrange(VOCAB) for _ in range(self._make.randrange(1, 200))]
            count = self._make.randrange(self.shortest, self.longest)
            tokens: list[int] = []
            self.record.requests += 1
            self.under_way += 1
            try:
                whole = await self._stream(session, prompt, count, tokens)
            except NotTaken as error:
                whole = self._met("refused", str(error))
            except (aiohttp.ClientError, ConnectionError) as error:
                whole = self._met("lost", f"{type(error).__name__}: {error}")
            finally:
                self.under_way -= 1
            expected = chain(prompt, count, VOCAB)
            if tokens != expected[: len(tokens)] or (whole and len(tokens) != count):
                self._met("wrong", f"{len(tokens)} tokens of {count}")
            self.record.tokens += len(tokens)
            if not whole:
                await asyncio.sleep(REFUSED_WAIT_S)

    async def _stream(
        self, session: aiohttp.ClientSession, prompt: list[int], count: int, tokens: list[int]
    ) -> bool:
        """Whether it came to its end; what it brings is added to `tokens`."""
        body = {"prompt": prompt, "max_tokens": count, "stream": True, "return_token_ids": True}
        began = last = time.monotonic()
        reason = ""
        try:
            answer = await session.post(f"{self._url}/v1/completions", json=body)
        except (aiohttp.ClientError, ConnectionError) as error:
            raise NotTaken(f"{type(error).__name__}: {error}") from None
        async with answer:
            if answer.status != 200:
                return self._met(str(answer.status), (await answer.text())[:200])
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return self._met("lost", str(event["error"])[:200])
                now = time.monotonic()
                for choice in event["choices"]:
                    if choice.get("token_ids") and not tokens:
                        self.record.firsts.append((began, now - began))
                    tokens += choice.get("token_ids") or []
                    reason = choice["finish_reason"] or reason
                if now - last > 0.1:
                    self.record.gaps.append((last, now - last))
                last = now
        return bool(reason) or self._met("lost", "the stream ended without a reason")

    def _met(self, what: str, detail: str) -> bool:
        """Note it. Returns False."""
        self.record.troubles.append(Trouble(time.monotonic(), what, detail))
        return False


class NotTaken(Exception):
    """The connection was refused, or broke before an answer began."""


def counted(troubles: Sequence[Trouble], what: str) -> int:
    """How many of these."""
    return sum(trouble.what == what for trouble in troubles)
