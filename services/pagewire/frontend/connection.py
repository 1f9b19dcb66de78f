"""One client's connection: what is no valid HTTP gets an answer like any other error, and one line
in the log. Knows HTTP, no route."""

import asyncio
import contextlib
import logging
import resource
import socket
from types import CoroutineType
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, InvalidURLError, LineTooLong

from ..requests.counters import Counters
from .errors import JSON, ApiError
from .routes import UNKNOWN

log = logging.getLogger("pagewire.frontend")
KEEP_ALIVE_S: Final = 75.0
"""How long a client's connection may be idle between two requests."""
HEAD_S: Final = 10.0
"""How long the head of a request may take, from its first byte; on a new connection, from its
start."""
UNSENT: Final = 64 << 10
"""Bytes of an answer that the system takes beyond those that are on their way to the client."""
SPARE_DESCRIPTORS: Final = 256
"""Of those that a process may have open, so many are left for what is no connection."""
MAX_LINE: Final = 8190
"""Bytes of a request line, and of a header."""
MAX_HEADERS: Final = 128
_HTTP2: Final = "Pause on PRI/Upgrade"
"""What aiohttp's parser says when a client begins with HTTP/2's preface."""


def prepare_listener(listener: socket.socket) -> None:
    """Set on the listening socket what each connection that it accepts inherits: the same on each
    would be system calls for every client."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if listener.family != socket.AF_UNIX:
        # What a client does not read stays here, where it is seen, and not in the system.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)


class Connection(web.RequestHandler):
    """The protocol of one connection to the server `manager`."""

    __slots__ = ("_connections", "_counters", "_head_since")

    def __init__(
        self,
        manager: web.Server,
        loop: asyncio.AbstractEventLoop,
        counters: Counters,
        connections: "Connections",
    ) -> None:
        super().__init__(
            manager,
            loop=loop,
            keepalive_timeout=KEEP_ALIVE_S,
            tcp_keepalive=False,  # inherited: see prepare_listener
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            max_headers=MAX_HEADERS,
        )
        self._counters = counters
        self._connections = connections
        self._head_since: float | None = None
        """Since when the head of a request is awaited that has begun, or that a new connection
        owes; the loop's time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As aiohttp's, unless there are as many connections as there may be."""
        super().connection_made(transport)
        self._head_since = self._loop.time()
        if not self._connections.add(self):
            cast(asyncio.Transport, transport).abort()

    @property
    def owes_head(self) -> bool:
        """Whether the head of a request is awaited that has begun, or a new connection's first."""
        return self._head_since is not None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way: no request, no answer, no head."""
        return self._current_request is None and not self._messages and not self.owes_head

    def connection_lost(self, exc: BaseException | None) -> None:
        """As aiohttp's."""
        self._connections.remove(self)
        super().connection_lost(exc)

    def check(self, now: float) -> None:
        """Close it where the head of a request takes too long. now: the loop's time."""
        if self._head_since is None or now - self._head_since <= HEAD_S or not self.transport:
            return
        self._head_since = None
        error = ApiError(408, f"The head of the request did not arrive within {HEAD_S:.0f} s.")
        body = error.body()
        head = (
            f"HTTP/1.1 408 Request Timeout\r\nContent-Type: {JSON}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._counters.responded(UNKNOWN, UNKNOWN, error.status)
        self.transport.write(head.encode() + body)
        self.force_close()

    def data_received(self, data: bytes) -> None:
        """As aiohttp's, which only queues what is malformed. Where that is the rest of a body that a
        handler waits for, the handler is told at once, and there is no further answer."""
        super().data_received(data)
        request = self._current_request
        if request is not None or self._messages:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = self._loop.time()
        if request is None or not self._messages or request.content.is_eof():
            return
        failure = getattr(self._messages[-1][0], "exc", None)
        if isinstance(failure, HttpProcessingError):
            error = malformed(failure)
            _log_closing(request, error)
            request.content.set_exception(web.RequestPayloadError(error.message))
            request.content.feed_eof()  # nothing more is waited for after the answer either
            self.close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that could not be parsed, or whose answer could not be made; the
        connection is closed after it. Raises ConnectionError where an answer was begun."""
        if isinstance(exc, HttpProcessingError):
            error = malformed(exc)
            _log_closing(request, error)
        else:
            error = ApiError(status, "The server failed on this request; its log says why.")
            log.error("request %s failed", request.path, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun")
        self._counters.responded(UNKNOWN, UNKNOWN, error.status)
        return _closing(error)

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> "CoroutineType[Any, Any, tuple[web.StreamResponse, bool]]":
        """As aiohttp's, whose own refusals, which no handler has seen, become JSON."""
        if isinstance(resp, web.HTTPException):
            self._counters.responded(UNKNOWN, UNKNOWN, resp.status)
            resp = _closing(ApiError(resp.status, f"{resp.text or resp.reason}."))
        return super().finish_response(request, resp, start_time)


class Connections:
    """The connections of one frontend."""

    def __init__(self) -> None:
        self._connections: set[Connection] = set()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                soft = hard
        self.limit = max(SPARE_DESCRIPTORS, soft - SPARE_DESCRIPTORS)
        """How many there may be: with more the process could open nothing any more."""

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: Connection) -> bool:
        """False when there are too many."""
        self._connections.add(connection)
        return len(self._connections) <= self.limit

    def remove(self, connection: Connection) -> None:
        """It is closed."""
        self._connections.discard(connection)

    def close_idle(self) -> None:
        """Close those that wait for a further request, of which nothing has come yet."""
        for connection in list(self._connections):
            if connection.is_idle:
                connection.close()

    def owe_heads(self) -> bool:
        """Whether any awaits the head of a request."""
        return any(connection.owes_head for connection in self._connections)

    def check(self, now: float) -> None:
        """Close those whose clients take too long with a head. Call about once a second."""
        for connection in list(self._connections):
            connection.check(now)


def _log_closing(request: web.BaseRequest, error: ApiError) -> None:
    log.warning("closed the connection of %s: %s", request.remote, error.message)


def _closing(error: ApiError) -> web.Response:
    response = web.Response(
        body=error.body(),
        status=error.status,
        headers={"Server": "pagewire", **error.headers()},
        content_type=JSON,
    )
    response.force_close()
    return response


def malformed(failure: HttpProcessingError) -> ApiError:
    """The answer to what is no valid HTTP. The client's own bytes are left out: they may hold its
    key, and the answer's message is logged."""
    if isinstance(failure, LineTooLong):
        return ApiError(
            431,
            f"The head of the request is too long: its first line and each header may have {MAX_LINE} bytes.",
        )
    if isinstance(failure, InvalidURLError):
        return ApiError(400, "The request is not valid HTTP: its URL cannot be read.")
    text = _without_quotes(failure.message)
    if text.startswith("Too many headers"):
        return ApiError(431, f"The request has too many headers: {MAX_HEADERS} are allowed.")
    if text.startswith(_HTTP2):
        return ApiError(400, "The request is HTTP/2; this server speaks HTTP/1.1.")
    if "HTTPS" in text:
        return ApiError(400, "The client speaks TLS to a port without it; use http:// here.")
    return ApiError(400, f"The request is not valid HTTP: {text}.")


def _without_quotes(message: Any) -> str:
    """A parser's message without the lines that quote the client's bytes and point at one."""
    lines = [line.strip() for line in str(message).splitlines()]
    words = [line for line in lines if line and not line.startswith(("b'", 'b"', "^"))]
    return " ".join(words).rstrip(".:")[:200] or "it cannot be parsed"
