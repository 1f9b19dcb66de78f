"""The body of a request: its type, its size, the time it may take. Knows HTTP, nothing of what a
body says."""

import asyncio
from typing import Final

from aiohttp import web

from ..requests.errors import ErrorKind, RequestError, invalid
from .errors import ApiError

BODY_S: Final = 60.0
"""How long a client may take to send its request."""
UNCOUNTED: Final = 1 << 20
"""Bytes of each body that do not count as held: most bodies are smaller."""


class LargeBodies:
    """What a frontend holds of large bodies, until they are read."""

    def __init__(self, limit: int) -> None:
        """limit: bytes of all of them together."""
        self.limit = limit
        self.held = 0


class HeldBody:
    """A context in which one body is held."""

    def __init__(self, bodies: LargeBodies) -> None:
        self._bodies = bodies
        self._size = 0
        self._counted = 0

    def __enter__(self) -> "HeldBody":
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.held -= self._counted

    def add(self, size: int) -> None:
        """So many bytes have come. Raises RequestError OVERLOADED where all bodies together are
        too much."""
        self._size += size
        if self._size <= UNCOUNTED:
            return
        more = self._size - UNCOUNTED - self._counted
        bodies = self._bodies
        if bodies.held + more > bodies.limit:
            raise RequestError(
                ErrorKind.OVERLOADED,
                f"{bodies.held >> 20} MiB of large request bodies are being read; send this one later.",
                retry_after_s=1,
            )
        bodies.held += more
        self._counted += more


async def read_body(request: web.Request, limit: int, held: HeldBody) -> list[bytes]:
    """The whole body, at most `limit` bytes, in the pieces in which it came: a large one is not
    copied. Raises ApiError or RequestError."""
    _check_type(request.headers.get("Content-Type", ""))
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(
            415, f"Content-Encoding {encoding[:64]!r} is not supported; send the body uncompressed."
        )
    _check_size(request.content_length or 0, limit)
    try:
        if request.content.is_eof():  # all of it came with the head, as short ones do
            whole = request.content.read_nowait()
            _check_size(len(whole), limit)
            held.add(len(whole))
            return [whole]
        async with asyncio.timeout(BODY_S):
            return await _pieces(request, limit, held)
    except TimeoutError:
        raise ApiError(408, f"The request body did not arrive within {BODY_S:.0f} s.") from None
    except web.RequestPayloadError as error:
        raise invalid(str(error)) from None
    except (web.PayloadAccessError, ConnectionResetError, ValueError):
        raise invalid("The request body could not be read.") from None


async def _pieces(request: web.Request, limit: int, held: HeldBody) -> list[bytes]:
    pieces: list[bytes] = []
    size = 0
    while piece := await request.content.readany():
        size += len(piece)
        _check_size(size, limit)
        held.add(len(piece))
        pieces.append(piece)
    return pieces


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ApiError(
            413,
            f"The request body is larger than {limit} bytes ({limit >> 20} MiB); --max-body-mb sets the limit.",
        )


def _check_type(content_type: str) -> None:
    """JSON passes, and so does a request without a type, which some clients send. The types that
    are refused are those that a web page of another origin may send without a preflight."""
    media_type = content_type.partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    if media_type and not is_json:
        raise ApiError(
            415, f"Content-Type {media_type[:64]!r} is not supported; only 'application/json' is."
        )
