"""The scheduler as a state machine: `handle(event)` takes a message or the time and returns what is
to be sent. No sockets, no clock.

Decides who is alive and what everyone is told; the requests themselves are in `engine.py`. Messages
only change state: steps, tokens and rosters go out with the next `Tick`, so that all that arrived
together is answered together.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

from pagewire_protocol.messages import (
    Cancel,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Role,
    StepResult,
    Submit,
    ToScheduler,
)

from pagewire.config import SchedulerConfig

from .engine import Engine
from .peers import PAUSE_S, Known, Owners, Peers
from .results import WorkerFault

log = logging.getLogger("pagewire.scheduler")

EVERY_S: Final = 1.0
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
Output = tuple[str, Message | None]
"""An inbox and what to send there; None: forget the inbox, its process is gone."""


class Scheduler:
    def __init__(self, epoch: int, config: SchedulerConfig) -> None:
        self.engine, self.peers, self.owners = Engine(epoch, config), Peers(), Owners()
        self.epoch, self.now = epoch, 0.0
        self.at_once: Callable[[str, Message], bool] | None = None
        """What takes steps and tokens as soon as they are made, while the next ones are; False
        where it could not."""
        self._outputs: list[Output] = []
        self._greet: set[str] = set()
        self._distrusted: set[int] = set()
        self._second = 0.0
        self._started = self._worker_seen = NOT_YET

    def handle(self, event: Event) -> list[Output]:
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
            case Heartbeat():
                if not self.peers.heartbeat(event, self.now):
                    self._greet.add(event.inbox)
            case Hello():
                self._hello(event)
            case Goodbye():
                self._remove(event.incarnation, "said goodbye")
            case Unreachable():
                self._unreachable(event.inbox)
        outputs, self._outputs = self._outputs, []
        return outputs

    # --- requests
    #   -----------------------------------------------------------------------------------------------------

    def _submit(self, submit: Submit) -> None:
        owner = self.owners.number(submit.reply_to, bool(self.peers.at(submit.reply_to)), self.now)
        hopeful = self.peers.loading() or self.now - self._started < START_S
        self.engine.submit(submit, owner, hopeful)

    def _result(self, result: StepResult) -> None:
        try:
            self.engine.result(result)
        except WorkerFault as fault:
            log.error("worker %x is dropped until it restarts: %s", result.incarnation, fault)
            self._distrusted.add(result.incarnation)
            self._remove(result.incarnation, "cannot be trusted")

    # --- peers
    #   --------------------------------------------------------------------------------------------------------

    def _hello(self, hello: Hello) -> None:
        peer = hello.peer
        if (
            peer.incarnation in self._distrusted
            or peer.role is Role.SCHEDULER
            or not peer.inbox.startswith("ipc://")
        ):
            return
        for former in self.peers.hello(hello, self.now):
            self._gone(former, "was replaced")
        self._greet.add(peer.inbox)
        self.owners.introduced(peer.inbox)
        replica = self.engine.replicas.get(peer.incarnation)
        if replica is not None:
            replica.accepting = peer.ready
        elif peer.role is Role.WORKER and peer.ready and hello.worker is not None:
            self.engine.add_worker(peer.incarnation, peer.inbox, hello.worker)

    def _remove(self, incarnation: int, why: str) -> None:
        known = self.peers.remove(incarnation)
        if known is not None:
            self._gone(known, why)

    def _gone(self, known: Known, why: str) -> None:
        peer = known.peer
        log.info("%s %s %s", peer.role.name.lower(), peer.name, why)
        if peer.role is Role.WORKER:
            self.engine.lose_worker(peer.incarnation)
        self._forget(peer.inbox)

    def _forget(self, inbox: str) -> None:
        owner = self.owners.remove(inbox)
        if owner is not None:
            self.engine.drop_owner(owner)
        self._greet.discard(inbox)
        self._outputs.append((inbox, None))

    def _unreachable(self, inbox: str) -> None:
        for incarnation in self.peers.at(inbox):
            self._remove(incarnation, "is unreachable")
        self._forget(inbox)

    # --- time
    #   ---------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        if self._started == NOT_YET:
            self._started = self._worker_seen = now
        elif now - self.now > PAUSE_S:
            self.peers.forgive(now - self.now)
        self.now = now
        due = now >= self._second
        if due:
            self._second = now + EVERY_S
            self._every_second()
        self._send_mail()
        self.engine.advance(self._send, now)
        self._send_mail()
        if due or self._greet or self.peers.changed:
            self._send_rosters(due)

    def _send_mail(self) -> None:
        """Before the next steps, which are not urgent while others are under way, and after them,
        for those who got their places."""
        for owner, mail in self.engine.out.take().items():
            inbox = self.owners.inbox(owner)
            if inbox is not None:
                self._send(inbox, mail.message())

    def _send(self, inbox: str, message: Message) -> None:
        """Nothing overtakes what was made before it."""
        if self._outputs or self.at_once is None or not self.at_once(inbox, message):
            self._outputs.append((inbox, message))

    def _every_second(self) -> None:
        for incarnation in self.peers.expired(self.now):
            self._remove(incarnation, "was silent for too long")
        for inbox in self.owners.overdue(self.now):
            self._forget(inbox)
        if self.engine.replicas or self.peers.loading():
            self._worker_seen = self.now
        elif self.now - self._worker_seen > WORKER_GRACE_S:
            self.engine.refuse_waiting()
        self.engine.check()

    def _send_rosters(self, due: bool) -> None:
        inboxes, self._greet = self._greet, set()
        frontends = set(self.peers.inboxes(Role.FRONTEND))
        if self.peers.changed:
            inboxes |= set(self.peers.inboxes())
        elif due:
            inboxes |= frontends
        if inboxes:
            stats = self.stats()
            for inbox in sorted(inboxes):
                self._outputs.append(
                    (inbox, self.peers.roster(self.epoch, stats if inbox in frontends else {}))
                )

    def stats(self) -> dict[str, float]:
        """What /metrics shows, by vLLM's names where it has one; kv_cache_usage_perc is a fraction
        of 1.

        step_ms is the time of a step lately, step_ms_ratio what steps with prefill take of their
        estimate; both of the slowest worker."""
        engine = self.engine
        pools = [replica.pool for replica in engine.replicas.values()]
        paces = [replica.pace for replica in engine.replicas.values()]
        total, available = sum(pool.total for pool in pools), sum(pool.available for pool in pools)
        return {
            "num_requests_running": float(
                sum(replica.load for replica in engine.replicas.values())
            ),
            "num_requests_waiting": float(engine.queue.count),
            "num_tokens_waiting": float(engine.queue.tokens),
            "kv_blocks_total": float(total),
            "kv_blocks_free": float(available),
            "kv_blocks_cached": float(sum(pool.cached for pool in pools)),
            "kv_cache_usage_perc": (total - available) / total if total else 0.0,
            "workers": float(len(pools)),
            "steps_in_flight": float(
                sum(len(replica.flights) for replica in engine.replicas.values())
            ),
            "step_ms": max((pace.step_ms for pace in paces), default=0.0),
            "step_ms_ratio": max((pace.ratio for pace in paces), default=1.0),
            **{name: float(value) for name, value in asdict(engine.counters).items()},
        }
