"""The scheduler as a state machine: `handle(event)` takes a message or the time, and calls `send`
and `forget` with what follows from it. No sockets, no clock.

Decides who is alive and what everyone is told; the requests themselves are in `engine.py`. Messages
only change state: steps, tokens and rosters go out with the next `Tick`, so that all that arrived
together is answered together.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from pagewire_protocol.messages import (
    Cancel,
    Death,
    Epoch,
    Goodbye,
    Heartbeat,
    Hello,
    Incarnation,
    Message,
    Park,
    Peer,
    Role,
    Shutdown,
    StepResult,
    Submit,
    ToScheduler,
)

from pagewire.config import SchedulerConfig

from .blocks import BlockError
from .engine import NOT_HANDLED, Engine, StepFault
from .peers import PAUSE_S, Peers, PeerState, ReplyRoutes
from .request import Phase
from .results import WorkerFault
from .throughput import ThroughputLog

log = logging.getLogger("pagewire.scheduler")

HOUSEKEEPING_S: Final = 1.0
"""How often silent peers are looked for and rosters refreshed."""
REFUSAL_S: Final = 0.1
"""Least time between two rosters that say that the queue is full."""
NOT_YET: Final = float("-inf")
START_S: Final = 5.0
"""A new scheduler gives the workers of its predecessor this long to say Hello before it says that
there are none."""
WORKER_GRACE_S: Final = 60.0
"""How long requests that were already served wait for a new worker when there is none."""


@dataclass(frozen=True, slots=True)
class Tick:
    """It is `now` (monotonic seconds), and all that had arrived has been handled."""

    now: float


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A message to this inbox could not be queued."""

    inbox: str


Event = ToScheduler | Tick | Unreachable
Send = Callable[[str, Message], None]
"""Sends a message to an inbox. A failure comes back as an Unreachable event, after the present one
was handled."""
Forget = Callable[[str], None]
"""Drops the connection to an inbox, whose process is gone."""


