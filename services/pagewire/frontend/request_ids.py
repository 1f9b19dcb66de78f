"""X-Request-Id: the client's where it is usable, else one of ours; the same in the answer's header
and in its body's id."""

import os
from typing import Final

from aiohttp import web

from .openai import is_request_id

HEADER: Final = "X-Request-Id"
_ID: Final = web.RequestKey("request_id", str)


def request_id(request: web.Request) -> str:
    """The request's id, the same each time."""
    if _ID not in request:
        from_client = request.headers.get(HEADER, "")
        request[_ID] = from_client if is_request_id(from_client) else os.urandom(16).hex()
    return request[_ID]


def adopt_request_id(request: web.Request, from_body: str) -> str:
    """The request's id; `from_body`, the `request_id` of its body, counts unless the header has a
    usable one."""
    if from_body and not is_request_id(request.headers.get(HEADER, "")):
        request[_ID] = from_body
    return request_id(request)
