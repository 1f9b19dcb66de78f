"""One client's connection: what is no valid HTTP gets an answer like any other error, and one line
in the log. Knows HTTP, no route."""

import asyncio
import logging
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, InvalidURLError, LineTooLong

from ..requests.counters import Counters
from .errors import JSON, ApiError
from .routes import UNKNOWN

log = logging.getLogger("pagewire.frontend")
KEEP_ALIVE_S: Final = 75.0
"""How long a client's connection may be idle between two requests."""
MAX_LINE: Final = 8190
"""Bytes of a request line, and of a header."""
MAX_HEADERS: Final = 128
_HTTP2: Final = "Pause on PRI/Upgrade"
"""What aiohttp's parser says when a client begins with HTTP/2's preface."""


class Connection(web.RequestHandler):
    """The protocol of one connection to the server `manager`."""

    __slots__ = ("_counters",)

    def __init__(
        self, manager: web.Server, loop: asyncio.AbstractEventLoop, counters: Counters
    ) -> None:
        super().__init__(
            manager,
            loop=loop,
            keepalive_timeout=KEEP_ALIVE_S,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            max_headers=MAX_HEADERS,
        )
        self._counters = counters

    def data_received(self, data: bytes) -> None:
        """As aiohttp's, which only queues what is malformed. Where that is the rest of a body that a
        handler waits for, the handler is told at once, and there is no further answer."""
        super().data_received(data)
        request = self._current_request
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

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """As aiohttp's, whose own refusals, which no handler has seen, become JSON."""
        if isinstance(resp, web.HTTPException):
            self._counters.responded(UNKNOWN, UNKNOWN, resp.status)
            resp = _closing(ApiError(resp.status, f"{resp.text or resp.reason}."))
        return await super().finish_response(request, resp, start_time)


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
