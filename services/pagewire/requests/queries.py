"""Questions to a tokenizer that belong to no request: the ids of a text, the text of ids. No I/O,
no clock of its own.

A question whose tokenizer is gone goes to another one; a question that ends tokenizers is not asked
for ever.
"""

from collections.abc import Callable
from typing import Final

from msgspec.structs import replace
from pagewire_protocol.messages import Detokenize, Message, Tokenize, Tokenized

from .errors import ApiError

ANSWER_S: Final = 60.0
"""How long a question may take, the search for a tokenizer included."""
MAX_DEATHS: Final = 3
"""Tokenizers that may end while they have a question."""
Question = Tokenize | Detokenize
Answered = Callable[[Tokenized | ApiError], None]


class TokenizerQuery:
    """One question; `pin` is the incarnation of the tokenizer that has it, 0 for none."""

    __slots__ = ("answered", "deaths", "handle", "pin", "question", "until")

    def __init__(self, handle: int, question: Question, answered: Answered, until: float) -> None:
        self.handle, self.question, self.answered, self.until = handle, question, answered, until
        self.pin = self.deaths = 0


class PendingQueries:
    """The open questions of this process. `send(inbox, message)` returns False when the peer's
    queue is full."""

    def __init__(
        self, inbox: str, send: Callable[[str, Message], bool], clock: Callable[[], float]
    ) -> None:
        self._inbox, self._send, self._clock = inbox, send, clock
        self._tokenizers: dict[int, str] = {}
        self._open: dict[int, TokenizerQuery] = {}
        self._next_handle = 0

    def __len__(self) -> int:
        return len(self._open)

    def ask(self, question: Question, answered: Answered) -> TokenizerQuery:
        """`answered` is called once, later, unless the TokenizerQuery is forgotten before. The
        question's `handle` and `reply_to` are filled in here. Raises ApiError 503 when no tokenizer
        can take it."""
        handle = self._next_handle
        ask = TokenizerQuery(
            handle,
            replace(question, handle=handle, reply_to=self._inbox),
            answered,
            self._clock() + ANSWER_S,
        )
        if not self._dispatch(ask):
            raise ApiError(
                503, "No service can take the request now; try it again.", retry_after_s=1
            )
        self._next_handle += 1
        self._open[handle] = ask
        return ask

    def forget(self, ask: TokenizerQuery) -> None:
        """Nobody wants the answer. Does nothing when it came already."""
        self._open.pop(ask.handle, None)

    def on_answer(self, answer: Tokenized) -> None:
        ask = self._open.get(answer.handle)
        if ask is None:
            return
        if answer.status == 503:
            ask.pin = 0  # the next tick asks again
        else:
            self._close(ask, refusal_of(answer) if answer.status else answer)

    def on_tokenizers(self, ready: dict[int, str], known: set[int]) -> None:
        """`ready`: inboxes by incarnation; `known`: the incarnations that are there, ready or
        not."""
        self._tokenizers = ready
        for ask in [ask for ask in self._open.values() if ask.pin and ask.pin not in known]:
            ask.pin = 0
            ask.deaths += 1
            if ask.deaths >= MAX_DEATHS:
                self._close(
                    ask,
                    ApiError(
                        500,
                        f"{ask.deaths} tokenizers ended while they had this request; it is not tried again.",
                    ),
                )

    def tick(self) -> None:
        """Ask again what nobody has; give up what took too long."""
        now = self._clock()
        for ask in list(self._open.values()):
            if now >= ask.until:
                self._close(
                    ask,
                    ApiError(
                        503,
                        f"The tokenizer did not answer within {ANSWER_S:.0f} s.",
                        retry_after_s=5,
                    ),
                )
            elif not ask.pin:
                self._dispatch(ask)

    def fail_all(self, error: ApiError) -> None:
        for ask in list(self._open.values()):
            self._close(ask, error)

    def _dispatch(self, ask: TokenizerQuery) -> bool:
        """Send it to the ready tokenizer that has the fewest questions. False when none takes
        it."""
        if not self._tokenizers:
            return False
        pins = [other.pin for other in self._open.values()]
        incarnation = min(self._tokenizers, key=pins.count)
        if not self._send(self._tokenizers[incarnation], ask.question):
            return False
        ask.pin = incarnation
        return True

    def _close(self, ask: TokenizerQuery, answer: Tokenized | ApiError) -> None:
        del self._open[ask.handle]
        ask.answered(answer)


def refusal_of(answer: Tokenized) -> ApiError:
    """Only a refusal's text passes on to the client: it speaks of the request."""
    if 400 <= answer.status < 500:
        return ApiError(
            answer.status, answer.message or "The request was refused.", param=answer.param
        )
    return ApiError(500, "The tokenizer could not handle this request.")
