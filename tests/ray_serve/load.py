"""Clients that keep the application busy and check each token: the fake model's next token is a
hash of all tokens before it, whichever replica says it."""

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
from faults.clients import ask, body_of
from pagewire.worker.fake import chain
from ray_serve.conftest import STACK

VOCAB = STACK["fake_vocab_size"]
TOKENS = 40
Client = Callable[[list[int]], Awaitable[None]]


@dataclass
class Record:
    """What became of requests. A stream is cut where it broke after tokens had come."""

    whole: Counter[str] = field(default_factory=Counter[str])
    cut: int = 0
    failed: list[str] = field(default_factory=list[str])
    wrong: list[str] = field(default_factory=list[str])

    @property
    def count(self) -> int:
        return sum(self.whole.values()) + self.cut + len(self.failed) + len(self.wrong)


class Load:
    """A context in which clients ask one request after the other, streamed and not, in a thread."""

    def __init__(self, url: str, streams: int, others: int) -> None:
        self.record = Record()
        self._url = f"{url}/v1"
        self._clients = [self._stream] * streams + [self._ask_whole] * others
        self._is_over = False
        self._random = random.Random(5)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join(60)

    def wait(self, count: int, timeout_s: float = 90.0) -> None:
        """Until so many more requests have ended."""
        until = self.record.count + count
        end = time.monotonic() + timeout_s
        while self.record.count < until:
            assert time.monotonic() < end, self.record
            time.sleep(0.02)

    async def _run(self) -> None:
        await asyncio.gather(*(self._repeat(client) for client in self._clients))

    async def _repeat(self, client: Client) -> None:
        while not self._is_over:
            prompt = [self._random.randrange(VOCAB) for _ in range(20)]
            await client(prompt)

    async def _stream(self, prompt: list[int]) -> None:
        answer = await ask(self._url, body_of(prompt, TOKENS))
        if answer.status != 200 or (not answer.reason and not answer.tokens):
            self.record.failed.append(f"stream: status {answer.status}, {answer.reason}")
        elif answer.tokens != chain(prompt, len(answer.tokens), VOCAB):
            self.record.wrong.append(f"stream: {answer.tokens}")
        elif not answer.reason:
            self.record.cut += 1
        else:
            assert len(answer.tokens) == TOKENS
            self.record.whole["streamed"] += 1

    async def _ask_whole(self, prompt: list[int]) -> None:
        body = {**body_of(prompt, TOKENS), "stream": False}
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{self._url}/completions", json=body) as response,
            ):
                text = await response.text()
        except aiohttp.ClientError as error:
            self.record.failed.append(f"whole: {error!r}")
            return
        if response.status != 200:
            self.record.failed.append(f"whole: status {response.status}: {text}")
        elif json.loads(text)["choices"][0]["token_ids"] != chain(prompt, TOKENS, VOCAB):
            self.record.wrong.append(f"whole: {text}")
        else:
            self.record.whole["not streamed"] += 1
