"""Deadlines of requests. A message carries the milliseconds that are left as it is sent, and each
process counts them on its own monotonic clock: clocks of several processes are not compared."""

from math import inf
from typing import Final

NO_DEADLINE: Final = inf
MOST_MS: Final = 2**31 - 1
TIMEOUT_STATUS: Final = 504
"""Of a refusal because the request's time is over."""


def timeout_ms(deadline: float, now: float) -> int:
    """What is left at `now` until `deadline`, both in seconds, as whole milliseconds for the wire:
    0 without a deadline, and at least 1 with one."""
    if deadline == NO_DEADLINE:
        return 0
    return min(MOST_MS, max(1, round(1000 * (deadline - now))))


def deadline_of(timeout_ms: int, now: float) -> float:
    """Seconds on the clock of `now`, for the milliseconds that a message received at `now` has."""
    return now + timeout_ms / 1000 if timeout_ms else NO_DEADLINE
