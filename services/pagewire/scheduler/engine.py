"""The life of every request: taken in, placed, stepped, ended exactly once.

Owns the queue, the replicas and the table of live attempts. Knows owners by number and workers by
incarnation; who is alive, what time it is and where messages go is decided in `state.py`.
"""

from collections.abc import Callable
from math import inf

from pagewire_protocol.messages import End, Finish, Placed, Step, StepResult, Submit, WorkerFacts

from pagewire.config import SchedulerConfig

from . import batch, results
from .emit import Outgoing
from .placement import Queue, choose, overload, unservable
from .request import Phase, Refusal, Request, malformed
from .step_estimator import Waiting
from .worker_state import Counters, WorkerState

NO_WORKER = Refusal(
    503, "no worker is ready or loading; start one (pagewire worker) and try again", retry_after_s=5
)
REMEMBERED_LOSSES = 64


class Engine:
    def __init__(self, epoch: int, config: SchedulerConfig) -> None:
        self.epoch, self.config = epoch, config
        self.queue, self.out, self.counters = Queue(), Outgoing(), Counters()
        self.replicas: dict[int, WorkerState] = {}
        self.live: dict[bytes, Request] = {}
        self._lost: dict[int, WorkerState] = {}
        self._executions = 0
        self._arrivals = 0

    # --- requests
    #   -----------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit, owner: int, hopeful: bool) -> None:
        """`hopeful`: a worker is on its way, so that a request may wait for it."""
        old = self.live.get(submit.rid)
        if old is not None and old.attempt >= submit.attempt:
            if (old.owner, old.handle) != (owner, submit.handle):
                self._say_end(owner, submit.handle, submit.attempt, Finish.CANCELLED)
            return
        if old is not None:
            self.end(old, Finish.CANCELLED)
        refusal = malformed(submit)
        if refusal is not None:
            self._say_end(owner, submit.handle, submit.attempt, Finish.REFUSED, refusal=refusal)
            return
        self._arrivals += 1
        request = Request(submit, owner, self._arrivals)
        refusal = self._refusal(request, hopeful)
        if refusal is not None:
            self._say_end(owner, request.handle, request.attempt, Finish.REFUSED, refusal=refusal)
        elif (finish := self._finished_before(request)) is not None:
            self._say_end(owner, request.handle, request.attempt, finish[0], finish[1])
        else:
            self.live[request.rid] = request
            self.queue.push(request)

    def _refusal(self, request: Request, hopeful: bool) -> Refusal | None:
        replicas = list(self.replicas.values())
        if not replicas and not hopeful and request.attempt == 1:
            return NO_WORKER
        refusal = unservable(request, replicas) if replicas else None
        if refusal is None and self._overload(request) is not None:
            self._place()
            refusal = self._overload(request)
        return refusal

    def _overload(self, request: Request) -> Refusal | None:
        tokens = max(
            (r.pace.step_tokens for r in self.replicas.values()),
            default=self.config.step_tokens(gpu=False),
        )
        return overload(request, self.queue, self.config, tokens)

    def _finished_before(self, request: Request) -> tuple[Finish, int | None] | None:
        """A resubmitted output may end with the very token that ended it: the owner lost only the
        End."""
        if request.output_len == 0:
            return None
        eos = next((r.slots.eos for r in self.replicas.values()), frozenset[int]())
        return request.finish_at(int(request.tokens[-1]), request.output_len, eos)

    def cancel(self, rid: bytes, attempt: int) -> None:
        request = self.live.get(rid)
        if request is not None and request.attempt <= attempt:
            self.end(request, Finish.CANCELLED)

    def end(
        self,
        request: Request,
        finish: Finish,
        stop: int | None = None,
        refusal: Refusal | None = None,
    ) -> None:
        """The one way out for every accepted attempt."""
        if request.replica is not None:
            request.replica.release(request)
        else:
            self.queue.forget(request)
        request.phase = Phase.ENDED
        del self.live[request.rid]
        self._say_end(request.owner, request.handle, request.attempt, finish, stop, refusal)

    def _say_end(
        self,
        owner: int,
        handle: int,
        attempt: int,
        finish: Finish,
        stop: int | None = None,
        refusal: Refusal | None = None,
    ) -> None:
        why = refusal or Refusal(0, "")
        self.out.mail(owner).ended.append(
            End(
                handle, attempt, finish, stop, why.status, why.message, why.param, why.retry_after_s
            )
        )

    def drop_owner(self, owner: int) -> None:
        """Nobody waits for these requests here any more; their owners resubmit elsewhere."""
        for request in [r for r in self.live.values() if r.owner == owner]:
            self.end(request, Finish.CANCELLED)

    def refuse_waiting(self) -> None:
        """There is no worker and none is coming."""
        for request in self.queue.waiting():
            self.end(request, Finish.REFUSED, refusal=NO_WORKER)

    # --- workers
    #   ------------------------------------------------------------------------------------------------------

    def add_worker(self, incarnation: int, inbox: str, facts: WorkerFacts) -> None:
        """A worker that was given up and comes back is told to empty the slots that it may still
        hold."""
        replica = WorkerState(inbox, facts, self.config, self.counters)
        former = self._lost.pop(incarnation, None)
        if former is not None:
            replica.sent = replica.returned = former.sent
            replica.retire = former.retire
        self.replicas[incarnation] = replica
        self._refuse_unservable()

    def lose_worker(self, incarnation: int) -> None:
        replica = self.replicas.pop(incarnation, None)
        if replica is None:
            return
        replica.returned = replica.sent
        replica.settle()
        self._take_back(replica)
        for request in replica.requests():
            self.end(request, Finish.LOST)
        self._lost[incarnation] = replica
        if len(self._lost) > REMEMBERED_LOSSES:
            del self._lost[next(iter(self._lost))]
        self._refuse_unservable()

    def _refuse_unservable(self) -> None:
        replicas = list(self.replicas.values())
        for request in self.queue.waiting() if replicas else ():
            refusal = unservable(request, replicas)
            if refusal is not None:
                self.end(request, Finish.REFUSED, refusal=refusal)

    def result(self, result: StepResult) -> None:
        """Raises WorkerFault when the worker cannot be trusted any more."""
        replica = self.replicas.get(result.incarnation)
        if replica is None or result.epoch != self.epoch:
            return
        results.absorb(replica, result, self.out, self.end, self._failed)
        self._take_back(replica)

    def _failed(self, request: Request, why: str) -> None:
        self.end(request, Finish.FAILED, refusal=Refusal(500, why))

    # --- steps
    #   --------------------------------------------------------------------------------------------------------

    def advance(self, send: Callable[[str, Step], None], now: float) -> None:
        """Place what can be placed and fill every worker's steps in flight. `now`: monotonic
        seconds."""
        for replica in self.replicas.values():
            replica.pace.returned(replica.returned, now)
        open_ = [replica for replica in self.replicas.values() if self._due(replica) <= now]
        while open_:
            self._place()
            stepped: list[WorkerState] = []
            for replica in open_:
                step = batch.form(replica, self.epoch, now, self._waiting())
                self._take_back(replica)
                if step is not None:
                    send(replica.inbox, step)
                    stepped.append(replica)
            open_ = [replica for replica in stepped if self._due(replica) <= now]

    def due(self, now: float) -> float:
        """When `advance` has something to do, if nothing happens before; inf when it has not. What
        is due already had nothing to send."""
        return min(
            (due for replica in self.replicas.values() if (due := self._due(replica)) > now),
            default=inf,
        )

    def _due(self, replica: WorkerState) -> float:
        return replica.pace.due(replica.backlog() + self.queue.tokens / len(self.replicas))

    def _waiting(self) -> Waiting:
        return Waiting(
            self.queue.count / len(self.replicas), self.queue.tokens / len(self.replicas)
        )

    def _take_back(self, replica: WorkerState) -> None:
        """Preempted requests whose last tokens have arrived wait again."""
        requeued, replica.requeued = replica.requeued, []
        for request in requeued:
            self.queue.push(request)

    def _place(self) -> None:
        replicas = list(self.replicas.values())
        while (request := self.queue.head()) is not None:
            choice = choose(request, replicas)
            if choice is None:
                return
            self.queue.pop()
            self._put(request, *choice)

    def _put(self, request: Request, replica: WorkerState, cached: list[int]) -> None:
        """A preempted request keeps its execution id: its owner has pinned it, and only one chain
        of its tokens was ever emitted."""
        if request.execution:
            replica.place(request, cached)
            return
        self._executions += 1
        request.execution = self.epoch << 43 | self._executions
        saved = replica.place(request, cached)
        self.counters.prompt_tokens += len(request.prompt)
        self.out.mail(request.owner).placed.append(Placed(request.handle, request.attempt, saved))

    def check(self) -> None:
        """The conservation law on every worker. Raises BlockError."""
        for replica in self.replicas.values():
            replica.pool.check()
