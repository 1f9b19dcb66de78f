"""X-Request-Id: the client's where it is usable, else one of ours; the same in the answer's header
and in its body's id."""

import uuid
from typing import Final

from aiohttp import web

HEADER: Final = "X-Request-Id"
MAX_LENGTH: Final = 128
_ID: Final = web.RequestKey("request_id", str)


def usable(given: str) -> bool:
    return given.isascii() and given.isprintable() and 0 < len(given) <= MAX_LENGTH


def request_id(request: web.Request) -> str:
    if _ID not in request:
        given = request.headers.get(HEADER, "")
        request[_ID] = given if usable(given) else uuid.uuid4().hex
    return request[_ID]


def adopt_request_id(request: web.Request, named: str) -> str:
    """The request's id; `named`, which its body says, counts unless the header says one."""
    if named and not usable(request.headers.get(HEADER, "")):
        request[_ID] = named
    return request_id(request)
