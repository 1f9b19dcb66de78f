"""Server-sent events at the price of a few list appends a token. Knows sockets and bytes, nothing
of requests.

All events of an answer that share their form are cut from one template: the JSON of a chunk with a
hole where the text goes. Events are collected in their Outlet and leave in one write, as one HTTP
chunk. A socket write costs more than everything else that happens to a token, so under load the
Flusher spaces the rounds of writes: many tokens of a stream then share one.
"""

import asyncio
from typing import Any, Final

import msgspec

DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": ping\n\n"
"""A comment, which clients skip; what is between them and the server sees that the connection
lives."""
FULL: Final = 1 << 20
"""Bytes waiting for a client from which on it counts as not reading."""
STUFFED: Final = 64 << 20
PATIENCE_S: Final = 30.0
SPACING_S: Final = 30e-6
"""Least time between two rounds of writes, for each client written to: a write takes 5 to 8
microseconds, so writes get a quarter of a core. An answer's first events do not wait."""
_TIMER_S: Final = 0.5e-3
"""Shorter waits are not worth a timer, whose grain is a millisecond."""
_HOLE: Final = "\x00text\x00"

encode: Final = msgspec.json.Encoder().encode


def event(body: Any) -> bytes:
    return b"data: " + encode(body) + b"\n\n"


def template(body_with_hole: Any) -> tuple[bytes, bytes]:
    """The bytes before and after the text in the event of a body whose text is `HOLE`."""
    head, found, tail = event(body_with_hole).partition(encode(_HOLE))
    assert found, "the body has no hole"
    return head, tail


HOLE: Final = _HOLE


class Outlet:
    """The way to one client. Until `attach`, events are kept."""

    __slots__ = (
        "_chunked",
        "_flusher",
        "_full_since",
        "_quiet_since",
        "_transport",
        "_wrote",
        "pieces",
    )

    def __init__(self, flusher: "Flusher") -> None:
        self.pieces: list[bytes] = []
        """Append through `push`, or call `touch` before when this is empty."""
        self._flusher = flusher
        self._transport: asyncio.Transport | None = None
        self._chunked = True
        self._full_since = self._quiet_since = 0.0
        self._wrote = True
        """Since the last check."""

    def touch(self) -> None:
        self._flusher.dirty.append(self)

    def push(self, *events: bytes) -> None:
        if not self.pieces:
            self.touch()
        self.pieces += events

    def attach(self, transport: asyncio.Transport, chunked: bool) -> None:
        self._transport, self._chunked = transport, chunked
        self._flusher.attached.add(self)
        self.flush()

    def detach(self) -> None:
        self._flusher.attached.discard(self)
        self._transport = None

    def flush(self) -> None:
        pieces, transport = self.pieces, self._transport
        if not pieces or transport is None:
            return
        data = b"".join(pieces)
        pieces.clear()
        self._wrote = True
        if not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def check(self, now: float) -> None:
        """Close the connection of a client that has not read for too long."""
        transport = self._transport
        waiting = 0 if transport is None else transport.get_write_buffer_size()
        if waiting < FULL:
            self._full_since = 0.0
        elif not self._full_since:
            self._full_since = now
        if transport and (
            waiting > STUFFED or (self._full_since and now - self._full_since > PATIENCE_S)
        ):
            transport.abort()

    def keep_alive(self, now: float, interval: float) -> None:
        """Say something to a client that has heard nothing since `interval` seconds."""
        if self._wrote:
            self._wrote, self._quiet_since = False, now
        elif now - self._quiet_since >= interval:
            self.push(PING)


class Flusher:
    def __init__(self, loop: asyncio.AbstractEventLoop, keep_alive_s: float = 0.0) -> None:
        self.dirty: list[Outlet] = []
        self.attached: set[Outlet] = set()
        self._loop, self._keep_alive_s = loop, keep_alive_s
        self._last = self._next_round = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """Write what has gathered, now or after the spacing. Call when the messages that were
        waiting have been handled."""
        if self._timer or not self.dirty:
            return
        wait = self._last + SPACING_S * len(self.dirty) - self._loop.time()
        if wait < _TIMER_S:
            self.flush()
        else:
            self._timer = self._loop.call_later(wait, self.flush)

    def flush(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._last = self._loop.time()
        dirty, self.dirty = self.dirty, []
        for outlet in dirty:
            outlet.flush()

    def check(self) -> None:
        now = self._loop.time()
        for outlet in list(self.attached):
            outlet.check(now)
        if self._keep_alive_s and now >= self._next_round:
            self._next_round = now + min(1.0, self._keep_alive_s / 4)
            for outlet in list(self.attached):
                outlet.keep_alive(now, self._keep_alive_s)