class Scheduler:
    """The scheduler of `epoch`. Messages go out by `send` as soon as they are made, while the next
    ones are."""

    def __init__(self, epoch: Epoch, config: SchedulerConfig, send: Send, forget: Forget) -> None:
        self.epoch = epoch
        self.engine = Engine(epoch, config)
        self.peers = Peers()
        self.reply_routes = ReplyRoutes()
        self.now = 0.0
        """Of the last Tick, in monotonic seconds."""
        self.keep_counters: Callable[[], None] = lambda: None
        """Called before anyone is told what is counted."""
        self._send = send
        self._forget = forget
        self._newcomer_inboxes: set[str] = set()
        """Inboxes that get a roster with the next Tick whether it has changed or not."""
        self._distrusted: dict[Incarnation, tuple[str, str]] = {}
        """Workers that were told to end: inbox and reason, until they have."""
        self._next_housekeeping = 0.0
        self._next_refusal = NOT_YET
        self._throughput = None if config.disable_log_stats else ThroughputLog(self.stats)
        self._started = self._worker_seen = NOT_YET

    def send_roster_to(self, inboxes: Iterable[str]) -> None:
        """Send the processes at these inboxes a roster with the next Tick, which makes them say
        Hello: they knew a former scheduler, and need not wait for their next heartbeats."""
        self._newcomer_inboxes.update(inboxes)

    def handle(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case StepResult():
                self._result(event)
            case Tick():
                self._tick(event.now)
            case Submit():
                self._submit(event)
            case Cancel():
                for rid, attempt in event.requests:
                    self.engine.cancel(rid, attempt)
            case Park():
                for rid, attempt in event.requests:
                    self.engine.park(rid, attempt, event.parked)
            case Heartbeat():
                is_known = self.peers.heartbeat(event, self.now)
                if not is_known and not self.peers.has_ended(event.incarnation):
                    self._answer_stranger(event.incarnation, event.inbox)
            case Hello():
                self._hello(event)
            case Goodbye():
                why = "ended with an error" if event.failed else "said goodbye"
                self._remove(event.incarnation, why, died=event.failed)
            case Death():
                self._remove(Incarnation(event.incarnation), event.cause, died=True)
                self.peers.expect(event, self.now)
            case Unreachable():
                self._unreachable(event.inbox)

    # --- requests ---

    def _submit(self, submit: Submit) -> None:
        inbox = submit.reply_to
        route = self.reply_routes.number(inbox, bool(self.peers.at(inbox)), self.now)
        worker_expected = self.peers.loading() or self.now - self._started < START_S
        try:
            self.engine.submit(submit, route, worker_expected, self.now)
        except BlockError:
            raise
        except Exception:
            # Its owner waits for an end, and another attempt would come to the same.
            log.exception("a request could not be handled")
            self.engine.fail(submit, route, NOT_HANDLED)

    def _result(self, result: StepResult) -> None:
        try:
            self.engine.result(result)
        except WorkerFault as fault:
            self._distrust(result.incarnation, str(fault))
        except BlockError:
            raise
        except Exception:
            # Taken in by half: its requests go on from what their owners have.
            log.exception("a result could not be handled; its worker begins anew")
            self.engine.renew_worker(result.incarnation)

    def _distrust(self, incarnation: Incarnation, why: str) -> None:
        log.error("worker %x is told to end: %s", incarnation, why)
        for peer in self.peers.of_group(incarnation):
            self._distrusted[peer.incarnation] = peer.inbox, why[:4096]
        self._remove(incarnation, "cannot be trusted", died=True)

    # --- peers ---

    def _hello(self, hello: Hello) -> None:
        peer = hello.peer
        if peer.role is Role.SCHEDULER or not peer.inbox or self.peers.has_ended(peer.incarnation):
            return
        if peer.incarnation in self._distrusted:
            self._answer_stranger(peer.incarnation, peer.inbox)
            return
        for former in self.peers.hello(hello, self.now):
            self._gone(former, "was replaced", died=True)
        self._newcomer_inboxes.add(peer.inbox)
        self.reply_routes.introduced(peer.inbox)
        worker = self.engine.workers.get(peer.incarnation)
        if worker is not None:
            worker.accepting = peer.ready
        elif peer.role is Role.WORKER:
            self._start_worker(peer)

    def _answer_stranger(self, incarnation: Incarnation, inbox: str) -> None:
        """A process that is no peer gets a roster, which makes it say Hello; a distrusted worker is
        told again to end."""
        if incarnation in self._distrusted:
            self._send(inbox, Shutdown(self.epoch, self._distrusted[incarnation][1]))
        else:
            self._newcomer_inboxes.add(inbox)

    def _start_worker(self, peer: Peer) -> None:
        """`peer` is new or has something new to say: where it makes its group complete, the group
        is one more worker, known by its rank 0."""
        leader = self.peers.ready_leader(peer)
        if leader is None or leader.worker is None:
            return
        incarnation = leader.peer.incarnation
        if incarnation not in self.engine.workers:
            self.engine.add_worker(incarnation, leader.peer.inbox, leader.worker)

    def _remove(self, incarnation: Incarnation, why: str, died: bool = False) -> None:
        """`died`: it has ended in no order, or hangs, and what it did may be the cause."""
        states = self.peers.remove(incarnation)
        if not states and incarnation in self._distrusted:
            self._forget(self._distrusted.pop(incarnation)[0])
        for state in states:
            self._gone(state, why, died)
            why = f"is lost with its group {state.peer.group}"

    def _gone(self, state: PeerState, why: str, died: bool) -> None:
        peer = state.peer
        if state.expected:
            return
        log.info("%s %s %s", peer.role.name.lower(), peer.name, why)
        if peer.role is Role.WORKER:
            self.engine.lose_worker(peer.incarnation, died)
        if peer.incarnation in self._distrusted:
            # Its connection stays until it has ended: the message must reach it.
            self._send(peer.inbox, Shutdown(self.epoch, self._distrusted[peer.incarnation][1]))
        else:
            self._drop_inbox(peer.inbox)

    def _drop_inbox(self, inbox: str) -> None:
        route = self.reply_routes.remove(inbox)
        if route is not None:
            self.engine.drop_route(route)
        self._newcomer_inboxes.discard(inbox)
        self._forget(inbox)

    def _unreachable(self, inbox: str) -> None:
        for incarnation in self.peers.at(inbox):
            self._remove(incarnation, "is unreachable", died=True)
        self._drop_inbox(inbox)

    # --- time ---

    def _tick(self, now: float) -> None:
        if self._started == NOT_YET:
            self._started = self._worker_seen = now
        elif now - self.now > PAUSE_S:
            self.peers.extend_deadlines(now - self.now)
        self.now = now
        due = now >= self._next_housekeeping
        if due:
            self._next_housekeeping = now + HOUSEKEEPING_S
            self._do_housekeeping()
            self.engine.queue_rate.measure(now, self.engine.queue.count)
            if self._throughput is not None:
                self._throughput.tick(now)
        # Tokens go out before the next steps, which are not urgent while others are under way, and
        # again after them, for the requests that got their slots.
        self._send_tokens()
        try:
            self.engine.advance(self._send, now)
        except StepFault as fault:
            log.exception("a step could not be formed; its worker begins anew")
            self.engine.renew_worker(fault.incarnation)
        self._send_tokens()
        if self.engine.has_refused and now >= self._next_refusal:
            # Frontends refuse by themselves what finds no room, once they know.
            self.engine.has_refused = False
            self._next_refusal = now + REFUSAL_S
            self._newcomer_inboxes |= set(self.peers.inboxes(Role.FRONTEND))
        if due or self._newcomer_inboxes or self.peers.changed:
            self._send_rosters(due)

    def _send_tokens(self) -> None:
        for route, outgoing in self.engine.out.take().items():
            inbox = self.reply_routes.inbox(route)
            if inbox is not None:
                self._send(inbox, outgoing.message())

    def _do_housekeeping(self) -> None:
        for incarnation in self.peers.expired(self.now):
            self._remove(incarnation, "was silent for too long", died=True)
        for inbox in self.reply_routes.overdue(self.now):
            self._drop_inbox(inbox)
        if self.engine.workers or self.peers.loading():
            self._worker_seen = self.now
        elif self.now - self._worker_seen > WORKER_GRACE_S:
            self.engine.refuse_waiting()
        self.engine.end_overdue(self.now)
        self.engine.spread()
        self.engine.check()

    def _send_rosters(self, due: bool) -> None:
        inboxes = self._newcomer_inboxes
        self._newcomer_inboxes = set()
        frontends = set(self.peers.inboxes(Role.FRONTEND))
        if self.peers.changed:
            inboxes |= set(self.peers.inboxes())
        elif due:
            inboxes |= frontends
        stats = self.stats() if inboxes else {}
        self.keep_counters()
        for inbox in sorted(inboxes):
            self._send(inbox, self.peers.roster(self.epoch, stats if inbox in frontends else {}))

    def stats(self) -> dict[str, float]:
        """What /metrics shows, by vLLM's names where it has one; kv_cache_usage_perc is a fraction
        of 1.

        step_seconds is the time of a step lately, step_time_ratio what steps with prefill take of
        their estimate; both of the slowest worker. stats_timestamp_seconds is the time of day, for
        frontends show what they heard last, however long ago that was."""
        engine = self.engine
        workers = list(engine.workers.values())
        pools = [worker.kv_cache.pool for worker in workers]
        total = sum(pool.total for pool in pools)
        available = sum(pool.available for pool in pools)
        estimators = [worker.estimator for worker in workers]
        gauges = {
            "num_requests_running": sum(worker.load for worker in workers),
            "num_requests_waiting": engine.queue.count,
            "num_tokens_waiting": engine.queue.tokens,
            "requests_parked": sum(r.phase is Phase.PARKED for r in engine.parked.values()),
            "queue_requests_per_second": engine.queue_rate.requests_per_s,
            "queue_tokens_per_second": engine.queue_rate.tokens_per_s,
            "max_queued_reqs": engine.config.max_queued_reqs,
            "max_queued_tokens": engine.config.max_queued_tokens,
            "kv_block_size": max((worker.kv_cache.block_size for worker in workers), default=0),
            "prefix_caching": int(engine.config.enable_prefix_caching),
            "kv_blocks_total": total,
            "kv_blocks_free": available,
            "kv_blocks_cached": sum(pool.cached for pool in pools),
            "kv_cache_usage_perc": (total - available) / total if total else 0.0,
            "workers": len(workers),
            "service_deaths": self.peers.deaths,
            "services_failing": self.peers.failing,
            "steps_in_flight": sum(len(worker.in_flight) for worker in workers),
            "stats_timestamp_seconds": time.time(),
            "step_seconds": max((estimator.step_ms for estimator in estimators), default=0.0)
            / 1000,
            "step_time_ratio": max((estimator.ratio for estimator in estimators), default=1.0),
        }
        stats = {name: float(value) for name, value in gauges.items()}
        return {**stats, **dict(engine.counters.stats())}
