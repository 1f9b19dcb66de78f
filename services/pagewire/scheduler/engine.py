"""The life of every request: taken in, placed, stepped, ended exactly once.

Owns the queue, the workers' states and the table of live attempts. Knows reply routes by number and
workers by incarnation; who is alive, what time it is and where messages go is decided in
`state.py`.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from math import inf

from pagewire_protocol.columns import BlockId, Slot, execution_id
from pagewire_protocol.deadlines import TIMEOUT_STATUS
from pagewire_protocol.messages import (
    End,
    Epoch,
    Finish,
    Incarnation,
    Placed,
    Step,
    StepResult,
    Submit,
    WorkerFacts,
)

from pagewire.config import SchedulerConfig

from . import batch, results
from .blocks import BlockError
from .outgoing import Outgoing
from .placement import Queue, choose, overload, unservable
from .queue_rate import QueueRate
from .request import NO_SLOT, Phase, Refusal, ReplyRoute, Request, malformed
from .step_estimator import Waiting
from .worker_state import Counters, WorkerState

log = logging.getLogger("pagewire.scheduler")

NO_WORKER = Refusal(
    503, "no worker is ready or loading; start one (pagewire worker) and try again", retry_after_s=5
)
NOT_HANDLED = Refusal(500, "the scheduler could not handle this request; its log says why")
TIMED_OUT = Refusal(TIMEOUT_STATUS, "the request's time is over")
OVERDUE_S = 1.0
"""After a deadline: the owner's own cancellation is under way, and arrivals are dated by the tick
before them."""
SAME_PROMPTS = 32
"""Prompts of which it is remembered who had them last."""
BLOCKS_AT_A_TIME = 8_192
"""Blocks that requests may get before the next step: giving out so many takes a few milliseconds,
in which nobody else is served. No step computes so many, but cached blocks come in any number."""
SPREAD_ROUNDS = 30
SPREAD_AT_ONCE = 8
LEAST_SURPLUS = 2
"""Requests that one worker must have above the mean of two for any of them to be moved."""


class StepFault(Exception):
    """The next step of the worker `incarnation` could not be formed, by a fault of this program."""

    def __init__(self, incarnation: Incarnation) -> None:
        super().__init__(f"no step could be formed for worker {incarnation:x}")
        self.incarnation = incarnation


class Engine:
    """The requests and workers of the scheduler of `epoch`."""

    def __init__(self, epoch: Epoch, config: SchedulerConfig) -> None:
        self.epoch = epoch
        self.config = config
        self.queue = Queue()
        self.queue_rate = QueueRate()
        self.has_refused = False
        """A request for lack of room, since this was last set to False: whoever sends requests had
        better know at once."""
        self.out = Outgoing()
        self.counters = Counters()
        self.workers: dict[Incarnation, WorkerState] = {}
        """By incarnation."""
        self.live: dict[bytes, Request] = {}
        """Attempts that were accepted and have not ended, by rid."""
        self.parked: dict[bytes, Request] = {}
        """Those of them whose clients read nothing, by rid."""
        self._timed: dict[bytes, Request] = {}
        """Those of them that have a deadline, by rid."""
        self._newest_lost_step = 0
        """No worker that was given up has been sent a step with a higher number."""
        self._newcomers: dict[Incarnation, int] = {}
        """Workers that have joined busy ones lately, and for how many rounds those give them
        requests."""
        self._executions = 0
        self._arrivals = 0
        self._same_prompt: OrderedDict[tuple[bytes, bytes], Request] = OrderedDict()
        """The latest request, by prompt and root."""

    # --- requests ---

    def submit(
        self,
        submit: Submit,
        reply_route: ReplyRoute,
        worker_expected: bool,
        now: float = 0.0,
    ) -> None:
        """Accept or refuse an attempt, whose results go to `reply_route`. It replaces an earlier
        attempt at the same request. `worker_expected`: a worker is on its way, so that a request
        may wait for it. `now`: monotonic seconds."""
        old = self.live.get(submit.rid)
        if old is not None and old.attempt >= submit.attempt:
            if (old.reply_route, old.handle) != (reply_route, submit.handle):
                self._report_end(reply_route, submit.handle, submit.attempt, Finish.CANCELLED)
            return
        if old is not None:
            self.end(old, Finish.CANCELLED)
        refusal = malformed(submit)
        if refusal is not None:
            self._report_end(
                reply_route, submit.handle, submit.attempt, Finish.REFUSED, refusal=refusal
            )
            return
        self._arrivals += 1
        request = Request(submit, reply_route, self._arrivals, now)
        self._find_twin(request, submit.prompt)
        refusal = self._refusal(request, worker_expected)
        if refusal is not None:
            self._report_end(
                reply_route, request.handle, request.attempt, Finish.REFUSED, refusal=refusal
            )
        elif (finish := self._finished_before(request)) is not None:
            self._report_end(reply_route, request.handle, request.attempt, finish[0], finish[1])
        else:
            self.queue.push(request)
            self.live[request.rid] = request
            if submit.timeout_ms:
                self._timed[request.rid] = request

    def fail(self, submit: Submit, reply_route: ReplyRoute, why: Refusal) -> None:
        """`submit` was not accepted, by a fault of this program."""
        self._report_end(reply_route, submit.handle, submit.attempt, Finish.FAILED, refusal=why)

    def _find_twin(self, request: Request, prompt: bytes) -> None:
        """The latest request with the same prompt, or where that one still has a twin, that: so no
        request keeps a row of earlier ones."""
        key = prompt, request.root
        latest = self._same_prompt.get(key)
        if latest is not None:
            request.twin = latest.twin or latest
        self._same_prompt[key] = request
        self._same_prompt.move_to_end(key)
        if len(self._same_prompt) > SAME_PROMPTS:
            self._same_prompt.popitem(last=False)

    def _refusal(self, request: Request, worker_expected: bool) -> Refusal | None:
        workers = list(self.workers.values())
        if not workers and not worker_expected and request.attempt == 1:
            return NO_WORKER
        refusal = unservable(request, workers) if workers else None
        if refusal is None and self._overload(request) is not None:
            self._place()
            refusal = self._overload(request)
            self.has_refused |= refusal is not None
        return refusal

    def _overload(self, request: Request) -> Refusal | None:
        tokens = max(
            (worker.estimator.step_tokens for worker in self.workers.values()),
            default=self.config.step_tokens(gpu=False),
        )
        return overload(request, self.queue, self.config, self.queue_rate, tokens)

    def _finished_before(self, request: Request) -> tuple[Finish, int | None] | None:
        """A resubmitted output may end with the very token that ended it: the owner lost only the
        End."""
        if request.output_len == 0:
            return None
        eos = next((worker.slots.eos for worker in self.workers.values()), frozenset[int]())
        return request.finish_at(int(request.tokens[-1]), request.output_len, eos)

    def cancel(self, rid: bytes, attempt: int) -> None:
        """End `attempt` at this request, or an earlier one."""
        request = self.live.get(rid)
        if request is not None and request.attempt <= attempt:
            self.end(request, Finish.CANCELLED)

    def park(self, rid: bytes, attempt: int, parked: bool) -> None:
        """The client of this attempt reads nothing, or reads again. Its blocks become idle ones of
        the prefix cache: as long as they are not needed, little is computed again."""
        request = self.live.get(rid)
        if request is None or request.attempt != attempt or request.parked == parked:
            return
        request.parked = parked
        if parked:
            self.parked[rid] = request
            if request.phase is Phase.RUNNING and request.worker is not None:
                worker = self.workers[request.worker]
                worker.park(request)
                self._requeue_preempted(worker)
        else:
            del self.parked[rid]
            if request.phase is Phase.PARKED:
                request.phase = Phase.WAITING
                self.queue.push(request)

    def end(
        self,
        request: Request,
        finish: Finish,
        stop: int | None = None,
        refusal: Refusal | None = None,
        worker_died: bool = False,
    ) -> None:
        """The one way out for every accepted attempt. `worker_died`: while it computed this
        request."""
        if request.worker is not None:
            self.workers[request.worker].release(request)
        elif request.phase is not Phase.PARKED:
            self.queue.forget(request)
        self._finish(request, finish, stop, refusal, worker_died)

    def _finish(
        self,
        request: Request,
        finish: Finish,
        stop: int | None = None,
        refusal: Refusal | None = None,
        worker_died: bool = False,
    ) -> None:
        """The same of one that neither a worker nor the queue has."""
        self.parked.pop(request.rid, None)
        self._timed.pop(request.rid, None)
        request.phase = Phase.ENDED
        self.counters.request_preemptions.observe(request.num_preemptions)
        del self.live[request.rid]
        self._report_end(
            request.reply_route,
            request.handle,
            request.attempt,
            finish,
            stop,
            refusal,
            worker_died,
        )

    def _report_end(
        self,
        reply_route: ReplyRoute,
        handle: int,
        attempt: int,
        finish: Finish,
        stop: int | None = None,
        refusal: Refusal | None = None,
        worker_died: bool = False,
    ) -> None:
        why = refusal or Refusal(0, "")
        self.out.to(reply_route).ended.append(
            End(
                handle,
                attempt,
                finish,
                stop,
                why.status,
                why.message,
                why.param,
                why.retry_after_s,
                worker_died,
            )
        )

    def end_overdue(self, now: float) -> None:
        """End the requests whose deadlines are over, waiting or running: nobody waits for them.
        Their owners cancel them, so these are the ones whose cancellation does not come. `now`:
        monotonic seconds. Call about once a second."""
        for request in [r for r in self._timed.values() if r.deadline + OVERDUE_S <= now]:
            self.end(request, Finish.REFUSED, refusal=TIMED_OUT)

    def drop_route(self, reply_route: ReplyRoute) -> None:
        """Nobody waits for these requests here any more; their owners resubmit elsewhere."""
        for request in [r for r in self.live.values() if r.reply_route == reply_route]:
            self.end(request, Finish.CANCELLED)

    def refuse_waiting(self) -> None:
        """There is no worker and none is coming."""
        for request in self.queue.waiting():
            self.end(request, Finish.REFUSED, refusal=NO_WORKER)

    # --- workers ---

    def add_worker(self, incarnation: Incarnation, inbox: str, facts: WorkerFacts) -> None:
        """A worker is ready. It may be one that was given up and comes back, which takes no number
        a second time: its steps are numbered on from those of all that were given up, so that none
        of them need be remembered."""
        worker = WorkerState(incarnation, inbox, facts, self.config, self.counters)
        worker.in_flight.continue_after(self._newest_lost_step)
        if any(other.load for other in self.workers.values()):
            self._newcomers[incarnation] = SPREAD_ROUNDS
        self.workers[incarnation] = worker
        self._refuse_unservable()

    def spread(self) -> None:
        """Give workers that have joined lately some of the others' requests, as after a failover: a
        few at a time, since each computes its tokens again. Call once a second."""
        for incarnation, rounds in list(self._newcomers.items()):
            newcomer = self.workers.get(incarnation)
            if newcomer is None or not rounds:
                del self._newcomers[incarnation]
                continue
            self._newcomers[incarnation] = rounds - 1
            busiest = max(self.workers.values(), key=lambda worker: worker.load)
            surplus = (busiest.load - newcomer.load) // 2
            if self.queue.count or surplus < LEAST_SURPLUS or busiest.is_putting_back:
                continue
            for request in busiest.movable()[: min(surplus, SPREAD_AT_ONCE)]:
                busiest.send_away(request)
            self._requeue_preempted(busiest)

    def renew_worker(self, incarnation: Incarnation) -> None:
        """What is known of a worker cannot be relied on, by a fault of this program, which may come
        of any of its requests: forget all of it, and begin as with a new one, which clears its
        slots."""
        former = self.workers.pop(incarnation, None)
        if former is None:
            return
        self._requeue_preempted(former)
        for request in [r for r in self.live.values() if r.worker == incarnation]:
            request.slot = NO_SLOT
            request.worker = None
            self._finish(request, Finish.LOST, worker_died=True)
        self._newest_lost_step = max(self._newest_lost_step, former.in_flight.num_sent)
        self.add_worker(incarnation, former.inbox, former.facts)
        self.workers[incarnation].accepting = former.accepting

    def lose_worker(self, incarnation: Incarnation, died: bool = False) -> None:
        """A worker is gone. Its requests end as lost, and their owners resubmit them. `died`: it
        may be one of those that it computed which ended it."""
        worker = self.workers.get(incarnation)
        if worker is None:
            return
        computing = worker.computing() if died else set[Slot]()
        # Nothing writes its blocks any more: preempted requests need not wait for its steps.
        worker.in_flight.num_returned = worker.in_flight.num_sent
        worker.release_due()
        self._requeue_preempted(worker)
        for request in worker.requests():
            self.end(request, Finish.LOST, worker_died=request.slot in computing)
        del self.workers[incarnation]
        self._newest_lost_step = max(self._newest_lost_step, worker.in_flight.num_sent)
        self._refuse_unservable()

    def _refuse_unservable(self) -> None:
        workers = list(self.workers.values())
        for request in self.queue.waiting() if workers else ():
            refusal = unservable(request, workers)
            if refusal is not None:
                self.end(request, Finish.REFUSED, refusal=refusal)

    def result(self, result: StepResult) -> None:
        """Take in a step's result; one of another epoch or of an unknown worker is ignored. Raises
        WorkerFault when the worker cannot be trusted any more."""
        worker = self.workers.get(result.incarnation)
        if worker is None or result.epoch != self.epoch:
            return
        results.absorb(worker, result, self.out, self.end, self._failed)
        worker.clear_suspects()
        self._requeue_preempted(worker)

    def _failed(self, request: Request, why: Refusal) -> None:
        finish = Finish.REFUSED if why.status < 500 else Finish.FAILED
        self.end(request, finish, refusal=why)

    # --- steps ---

    def advance(self, send: Callable[[str, Step], None], now: float) -> None:
        """Place what can be placed and fill every worker's steps in flight. `now`: monotonic
        seconds. Raises StepFault."""
        for worker in self.workers.values():
            worker.estimator.returned(worker.in_flight.num_returned, now)
        due = [worker for worker in self.workers.values() if self._due(worker) <= now]
        while due:
            self._place()
            stepped: list[WorkerState] = []
            for worker in due:
                step = self._form(worker, now)
                self._requeue_preempted(worker)
                if step is not None:
                    send(worker.inbox, step)
                    stepped.append(worker)
            due = [worker for worker in stepped if self._due(worker) <= now]

    def _form(self, worker: WorkerState, now: float) -> Step | None:
        try:
            return batch.form(worker, self.epoch, now, self._waiting())
        except BlockError:
            raise
        except Exception as error:
            raise StepFault(worker.incarnation) from error

    def due(self, now: float) -> float:
        """When `advance` has something to do, if nothing happens before; inf when it has not. What
        is due already had nothing to send."""
        return min(
            (due for worker in self.workers.values() if (due := self._due(worker)) > now),
            default=inf,
        )

    def _due(self, worker: WorkerState) -> float:
        queued = self.queue.tokens / len(self.workers)
        return worker.estimator.due(worker.pending_prefill_tokens() + queued)

    def _waiting(self) -> Waiting:
        return Waiting(self.queue.count / len(self.workers), self.queue.tokens / len(self.workers))

    def _requeue_preempted(self, worker: WorkerState) -> None:
        """Preempted requests whose last tokens have arrived wait again."""
        for request in worker.requeued:
            if request.parked:
                request.phase = Phase.PARKED
            else:
                self.queue.push(request)
        worker.requeued = []

    def _place(self) -> None:
        """Give waiting requests their slots, those that fit and no more blocks at a time than
        BLOCKS_AT_A_TIME; the others have their turn with the next step."""
        workers = list(self.workers.values())
        blocks = 0
        while blocks < BLOCKS_AT_A_TIME and (request := self.queue.head()) is not None:
            if request.parked:
                self.queue.pop()
                request.phase = Phase.PARKED
                continue
            try:
                choice = choose(request, workers)
            except BlockError:
                raise
            except Exception:
                # Of no worker, and the request would meet it again in every next scheduler.
                log.exception("no worker could be chosen for a request")
                self.end(request, Finish.FAILED, refusal=NOT_HANDLED)
                continue
            if choice is None:
                return
            self.queue.pop()
            self.queue_rate.placed(len(request.tokens))
            # Set first, so that a request which is placed by half goes down with the worker's books.
            request.worker = choice[0].incarnation
            try:
                self._put(request, *choice)
            except BlockError:
                raise
            except Exception as error:
                raise StepFault(choice[0].incarnation) from error
            blocks += len(request.blocks)

    def _put(self, request: Request, worker: WorkerState, cached: list[BlockId]) -> None:
        """A preempted request keeps its execution id: its owner accepts rows of no other, and only
        one chain of its tokens was ever sent."""
        if request.execution:
            worker.place(request, cached)
            return
        self._executions += 1
        request.execution = execution_id(self.epoch, self._executions)
        saved = worker.place(request, cached)
        log.debug(
            "execution %x: slot %d of worker %x, %d of %d prompt tokens cached",
            request.execution,
            request.slot,
            worker.incarnation,
            saved,
            len(request.prompt),
        )
        self.counters.prompt_tokens += len(request.prompt)
        self.out.to(request.reply_route).placed.append(
            Placed(request.handle, request.attempt, saved)
        )

    def check(self) -> None:
        """The conservation law on every worker. Raises BlockError."""
        for worker in self.workers.values():
            worker.kv_cache.pool.check()
