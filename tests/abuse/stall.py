"""Measures how long others wait beside an abusive request: paced streams of the fake worker, whose
tokens are due every few milliseconds, and the longest gap that one of them sees.

The gap without the request, measured in the same run, says how much of it is the machine's load.
"""

import json
import os
import selectors
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

STREAMS = 8
STEP_MS = 10
WAITS = 20
FLAGS = ("--device", "fake", "--fake-step-ms", str(STEP_MS), "--num-frontends", "1", "--num-tokenizers", "1")  # fmt: skip


class Gaps:
    """Eight streams that run as long as the context lasts, and the longest gap of each window."""

    def __init__(self, url: str, streams: int = STREAMS) -> None:
        self._address = address_of(url)
        self._selector = selectors.DefaultSelector()
        self._last: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._longest = 0.0
        self._open = True
        for index in range(streams):
            self._start(index)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _start(self, index: int) -> None:
        body = {
            "prompt": [100 + index],
            "max_tokens": 30_000,
            "stream": True,
            "ignore_eos": True,
            "temperature": 1,
        }
        client = request(self._address, "/v1/completions", json.dumps(body).encode())
        self._selector.register(client, selectors.EVENT_READ)
        self._last[client] = time.perf_counter()

    def _read(self) -> None:
        while self._open:
            for key, _ in self._selector.select(0.2):
                client: socket.socket = key.fileobj  # type: ignore[assignment]
                data = client.recv(1 << 20)
                now = time.perf_counter()
                with self._lock:
                    self._longest = max(self._longest, now - self._last[client])
                self._last[client] = now
                if not data:
                    raise AssertionError("a paced stream ended")

    def take(self) -> float:
        """Seconds: the longest gap since the last call, also of gaps that have not ended."""
        now = time.perf_counter()
        with self._lock:
            longest, self._longest = self._longest, 0.0
        return max(longest, *(now - last for last in list(self._last.values())))

    def usual(self, seconds: float = 0.3) -> float:
        """Seconds: the longest gap while nothing else goes on."""
        for _ in range(WAITS):
            time.sleep(0.05)
            if self.take() < 0.05:  # they have begun
                break
        time.sleep(seconds)
        return self.take()

    def close(self) -> None:
        self._open = False
        self._thread.join(5)
        for client in self._last:
            client.close()
        self._selector.close()


def address_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 0


def request(address: tuple[str, int], path: str, body: bytes, timeout: float = 60) -> socket.socket:
    """A connection on which the request was sent. A large body is sent by whoever calls."""
    client = socket.create_connection(address, timeout)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode())
    client.sendall(body)
    return client


class Outcome(NamedTuple):
    statuses: tuple[int, ...]
    seconds: float
    gap: float


def abuse(url: str, gaps: Gaps, path: str, body: bytes, copies: int) -> Outcome:
    """The request's answers, when the last one had come, and the longest gap meanwhile."""
    statuses: list[int] = [0] * copies

    def one(index: int) -> None:
        try:
            with request(address_of(url), path, body) as client:
                head = client.recv(65536)
                statuses[index] = int(head.split(b" ", 2)[1])
                while client.recv(1 << 20):
                    pass
        except (OSError, IndexError):
            # Refused before all of it was read: the answer may be lost with the connection.
            statuses[index] = statuses[index] or 413

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(copies)]
    gaps.take()
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    seconds = time.perf_counter() - began
    return Outcome(tuple(statuses), seconds, gaps.take())


def resident(pids: list[int]) -> int:
    """Bytes of memory of the processes together."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids)
