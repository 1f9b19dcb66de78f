"""The owner's side of every request: handle -> Stream, what counts as its next token, and when to
try again. No I/O, no clock of its own.

A row of output is accepted only if, in this order: its handle is live; its attempt is the current
one; its execution is the first one seen for this attempt; its position is the number of tokens
accepted so far. A lower position is a repetition and dropped; a higher one is a gap. A gap, a LOST
end, a new scheduler and a vanished tokenizer all lead to the same step: the request goes out again,
with its output so far.

Accepted output goes to a Sink. This module does not know HTTP.
"""

from array import array
from collections.abc import Callable
from typing import Any, Final, cast

from pagewire_protocol.messages import Cancel, Deltas, Message, Roster
from pagewire_protocol.structs import End, Finish, PromptLogprobs, Role, Started

from .counters import Counters
from .errors import ApiError, request_failed
from .queries import PendingQueries
from .request import NO_EXECUTION, Job, Row, Sink, Stream, error_of, rows_of

MAX_STRIKES: Final = 10
"""Interruptions after which a request fails instead of going out again."""
PARK_S: Final = 60.0
"""How long an interrupted request waits for a stack that can take it again."""
BACKOFF_S: Final = (0.0, 0.0, 0.05, 0.2, 0.5, 1.0)
"""Wait before the next attempt, by strikes."""
_APPEND: Final[Callable[["array[int]", Any], None]] = cast(Any, array).append
_EXTEND: Final[Callable[["array[int]", Any], None]] = cast(Any, array).extend
_REASONS: Final = {Finish.STOP: "stop", Finish.LENGTH: "length"}


