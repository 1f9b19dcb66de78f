"""The owner's side of every request: handle -> OwnedRequest, what counts as its next token, and
when to try again. No I/O, no clock of its own.

A row of output is accepted only if, in this order: its handle is live; its attempt is the current
one; its execution is the first one seen for this attempt; its position is the number of tokens
accepted so far. A lower position is a repetition and dropped; a higher one is a gap. A gap, a LOST
end, a new scheduler, a vanished tokenizer and a scheduler that had given up this process all lead
to the same step: the request goes out again, with its output so far.

Accepted output goes to a Sink. This module does not know HTTP.
"""

import contextlib
import logging
from array import array
from collections.abc import Callable
from typing import Any, Final, cast

from pagewire_protocol.messages import Cancel, Deltas, Message, Park, Roster
from pagewire_protocol.structs import (
    NOT_AWAITED,
    End,
    Finish,
    PromptLogprobs,
    Role,
    Started,
)

from .counters import Counters
from .errors import RequestError, failed, poisoned, unavailable
from .queries import MakeQuery, OnAnswer, PendingQueries, TokenizerQuery
from .request import (
    NO_EXECUTION,
    NOT_WAITING,
    Job,
    OwnedRequest,
    Row,
    Sink,
    error_of,
    prompt_size,
    rows_of,
)

log = logging.getLogger("pagewire.requests")
MAX_INTERRUPTIONS: Final = 10
"""Interruptions in a row, without a token in between, after which a request fails instead of going
out again."""
MAX_WORKER_DEATHS: Final = 3
"""Workers that may end while they compute a request's next token; from two on it is computed
alone."""
SUSPENSION_S: Final = 60.0
"""How long an interrupted request waits for a stack that can take it again."""
BACKOFF_S: Final = (0.0, 0.0, 0.05, 0.2, 0.5, 1.0)
"""Wait before the next attempt, by interruptions so far."""
TURNED_AWAY_S: Final = 0.1
"""Wait before the next attempt of a request that met a service which is starting again."""
MAX_HELD: Final = 4096
"""Requests that wait between two attempts, or before the first, while new ones are still taken."""
NEVER: Final = float("-inf")
GRACE_S: Final = 5.0
"""How long it may take to hear what becomes of a service that is gone."""
PAUSE_S: Final = 2.0
"""An owner that was not called for longer was stopped, as with a virtual machine."""
# Rows of one token bring it bare, others a view of several: both are appended by an unbound method,
# chosen once a message instead of once a row.
_APPEND: Final[Callable[["array[int]", Any], None]] = cast(Any, array).append
_EXTEND: Final[Callable[["array[int]", Any], None]] = cast(Any, array).extend
_REASONS: Final = {Finish.STOP: "stop", Finish.LENGTH: "length"}
_UNAVAILABLE: Final = 503
_RETRYABLE_STATUSES: Final = (429, _UNAVAILABLE)
"""Of a refusal that says nothing about the request: queues are full, or a service is loading."""


def _is_on_its_way(role: Role, roster: Roster) -> bool:
    """A service of this kind is ready, or is being started again and not known for failing."""
    return any(
        peer.ready or 0 < peer.failures < NOT_AWAITED for peer in roster.peers if peer.role is role
    )


