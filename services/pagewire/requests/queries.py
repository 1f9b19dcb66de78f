"""Queries to a tokenizer that belong to no request: the ids of a text, the text of ids. No I/O, no
clock of its own.

A query whose tokenizer is gone goes to another one, but not for ever: it may be what ends them.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

from pagewire_protocol.messages import CancelQuery, Detokenize, Message, Tokenize, Tokenized

from .errors import RequestError, failed, invalid, unavailable

ANSWER_S: Final = 60.0
"""How long a query may take, the search for a tokenizer included."""
MAX_DEATHS: Final = 3
"""Tokenizers that may end while they have a query."""
Query = Tokenize | Detokenize
MakeQuery = Callable[[int, str], Query]
"""Makes a query's message from the handle and the inbox that its answer goes to, for example
`partial(Detokenize, ids=column, skip_special_tokens=True)`."""
Answer = Tokenized | RequestError
OnAnswer = Callable[[Answer], None]
_UNAVAILABLE: Final = 503
"""The status of a tokenizer that is still loading."""


class TokenizerQuery:
    """One query, from `send` to its answer."""

    __slots__ = ("deadline", "deaths", "handle", "message", "on_answer", "tokenizer")

    def __init__(self, handle: int, message: Query, on_answer: OnAnswer, deadline: float) -> None:
        self.handle = handle
        self.message = message
        self.on_answer = on_answer
        self.deadline = deadline
        self.tokenizer = 0
        """Incarnation of the tokenizer that has it; 0: none has."""
        self.deaths = 0
        """Tokenizers that ended while they had it."""


class PendingQueries:
    """The queries of this process without an answer. `send(inbox, message)` returns False when the
    peer's queue is full."""

    def __init__(
        self, inbox: str, send: Callable[[str, Message], bool], clock: Callable[[], float]
    ) -> None:
        self._inbox = inbox
        self._send = send
        self._clock = clock
        self._tokenizers: dict[int, str] = {}
        """Inboxes of the ready tokenizers, by incarnation."""
        self._pending: dict[int, TokenizerQuery] = {}
        self._next_handle = 0

    def __len__(self) -> int:
        return len(self._pending)

    def send(self, make: MakeQuery, on_answer: OnAnswer, hold: bool = False) -> TokenizerQuery:
        """Make a query's message and send it; with `hold`, when a tokenizer is there to take it.
        `on_answer` is called once, later, unless the TokenizerQuery is discarded before. Raises
        RequestError UNAVAILABLE when no tokenizer can take it."""
        handle = self._next_handle
        message = make(handle, self._inbox)
        query = TokenizerQuery(handle, message, on_answer, self._clock() + ANSWER_S)
        if not self._dispatch(query) and not hold:
            raise unavailable("No service can take the request now; try it again.")
        self._next_handle += 1
        self._pending[handle] = query
        return query

    def discard(self, query: TokenizerQuery) -> None:
        """Nobody wants the answer. Does nothing when it came already."""
        if self._pending.pop(query.handle, None) is None:
            return
        inbox = self._tokenizers.get(query.tokenizer)
        if inbox is not None:
            self._send(inbox, CancelQuery(query.handle, self._inbox))

    def on_answer(self, answer: Tokenized) -> None:
        """A tokenizer's answer, which may be that it is still loading."""
        query = self._pending.get(answer.handle)
        if query is None:
            return
        if answer.status == _UNAVAILABLE:
            query.tokenizer = 0  # the next tick sends it again
        else:
            self._close(query, error_of(answer) if answer.status else answer)

    def on_tokenizers(self, ready: dict[int, str], present: set[int]) -> None:
        """`ready`: inboxes by incarnation; `present`: the incarnations that live, ready or not."""
        self._tokenizers = ready
        orphans = [
            query
            for query in self._pending.values()
            if query.tokenizer and query.tokenizer not in present
        ]
        for query in orphans:
            query.tokenizer = 0
            query.deaths += 1
            if query.deaths >= MAX_DEATHS:
                text = f"{query.deaths} tokenizers ended while they had this request"
                self._close(query, failed(f"{text}; it is not tried again."))

    def tick(self) -> None:
        """Send again what no tokenizer has; give up what took too long."""
        now = self._clock()
        for query in list(self._pending.values()):
            if now >= query.deadline:
                text = f"The tokenizer did not answer within {ANSWER_S:.0f} s."
                self._close(query, unavailable(text, retry_after_s=5))
            elif not query.tokenizer:
                self._dispatch(query)

    def fail_all(self, error: RequestError) -> None:
        """Answer every query with `error`; for a process that goes down."""
        for query in list(self._pending.values()):
            self._close(query, error)

    def _dispatch(self, query: TokenizerQuery) -> bool:
        """Send it to the ready tokenizer that has the fewest queries. False when none takes it."""
        if not self._tokenizers:
            return False
        assigned = Counter(other.tokenizer for other in self._pending.values())
        incarnation = min(self._tokenizers, key=lambda key: assigned[key])
        if not self._send(self._tokenizers[incarnation], query.message):
            return False
        query.tokenizer = incarnation
        return True

    def _close(self, query: TokenizerQuery, answer: Answer) -> None:
        del self._pending[query.handle]
        query.on_answer(answer)


def error_of(answer: Tokenized) -> RequestError:
    """Only a refusal's text passes on: it speaks of the request."""
    if 400 <= answer.status < 500:
        return invalid(answer.message or "The request was refused.", answer.param)
    return failed("The tokenizer could not handle this request.")