class RequestOwner:
    """All streams of this process. `send(inbox, message)` returns False when the peer's queue is
    full."""

    def __init__(
        self,
        inbox: str,
        send: Callable[[str, Message], bool],
        clock: Callable[[], float],
        tally: Counters,
    ) -> None:
        self._inbox, self._send, self._clock, self._tally = inbox, send, clock, tally
        self.asks = PendingQueries(inbox, send, clock)
        self.ask = self.asks.ask
        self.live: dict[int, Stream] = {}
        """By the handle of the current attempt."""
        self.parked: dict[bytes, Stream] = {}
        """Interrupted, between two attempts; by rid."""
        self._next_handle = 0
        self._epoch = 0
        self._servable = False
        self._tokenizers: dict[int, str] = {}
        """Inboxes of the ready tokenizers, by incarnation."""
        self._pinned: dict[int, int] = {}
        """Live streams, by tokenizer."""

    def __len__(self) -> int:
        return len(self.live) + len(self.parked) + len(self.asks)

    # --- what the HTTP side asks ---

    def submit(self, job: Job, sink: Sink) -> Stream:
        """Start a request. Raises ApiError 503 when no tokenizer can take it."""
        stream = Stream(job, sink, self._clock())
        if not self._dispatch(stream):
            raise ApiError(
                503, "No service can take the request now; try it again.", retry_after_s=1
            )
        return stream

    def cancel(self, stream: Stream) -> None:
        """The client is gone: forget the stream and tell the stack. Does nothing when it has
        ended."""
        if self.live.get(stream.handle) is stream:
            self._abandon(stream)
            self._tally.finished("abort")
        elif self.parked.pop(stream.rid, None):
            self._withdraw(stream)
            self._tally.finished("abort")

    def fail_all(self, error: ApiError) -> None:
        """End every stream with `error`; for a process that goes down."""
        for stream in list(self.live.values()):
            self._abandon(stream)
            self._fail(stream, error)
        while self.parked:
            self._fail(self.parked.popitem()[1], error)
        self.asks.fail_all(error)

    def tick(self) -> None:
        """Send out the parked requests whose time has come. Call a few times a second."""
        now = self._clock()
        self.asks.tick()
        for stream in [s for s in self.parked.values() if s.resume_at <= now]:
            if self._dispatch(stream):
                del self.parked[stream.rid]
            elif now >= stream.park_until:
                del self.parked[stream.rid]
                self._fail(
                    stream,
                    ApiError(
                        503,
                        f"The request was interrupted and could not resume within {PARK_S:.0f} s.",
                        retry_after_s=5,
                    ),
                )

    # --- what the stack says ---

    def on_roster(self, roster: Roster) -> None:
        if roster.epoch < self._epoch:
            return
        new_reign = bool(self._epoch) and roster.epoch > self._epoch
        self._epoch = roster.epoch
        ready = [peer for peer in roster.peers if peer.ready]
        self._tokenizers = {
            peer.incarnation: peer.inbox for peer in ready if peer.role is Role.TOKENIZER
        }
        self._servable = any(peer.role is Role.WORKER for peer in ready)
        known = {peer.incarnation for peer in roster.peers}
        self.asks.on_tokenizers(self._tokenizers, known)
        for stream in [s for s in self.live.values() if new_reign or s.pin[0] not in known]:
            self._interrupted(stream, strike=False)
        self.tick()

    def on_deltas(self, deltas: Deltas) -> None:
        """Raises ValueError or TypeError, before anything is accepted, when the columns do not fit
        each other."""
        single, rows = rows_of(deltas)
        for started in deltas.started:
            self._started(started)
        for entry in deltas.prompt_logprobs:
            self._prompt_logprobs(entry)
        self._accept(single, rows)
        for end in deltas.ended:
            self._ended(end)

    def _accept(self, single: bool, rows: list[Row]) -> None:
        live, now, gap, accepted = self.live, self._clock(), self._tally.gap, 0
        add = _APPEND if single else _EXTEND
        for handle, attempt, execution, position, piece, text, logprobs in rows:
            stream = live.get(handle)
            if stream is None or stream.attempt != attempt:
                continue
            if stream.execution != execution:
                if stream.execution != NO_EXECUTION:
                    continue
                stream.execution = execution
            out = stream.out
            if position != len(out):
                if position > len(out):
                    self._interrupted(stream)
                continue
            add(out, piece)
            accepted += len(out) - position
            if position:
                gap(now - stream.last)
            else:
                self._tally.first_token(now - stream.born)
                stream.first = now
            stream.last = now
            if stream.deliver is None:
                stream.sink.tokens(text, out[position:].tolist(), logprobs)
            elif text:
                stream.deliver(text)
        self._tally.generation_tokens += accepted

    def _prompt_logprobs(self, entry: PromptLogprobs) -> None:
        """By the rules of a row but the last: positions of the prompt may come again."""
        stream = self.live.get(-1 if entry.handle is None else entry.handle)
        if (
            stream is not None
            and stream.attempt == entry.attempt
            and stream.execution in (NO_EXECUTION, entry.execution)
        ):
            stream.execution = entry.execution
            stream.sink.prompt_logprobs(entry)

    def _started(self, started: Started) -> None:
        stream = self.live.get(started.handle)
        if stream is None or stream.attempt != started.attempt:
            return
        if not stream.prompt_tokens:
            stream.prompt_tokens, stream.placed = started.prompt_tokens, self._clock()
            self._tally.started(started.prompt_tokens, started.cached_tokens)
        stream.sink.started(started)

    def _ended(self, end: End) -> None:
        stream = self.live.get(end.handle)
        if stream is None or stream.attempt != end.attempt:
            return
        if end.finish in _REASONS:
            self._forget(stream)
            self._tally.completed(_REASONS[end.finish], stream, self._clock())
            stream.sink.finished(_REASONS[end.finish], end.stop_reason, len(stream.out))
        elif end.finish is Finish.LOST or (
            end.finish is Finish.REFUSED and end.status in (429, 503) and stream.attempt > 1
        ):
            self._interrupted(stream)
        else:
            self._forget(stream)
            self._fail(stream, error_of(end))

    # --- attempts ---

    def _dispatch(self, stream: Stream) -> bool:
        """Send the next attempt to the tokenizer with the fewest streams. False when none takes
        it."""
        if not self._tokenizers or not self._servable:
            return False
        incarnation = min(self._tokenizers, key=lambda key: self._pinned.get(key, 0))
        inbox, handle = self._tokenizers[incarnation], self._next_handle
        self._next_handle += 1
        if not self._send(inbox, stream.next_attempt(handle, self._inbox)):
            return False
        if stream.attempt and stream.pin[0] != incarnation:
            self._withdraw(stream)
        self._pinned[incarnation] = self._pinned.get(incarnation, 0) + 1
        stream.attempt, stream.handle, stream.execution, stream.pin = (
            stream.attempt + 1,
            handle,
            NO_EXECUTION,
            (incarnation, inbox),
        )
        self.live[handle] = stream
        return True

    def _interrupted(self, stream: Stream, strike: bool = True) -> None:
        """The current attempt is void: the next one goes out, now or when the stack can take it,
        unless there were too many."""
        self._forget(stream)
        stream.strikes += strike
        if stream.strikes > MAX_STRIKES:
            self._fail(
                stream,
                request_failed(
                    f"The request was interrupted {stream.strikes} times; it is not tried again."
                ),
            )
            return
        self._tally.resubmissions += 1
        wait, now = BACKOFF_S[min(stream.strikes, len(BACKOFF_S) - 1)], self._clock()
        stream.resume_at, stream.park_until = now + wait, now + PARK_S
        if wait or not self._dispatch(stream):
            self.parked[stream.rid] = stream

    def _abandon(self, stream: Stream) -> None:
        self._withdraw(stream)
        self._forget(stream)

    def _withdraw(self, stream: Stream) -> None:
        """Cancel the latest attempt at the tokenizer that has it, if that one is still there."""
        if stream.pin[0] in self._tokenizers:
            self._send(stream.pin[1], Cancel(((stream.rid, stream.attempt),)))

    def _forget(self, stream: Stream) -> None:
        del self.live[stream.handle]
        left = self._pinned.pop(stream.pin[0], 1) - 1
        if left > 0:
            self._pinned[stream.pin[0]] = left

    def _fail(self, stream: Stream, error: ApiError) -> None:
        self._tally.finished("error")
        stream.sink.failed(error)
