"""What goes wrong with a request, in words for whoever sent it. Knows no transport: the HTTP
frontend turns a RequestError into a status and a body, `LLM` into an exception.

Texts of FAILED are fixed: whatever a service said about its own fault goes to the log, never to a
client.
"""

from enum import Enum


class ErrorKind(Enum):
    """Who is at fault, and whether the same request may succeed later."""

    INVALID = "invalid"
    """The request: sent again, it is refused again."""
    OVERLOADED = "overloaded"
    """Queues are full; they empty themselves."""
    UNAVAILABLE = "unavailable"
    """A service is starting, ending or silent."""
    FAILED = "failed"
    """The server, in a way that the same request would meet again."""
    TIMED_OUT = "timed_out"
    """The answer took longer than a request may take."""


RETRYABLE = frozenset({ErrorKind.OVERLOADED, ErrorKind.UNAVAILABLE})


class RequestError(Exception):
    """Why a request has no answer. `param` names the parameter at fault, `retry_after_s` is how
    long a client had better wait; 0: not said."""

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int = 0,
        type: str | None = None,
    ) -> None:
        """`type`: a word for programs, where the kind alone does not say enough."""
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.type = type

    @property
    def retryable(self) -> bool:
        """The same request may succeed later."""
        return self.kind in RETRYABLE


def invalid(message: str, param: str | None = None) -> RequestError:
    """The request is at fault, by this parameter."""
    return RequestError(ErrorKind.INVALID, message, param=param)


def unavailable(message: str, retry_after_s: int = 1) -> RequestError:
    """No service can take the request now."""
    return RequestError(ErrorKind.UNAVAILABLE, message, retry_after_s=retry_after_s)


def failed(
    message: str = "The server could not finish this request; try it again.",
) -> RequestError:
    """The server is at fault."""
    return RequestError(ErrorKind.FAILED, message)


def timed_out(message: str = "The request's time was over before its answer was.") -> RequestError:
    """The request took longer than it may."""
    return RequestError(ErrorKind.TIMED_OUT, message)


def poisoned(deaths: int) -> RequestError:
    """`deaths` workers in a row have ended while they computed the request."""
    return RequestError(
        ErrorKind.FAILED,
        f"{deaths} workers ended while they computed this request; it is not tried again.",
        type="request_poisoned",
    )
