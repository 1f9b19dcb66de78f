"""When a request that the stack had no room for is sent again, for callers that have many of them
and no client who waits: `LLM` and `pagewire run-batch`."""

from collections.abc import Callable
from typing import Final

from .errors import ErrorKind, RequestError

MAX_UNAVAILABLE_S: Final = 120.0
"""How long one request waits for services that are starting again. A model of many gigabytes loads
in less."""
REQUESTS_AHEAD: Final = 2
"""Requests sent, in multiples of what the workers run at once; more would only lengthen queues."""


class RetryBudget:
    """Of one request. Full queues are waited out without limit, since they empty themselves;
    services that are not there are waited for at most MAX_UNAVAILABLE_S in a row."""

    __slots__ = ("_clock", "_unavailable_since")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._unavailable_since: float | None = None

    def allows(self, error: RequestError) -> bool:
        """Whether the request, refused with `error`, may be sent again."""
        if error.kind is not ErrorKind.UNAVAILABLE:
            self._unavailable_since = None
            return error.retryable
        now = self._clock()
        if self._unavailable_since is None:
            self._unavailable_since = now
        return now - self._unavailable_since < MAX_UNAVAILABLE_S
