"""X-Request-Id: the client's where it is usable, else one of ours; the same in the answer's header
and in its body's id."""

import uuid
from typing import Final

from aiohttp import web

HEADER: Final = "X-Request-Id"
MAX_LENGTH: Final = 128
_ID: Final = web.RequestKey("request_id", str)


def usable(text: str) -> bool:
    """Whether a client's text can be an id: it goes into headers, bodies and logs."""
    return text.isascii() and text.isprintable() and 0 < len(text) <= MAX_LENGTH


def request_id(request: web.Request) -> str:
    """The request's id, the same each time."""
    if _ID not in request:
        from_client = request.headers.get(HEADER, "")
        request[_ID] = from_client if usable(from_client) else uuid.uuid4().hex
    return request[_ID]


def adopt_request_id(request: web.Request, from_body: str) -> str:
    """The request's id; `from_body`, the `request_id` of its body, counts unless the header has a
    usable one."""
    if from_body and not usable(request.headers.get(HEADER, "")):
        request[_ID] = from_body
    return request_id(request)
