"""Whether the stack's queue has room for a request, as far as a frontend can tell: by what the
scheduler publishes and what this frontend has sent since. Knows no HTTP.

A refusal is then an answer at once, without a tokenizer's work. The scheduler, which knows exactly,
refuses what a frontend lets pass wrongly. While nothing waits nothing is refused here: how many
requests find a slot at once only the scheduler knows.
"""

from typing import Final

from pagewire_protocol.messages import Roster
from pagewire_protocol.stats import wait_s

from ..requests.errors import ErrorKind, RequestError
from ..requests.owner import RequestOwner

USUAL_RETRY_S: Final = 5
"""While no rate was measured yet."""


class Admission:
    """The queue as one frontend sees it, whose requests are those of `owner`."""

    def __init__(self, owner: RequestOwner) -> None:
        self._owner = owner
        self._stats: dict[str, float] = {}
        self._others = 0.0
        """Requests in the queue, at the time of the roster, less this frontend's own."""
        self._other_tokens = 0.0

    def on_roster(self, roster: Roster) -> None:
        """The newest figures, if it has some."""
        if roster.stats:
            self._stats = roster.stats
            self._others = self._stat("num_requests_waiting") - self._owner.waiting
            self._other_tokens = self._stat("num_tokens_waiting") - self._owner.waiting_tokens

    def check(self, requests: int = 1, tokens: int = 0) -> None:
        """Raises RequestError OVERLOADED where so many more, with so many tokens together, find no
        room."""
        if not self._stats.get("num_requests_waiting"):
            return
        waiting = max(0.0, self._others + self._owner.waiting)
        waiting_tokens = max(0.0, self._other_tokens + self._owner.waiting_tokens)
        most = self._stat("max_queued_reqs") or float("inf")
        most_tokens = self._stat("max_queued_tokens") or float("inf")
        if waiting + requests <= most and waiting_tokens + tokens <= most_tokens:
            return
        rates = self._stat("queue_requests_per_second"), self._stat("queue_tokens_per_second")
        retry = wait_s(waiting, waiting_tokens, *rates) or USUAL_RETRY_S
        raise RequestError(
            ErrorKind.OVERLOADED,
            f"The queue is full: {waiting:.0f} requests with about {waiting_tokens:.0f} tokens wait "
            f"(limits {most:.0f} and {most_tokens:.0f}); try again in {retry} s.",
            retry_after_s=retry,
        )

    def _stat(self, name: str) -> float:
        return self._stats.get(name, 0.0)
