"""How fast the queue of waiting requests empties, as measured, and how long a new request would
wait. Time comes with the calls; knows requests and tokens by number."""

from typing import Final

from pagewire_protocol.stats import wait_s

SMOOTHING: Final = 0.2
"""Weight of the latest second: the rate follows a change within some five."""


class QueueRate:
    """Requests and tokens that leave the queue in a second, over the seconds in which it was not
    empty."""

    def __init__(self) -> None:
        self.requests_per_s = 0.0
        """0: not known."""
        self.tokens_per_s = 0.0
        self._placed_requests = 0
        self._placed_tokens = 0
        self._measured_at: float | None = None

    def placed(self, tokens: int) -> None:
        """A request with so many tokens has left the queue for a worker."""
        self._placed_requests += 1
        self._placed_tokens += tokens

    def measure(self, now: float, waiting: int) -> None:
        """Call about once a second. now: monotonic seconds; waiting: requests in the queue."""
        seconds = 0.0 if self._measured_at is None else now - self._measured_at
        if seconds and waiting:
            weight = SMOOTHING if self.requests_per_s else 1.0
            requests = self._placed_requests / seconds - self.requests_per_s
            tokens = self._placed_tokens / seconds - self.tokens_per_s
            self.requests_per_s += weight * requests
            self.tokens_per_s += weight * tokens
        self._measured_at = now
        self._placed_requests = self._placed_tokens = 0

    def wait_s(self, requests: int, tokens: int) -> int | None:
        """Seconds until a queue of so many is empty, rounded up, at least 1; None while no rate is
        known."""
        return wait_s(requests, tokens, self.requests_per_s, self.tokens_per_s)