class RequestOwner:
    """All requests of this process. `send(inbox, message)` returns False when the peer's queue is
    full."""

    def __init__(
        self,
        inbox: str,
        send: Callable[[str, Message], bool],
        clock: Callable[[], float],
        counters: Counters,
        joins_running_stack: bool = False,
    ) -> None:
        """joins_running_stack: the others are there, and will soon be heard of."""
        self._inbox = inbox
        self._send = send
        self._clock = clock
        self._counters = counters
        self.queries = PendingQueries(inbox, send, clock)
        self.live: dict[int, OwnedRequest] = {}
        """By the handle of the current attempt."""
        self.suspended: dict[bytes, OwnedRequest] = {}
        """Interrupted, between two attempts; by rid."""
        self._next_handle = 0
        self._epoch = 0
        self._listed_in = 0
        """The last epoch whose scheduler has listed this process."""
        self._has_worker = False
        self._incomplete_since = clock() if joins_running_stack else NEVER
        """Since when a kind of service is missing; meaningless while none is."""
        self._called = clock()
        """When it was called last."""
        self._are_on_their_way = False
        """A successor of every kind that is missing is."""
        self._tokenizers: dict[int, str] = {}
        """Inboxes of the ready tokenizers, by incarnation."""
        self._assigned: dict[int, int] = {}
        """How many live requests each tokenizer has, by incarnation."""
        self.waiting = 0
        """Requests that have not had a slot on a worker yet."""
        self.waiting_tokens = 0
        """Of their prompts, about."""

    def __len__(self) -> int:
        return len(self.live) + len(self.suspended) + len(self.queries)

    # --- from whoever has the requests: the HTTP frontend, LLM, run-batch ---

    def submit(self, job: Job, sink: Sink, timeout_s: float = 0.0) -> OwnedRequest:
        """Start a request. While a service is started again it waits for that. After `timeout_s`
        seconds, unless that is 0, the stack works no more on it. Raises RequestError UNAVAILABLE
        when no tokenizer can take it and none will soon."""
        now = self._clock()
        request = OwnedRequest(job, sink, now)
        if timeout_s:
            request.deadline = now + timeout_s
        if not self._dispatch(request):
            if not self.can_hold:
                raise unavailable("No service can take the request now; try it again.")
            request.suspended_until = now + SUSPENSION_S
            self.suspended[request.rid] = request
        request.waiting_tokens = prompt_size(job.prompt)
        self.waiting += 1
        self.waiting_tokens += request.waiting_tokens
        return request

    @property
    def is_complete(self) -> bool:
        """There are a tokenizer and a worker."""
        return bool(self._tokenizers) and self._has_worker

    @property
    def can_hold(self) -> bool:
        """What is missing is being started again, so that a new request may wait for it."""
        if self.is_complete or len(self.suspended) >= MAX_HELD:
            return False
        return self._are_on_their_way or self._clock() - self._incomplete_since < GRACE_S

    def cancel(self, request: OwnedRequest) -> None:
        """The client is gone: forget the request and tell the stack. Does nothing when it has
        ended."""
        if self.live.get(request.handle) is request:
            self._abandon(request)
        elif self.suspended.pop(request.rid, None):
            self._cancel_remote(request)
        else:
            return
        self._waits_no_more(request)
        self._counters.finished("abort")

    def park(self, request: OwnedRequest, parked: bool) -> None:
        """Its client reads nothing, or reads again. Call again now and then while it reads
        nothing: the attempt may be another one."""
        request.parked = parked
        if self.live.get(request.handle) is request:
            self._send(request.tokenizer_inbox, Park(((request.rid, request.attempt),), parked))

    def query(self, make: MakeQuery, on_answer: OnAnswer) -> TokenizerQuery:
        """See PendingQueries.send."""
        return self.queries.send(make, on_answer, hold=self.can_hold)

    def fail_all(self, error: RequestError) -> None:
        """End every request and query with `error`; for a process that goes down."""
        for request in list(self.live.values()):
            self._abandon(request)
            self._fail(request, error)
        while self.suspended:
            self._fail(self.suspended.popitem()[1], error)
        self.queries.fail_all(error)

    def tick(self) -> None:
        """Send out the suspended requests whose time has come. Call a few times a second."""
        now = self._clock()
        self._notice_pause(now)
        self.queries.tick()
        for request in [r for r in self.suspended.values() if r.resume_at <= now]:
            if self._dispatch(request):
                del self.suspended[request.rid]
            elif now >= request.suspended_until:
                del self.suspended[request.rid]
                text = (
                    f"The request was interrupted and could not resume within {SUSPENSION_S:.0f} s."
                )
                self._fail(request, unavailable(text, retry_after_s=5))

    # --- from the stack ---

    def on_roster(self, roster: Roster) -> None:
        """Who is there now. Requests whose tokenizer is gone go out again; so do all where the
        scheduler is a new one, or had given up this process, as after a pause."""
        self._notice_pause(self._clock())
        if roster.epoch < self._epoch:
            return
        is_successor = bool(self._epoch) and roster.epoch > self._epoch
        all_lost = is_successor
        self._epoch = roster.epoch
        if any(peer.inbox == self._inbox for peer in roster.peers):
            self._listed_in = roster.epoch
        elif self._listed_in == roster.epoch:
            self._listed_in = 0
            all_lost = True
        was_complete = self.is_complete
        ready = [peer for peer in roster.peers if peer.ready]
        self._tokenizers = {
            peer.incarnation: peer.inbox for peer in ready if peer.role is Role.TOKENIZER
        }
        self._has_worker = any(peer.role is Role.WORKER for peer in ready)
        if not self.is_complete and (
            was_complete or (is_successor and self._incomplete_since != NEVER)
        ):
            # A new scheduler knows nobody yet, however long that was so of the one before.
            self._incomplete_since = self._clock()
        self._are_on_their_way = all(
            _is_on_its_way(role, roster) for role in (Role.TOKENIZER, Role.WORKER)
        )
        present: set[int] = {peer.incarnation for peer in roster.peers}
        self.queries.on_tokenizers(self._tokenizers, present)
        for request in [r for r in self.live.values() if all_lost or r.tokenizer not in present]:
            self._interrupted(request, by_itself=False)
        self.tick()

    def on_deltas(self, deltas: Deltas) -> None:
        """New output. Raises ValueError or TypeError, before anything is accepted, when the columns
        do not fit each other."""
        self._notice_pause(self._clock())
        single, rows = rows_of(deltas)
        for started in deltas.started:
            self._started(started)
        for entry in deltas.prompt_logprobs:
            self._prompt_logprobs(entry)
        self._accept(single, rows)
        for end in deltas.ended:
            self._ended(end)

    def _notice_pause(self, now: float) -> None:
        """A time in which this process was stopped counts for nobody: messages of its beginning are
        read at its end."""
        seconds = now - self._called
        self._called = now
        if seconds > PAUSE_S:
            if self._incomplete_since != NEVER:
                self._incomplete_since = now
            for request in self.suspended.values():
                request.suspended_until += seconds

    def _accept(self, single: bool, rows: list[Row]) -> None:
        """The four rules, once a token: locals instead of attributes."""
        live = self.live
        now = self._clock()
        observe_gap = self._counters.gap
        add = _APPEND if single else _EXTEND
        accepted = 0
        for handle, attempt, execution, position, piece, text, logprobs in rows:
            request = live.get(handle)
            if request is None or request.attempt != attempt:
                continue
            if request.execution != execution:
                if request.execution != NO_EXECUTION:
                    continue
                request.execution = execution
            out = request.out
            if position != len(out):
                if position > len(out):
                    self._interrupted(request)
                continue
            add(out, piece)
            accepted += len(out) - position
            if position:
                observe_gap(now - request.last_token_time)
            else:
                self._counters.first_token(now - request.arrival_time)
                request.first_token_time = now
            request.last_token_time = now
            try:
                if request.deliver is None:
                    request.sink.tokens(text, out[position:].tolist(), logprobs)
                elif text:
                    request.deliver(text)
            except Exception:
                self._give_up(request)
        self._counters.generation_tokens += accepted

    def _prompt_logprobs(self, entry: PromptLogprobs) -> None:
        """By the rules of a row but the last: positions of the prompt may come again."""
        request = self.live.get(-1 if entry.handle is None else entry.handle)
        if (
            request is not None
            and request.attempt == entry.attempt
            and request.execution in (NO_EXECUTION, entry.execution)
        ):
            request.execution = entry.execution
            try:
                request.sink.prompt_logprobs(entry)
            except Exception:
                self._give_up(request)

    def _started(self, started: Started) -> None:
        request = self.live.get(started.handle)
        if request is None or request.attempt != started.attempt:
            return
        self._waits_no_more(request)
        if not request.prompt_tokens:
            request.prompt_tokens = started.prompt_tokens
            request.scheduled_time = self._clock()
            self._counters.started(started.prompt_tokens, started.cached_tokens)
        try:
            request.sink.started(started)
        except Exception:
            self._give_up(request)

    def _ended(self, end: End) -> None:
        request = self.live.get(end.handle)
        if request is None or request.attempt != end.attempt:
            return
        # Once a request was accepted, a stack that cannot take it is an interruption like others.
        refused = end.finish is Finish.REFUSED
        turned_away = refused and end.status in _RETRYABLE_STATUSES and request.attempt > 1
        if end.finish in _REASONS:
            self._forget(request)
            self._waits_no_more(request)
            self._counters.completed(_REASONS[end.finish], request, self._clock())
            try:
                request.sink.finished(
                    _REASONS[end.finish],
                    end.stop_reason,
                    len(request.out),
                    end.reasoning_tokens,
                )
            except Exception:
                self._give_up(request)
        elif end.finish is Finish.LOST or turned_away:
            if end.worker_died:
                request.count_worker_death()
            if request.worker_deaths >= MAX_WORKER_DEATHS:
                self._forget(request)
                self._fail(request, poisoned(request.worker_deaths))
            elif turned_away and request.interruptions >= MAX_INTERRUPTIONS:
                self._forget(request)
                self._fail(request, error_of(end))
            else:
                self._interrupted(request)
        elif refused and end.status == _UNAVAILABLE and (self.is_complete or self.can_hold):
            # A first attempt has met a service that is just starting, or that has not heard yet
            # that others are there; however long ago it was sent, if the service was stopped
            # meanwhile.
            self._interrupted(request, by_itself=False, wait_s=TURNED_AWAY_S)
        else:
            self._forget(request)
            self._fail(request, error_of(end))

    def _give_up(self, request: OwnedRequest) -> None:
        """Its sink has raised, which is a fault of this program: that request ends, and the others
        of the same message go on. Called while the exception is handled."""
        log.exception("the output of a request could not be taken; the request fails")
        if self.live.get(request.handle) is request:
            self._abandon(request)
        with contextlib.suppress(Exception):
            self._fail(request, failed("The server failed on this request; its log says why."))

    # --- attempts ---

    def _dispatch(self, request: OwnedRequest) -> bool:
        """Send the next attempt to the tokenizer with the fewest requests. False when none takes
        it."""
        if not self._tokenizers or not self._has_worker:
            return False
        incarnation = min(self._tokenizers, key=lambda key: self._assigned.get(key, 0))
        inbox = self._tokenizers[incarnation]
        handle = self._next_handle
        self._next_handle += 1
        if not self._send(inbox, request.next_attempt(handle, self._inbox, self._clock())):
            return False
        if request.attempt and request.tokenizer != incarnation:
            self._cancel_remote(request)
        self._assigned[incarnation] = self._assigned.get(incarnation, 0) + 1
        request.attempt += 1
        request.handle = handle
        request.execution = NO_EXECUTION
        request.tokenizer = incarnation
        request.tokenizer_inbox = inbox
        self.live[handle] = request
        return True

    def _interrupted(
        self, request: OwnedRequest, by_itself: bool = True, wait_s: float = 0.0
    ) -> None:
        """The current attempt is void: the next one goes out, after `wait_s` seconds or when the
        stack can take it, unless there were too many. `by_itself`: the request may be what ends its
        workers, so this counts."""
        self._forget(request)
        if by_itself:
            request.count_interruption()
        if request.interruptions > MAX_INTERRUPTIONS:
            text = f"The request was interrupted {request.interruptions} times"
            self._fail(request, failed(f"{text}; it is not tried again."))
            return
        self._counters.resubmissions += 1
        wait = max(wait_s, BACKOFF_S[min(request.interruptions, len(BACKOFF_S) - 1)])
        now = self._clock()
        request.resume_at = now + wait
        request.suspended_until = now + SUSPENSION_S
        if wait or not self._dispatch(request):
            self.suspended[request.rid] = request

    def _abandon(self, request: OwnedRequest) -> None:
        self._cancel_remote(request)
        self._forget(request)

    def _cancel_remote(self, request: OwnedRequest) -> None:
        """Cancel the latest attempt at the tokenizer that has it, if that one is still there."""
        if request.tokenizer in self._tokenizers:
            self._send(request.tokenizer_inbox, Cancel(((request.rid, request.attempt),)))

    def _forget(self, request: OwnedRequest) -> None:
        del self.live[request.handle]
        left = self._assigned.pop(request.tokenizer, 1) - 1
        if left > 0:
            self._assigned[request.tokenizer] = left

    def _waits_no_more(self, request: OwnedRequest) -> None:
        """It has its first slot, or has ended."""
        if request.waiting_tokens != NOT_WAITING:
            self.waiting -= 1
            self.waiting_tokens -= request.waiting_tokens
            request.waiting_tokens = NOT_WAITING

    def _fail(self, request: OwnedRequest, error: RequestError) -> None:
        self._waits_no_more(request)
        self._counters.finished("error")
        request.sink.failed(error)
