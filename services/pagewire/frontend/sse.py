"""Server-sent events at the price of a few list appends a token. Knows sockets and bytes, nothing
of requests.

All events of an answer that share their form come from one template: the JSON of a chunk with a
hole where the text goes. Events are collected in their Outlet and leave in one write, as one HTTP
chunk. A socket write costs more than everything else that happens to a token, so under load the
Flusher spaces the rounds of writes: many tokens of a stream then share one.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import msgspec

DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": ping\n\n"
"""A comment, which clients skip; proxies between them and the server see that the connection is
alive."""
FULL: Final = 64 << 10
"""Bytes in a client's write buffer from which on it counts as not reading: about 256 tokens beyond
what the system holds for it. Its requests are then parked. Events are small, and the buffer's own
lists take twice as much memory beside them."""
EMPTY: Final = 16 << 10
"""Bytes in its write buffer from which downwards it reads again."""
OVERFULL: Final = 64 << 20
"""Bytes in a client's write buffer at which its connection is closed at once."""
NOT_READING_S: Final = 120.0
"""After which the connection of a client that does not read is closed."""
PARK_AGAIN_S: Final = 1.0
"""How often it is said again that a client does not read."""
SPACING_S: Final = 30e-6
"""Least time between two rounds of writes, for each client written to: a write takes 5 to 8
microseconds, so writes get a quarter of a core. An answer's first events do not wait."""
_TIMER_S: Final = 0.5e-3
"""Shorter waits are not worth a timer, whose grain is a millisecond."""
HOLE: Final = "\x00text\x00"
"""Stands for the text in a body that `template` is made from."""

encode: Final = msgspec.json.Encoder().encode
"""An object as JSON bytes."""
decode_text: Final = msgspec.json.Decoder(str).decode
"""The text that `encode` made JSON of."""


def event(body: Any) -> bytes:
    """The server-sent event of a JSON body."""
    return b"data: " + encode(body) + b"\n\n"


def template(body_with_holes: Any) -> tuple[bytes, ...]:
    """The bytes around the text in the event of a body whose text is `HOLE`: two pieces where the
    text occurs once, one more for each further time. `fill` makes the event."""
    pieces = event(body_with_holes).split(encode(HOLE))
    assert len(pieces) > 1, "the body has no hole"
    return tuple(pieces)


def fill(pieces: tuple[bytes, ...], text: str) -> bytes:
    """The event of a template with `text` in its holes."""
    return encode(text).join(pieces)


class Outlet:
    """The events of one client, until they are written to its transport. Events that come before
    `attach` are kept."""

    __slots__ = (
        "_chunked",
        "_flusher",
        "_full_since",
        "_park",
        "_park_again",
        "_quiet_since",
        "_transport",
        "_wrote",
        "pieces",
    )

    def __init__(
        self, flusher: "Flusher", park: Callable[[bool], None] = lambda parked: None
    ) -> None:
        """`park`: told True when the client reads nothing, and again each second; False when it
        reads again."""
        self._park = park
        self._park_again = 0.0
        self.pieces: list[bytes] = []
        """Bytes of events. Append through `push`; whoever appends directly calls `touch` first when
        this is empty."""
        self._flusher = flusher
        self._transport: asyncio.Transport | None = None
        self._chunked = True
        self._full_since = self._quiet_since = 0.0
        self._wrote = True
        """Since the last check."""

    def touch(self) -> None:
        """Ask for the next round of writes. Once a round."""
        self._flusher.dirty.append(self)

    def push(self, *events: bytes) -> None:
        """Events for the next round of writes."""
        if not self.pieces:
            self.touch()
        self.pieces += events

    def attach(self, transport: asyncio.Transport, chunked: bool) -> None:
        """Write to `transport` from now on, what was kept at once. `chunked`: as HTTP chunks."""
        self._transport, self._chunked = transport, chunked
        self._flusher.attached.add(self)
        self.flush()

    def detach(self) -> None:
        """Write no more; call before the transport goes to somebody else."""
        self._flusher.attached.discard(self)
        self._transport = None

    def flush(self) -> None:
        """Write what has gathered, if there is a transport."""
        pieces, transport = self.pieces, self._transport
        if not pieces or transport is None:
            return
        data = b"".join(pieces)
        pieces.clear()
        self._wrote = True
        if not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def check(self, now: float) -> None:
        """Close the connection of a client that has not read for too long. `now`: the loop's
        time."""
        transport = self._transport
        if transport is None:
            return
        buffered = transport.get_write_buffer_size()
        if self._full_since and buffered <= EMPTY:
            self._full_since = 0.0
            self._park(False)
        elif buffered >= FULL or self._full_since:
            self._full_since = self._full_since or now
            if now >= self._park_again:
                self._park_again = now + PARK_AGAIN_S
                self._park(True)
        not_reading = self._full_since and now - self._full_since > NOT_READING_S
        if buffered > OVERFULL or not_reading:
            transport.abort()

    def keep_alive(self, now: float, interval: float) -> None:
        """Ping a client that was sent nothing for `interval` seconds."""
        if self._wrote:
            self._wrote, self._quiet_since = False, now
        elif now - self._quiet_since >= interval:
            self.push(PING)


class Flusher:
    """Decides when the outlets of a process write."""

    def __init__(self, loop: asyncio.AbstractEventLoop, keep_alive_s: float = 0.0) -> None:
        """`keep_alive_s`: how long a stream may be silent before it is pinged; 0: for ever."""
        self.dirty: list[Outlet] = []
        """Outlets that have something to write."""
        self.attached: set[Outlet] = set()
        self._loop = loop
        self._keep_alive_s = keep_alive_s
        self._last_flush = 0.0
        self._next_pings = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """Write what has gathered, now or after the spacing. Call once after a drain of messages."""
        if self._timer or not self.dirty:
            return
        wait = self._last_flush + SPACING_S * len(self.dirty) - self._loop.time()
        if wait < _TIMER_S:
            self.flush()
        else:
            self._timer = self._loop.call_later(wait, self.flush)

    def flush(self) -> None:
        """Write what has gathered, now."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._last_flush = self._loop.time()
        dirty, self.dirty = self.dirty, []
        for outlet in dirty:
            outlet.flush()

    def check(self) -> None:
        """Close connections whose clients do not read; ping silent streams. Call a few times a
        second."""
        now = self._loop.time()
        for outlet in list(self.attached):
            outlet.check(now)
        if self._keep_alive_s and now >= self._next_pings:
            self._next_pings = now + min(1.0, self._keep_alive_s / 4)
            for outlet in list(self.attached):
                outlet.keep_alive(now, self._keep_alive_s)
