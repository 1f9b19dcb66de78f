"""The scheduler's process: sockets and the clock around the state machine.

Knows nothing of requests; everything that is decided is decided in `state.py`.
"""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pagewire_protocol.channels import (
    NO_INCARNATION,
    AlreadyRunning,
    Inbox,
    Outbox,
    living_inboxes,
    prepare_run_dir,
    take_epoch,
)
from pagewire_protocol.messages import Cancel, Epoch, Message, Park, Role, Submit, ToScheduler

from pagewire.config import ModelConfig, RunConfig, SchedulerConfig
from pagewire.process import last_words, liveness
from pagewire.process.health_file import WELL, HealthFile
from pagewire.process.node import settle_gc
from pagewire.process.parent import Started
from pagewire.process.timers import wake_promptly

from .blocks import BlockError
from .kept_counters import KeptCounters
from .state import Event, Scheduler, Tick, Unreachable

log = logging.getLogger("pagewire.scheduler")
WAIT_S: Final = 0.5
HEALTH_S: Final = 1.0
SPARE_S: Final = 0.2
"""How often a spare looks whether its turn has come."""
ARRIVALS: Final = (Submit, Cancel, Park)
"""Messages about requests, which wait for their turn in the order in which they came."""
SLICE_S: Final = 0.005
"""How long new requests are taken before results are looked for again."""


class Loop:
    """Receives, has the state machine decide, and sends what it says."""

    def __init__(
        self, epoch: Epoch, config: SchedulerConfig, inbox: Inbox[ToScheduler], outbox: Outbox
    ) -> None:
        self.inbox = inbox
        self.outbox = outbox
        self.stopping = False
        self.state = Scheduler(epoch, config, self._send, outbox.forget)
        self._health: tuple[HealthFile, ...] = ()
        self._next_health = 0.0
        self._unreachable: deque[str] = deque()
        self._arrivals: deque[Submit | Cancel | Park] = deque()
        """What waits for its turn: results go before new requests, however many arrive at once."""

    def show_health(self, *files: HealthFile) -> None:
        """Write that this loop turns into these, once a second."""
        self._health = files

    def hide_health(self) -> None:
        """It turns no more."""
        for file in self._health:
            file.close()

    def stop(self, *_: object) -> None:
        """End `forever`; safe as a signal handler."""
        self.stopping = True
        self.inbox.wake()

    def forever(self) -> None:
        """Until `stop`."""
        self.handle(Tick(time.monotonic()))
        while not self.stopping:
            self.inbox.wait(0.0 if self._arrivals else self._pause_s())
            liveness.own.turn()
            for message in self.inbox.drain():
                if isinstance(message, ARRIVALS):
                    self._arrivals.append(message)
                else:
                    self.handle(message)
                liveness.own.turn()
            self.take_arrivals(time.monotonic)
            now = time.monotonic()
            self.handle(Tick(now))
            if now >= self._next_health:
                self._next_health = now + HEALTH_S
                for file in self._health:
                    file.write(WELL)

    def take_arrivals(self, clock: Callable[[], float]) -> None:
        """Until none is left, or SLICE_S is over."""
        end = clock() + SLICE_S
        while self._arrivals:
            self.handle(self._arrivals.popleft())
            if clock() >= end:
                break

    def handle(self, event: Event) -> None:
        """`event`, and then what could not be sent while it was handled: a peer that cannot be
        reached is one more event."""
        try:
            self.state.handle(event)
        except BlockError:
            raise
        except Exception:
            if isinstance(event, Tick):
                raise
            # A peer's message ends no service.
            log.exception("a %s could not be handled", type(event).__name__)
        while self._unreachable:
            self.state.handle(Unreachable(self._unreachable.popleft()))

    def _pause_s(self) -> float:
        """Until the next step is due, in whole milliseconds, which is what a wait is counted in.
        What became due since the last tick has not been tried yet."""
        due = self.state.engine.due(self.state.now)
        return min(WAIT_S, max(0.0, due - time.monotonic()) + 0.001)

    def _send(self, address: str, message: Message) -> None:
        if address in self._unreachable:
            return
        try:
            sent = self.outbox.send(address, message)
        except Exception as error:
            # An address that ZeroMQ refuses must not stop the scheduler for everyone else.
            log.error("cannot send a %s to %s: %s", type(message).__name__, address, error)
            sent = False
        if not sent:
            self._unreachable.append(address)


def _take_epoch(
    run_dir: Path, stopping: threading.Event, health: HealthFile | None
) -> tuple[Epoch, int] | None:
    """As take_epoch. Where a launcher has started this process, or a user by hand, another
    scheduler is a mistake, and AlreadyRunning is raised; one with a name of its own, as in a
    container (`health`), waits as a spare until the other is gone, or until it is told to end:
    None."""
    is_spare = False
    while not stopping.is_set():
        try:
            return take_epoch(run_dir)
        except AlreadyRunning:
            if health is None:
                raise
        if not is_spare:
            is_spare = True
            log.info(
                "another scheduler runs in %s: waiting as a spare, to take over when it is gone",
                run_dir,
            )
            liveness.own.serving()
        health.write(f"{WELL}, as a spare")
        liveness.own.turn()
        stopping.wait(SPARE_S)
    if health is not None:
        health.close()
    return None


def _keep_counters(state: Scheduler, kept: KeptCounters) -> None:
    """Go on with those of the scheduler before this one, and leave them to the next."""
    state.peers.deaths = kept.load(state.engine.counters)
    state.keep_counters = lambda: kept.save(state.engine.counters, state.peers.deaths)


def run(run: RunConfig, model: ModelConfig, config: SchedulerConfig) -> int:
    """Schedule until SIGTERM or SIGINT. Returns the exit code; 1 when the run directory belongs to
    someone else or is in use."""
    del model
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.set())
    health: HealthFile | None = None
    try:
        run_dir = prepare_run_dir(run.run_dir)
        if run.name and not Started.by_parent:
            health = HealthFile(run_dir, run.name)
        taken = _take_epoch(run_dir, stopping, health)
    except (AlreadyRunning, OSError, ValueError) as error:
        last_words.say("scheduler", str(error))
        return 1
    if taken is None:
        return 0
    epoch, lock = taken
    inbox: Inbox[ToScheduler] = Inbox(run_dir, Role.SCHEDULER, NO_INCARNATION)
    loop = Loop(epoch, config, inbox, Outbox())
    _keep_counters(loop.state, KeptCounters(run_dir))
    if health is not None:
        loop.show_health(health, HealthFile(run_dir, "scheduler"))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, loop.stop)
    loop.state.send_roster_to(living_inboxes(run_dir))
    settle_gc()
    wake_promptly()
    liveness.own.serving()
    log.info("epoch %d, listening on %s", epoch, inbox.address)
    try:
        loop.forever()
    finally:
        liveness.own.loading()
        loop.hide_health()
        loop.outbox.close()
        inbox.close()
        os.close(lock)
    return 0
