"""What goes between the ingress and a replica: one HTTP request, and the head of its answer.

Knows neither Ray nor sockets.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

Headers = tuple[tuple[str, str], ...]

CONNECTION_HEADERS: Final = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
"""Headers of one connection (RFC 9110, section 7.6.1), which no proxy passes on."""
NOT_FORWARDED: Final = CONNECTION_HEADERS | {"content-length", "expect"}
"""Headers of a request that its next connection gets anew."""
NOT_RETURNED: Final = CONNECTION_HEADERS | {"date", "server", "x-request-id"}
"""Headers of an answer that Ray's proxy writes by itself."""


@dataclass(frozen=True)
class ForwardedRequest:
    """`target`: path and query as they stand in the request line, below the application's route
    prefix."""

    method: str
    target: str
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Head:
    """The first item of an answer: its status and headers, and what is there of its body."""

    status: int
    headers: Headers
    chunk: bytes


class StackUnreachable(Exception):
    """The frontends of a replica's stack ended before they answered a request."""


def kept(headers: Iterable[tuple[str, str]], dropped: frozenset[str]) -> Headers:
    """The headers whose names are not in `dropped`, in their order."""
    return tuple((name, value) for name, value in headers if name.lower() not in dropped)
