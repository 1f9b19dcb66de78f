"""A process's membership of the stack: it introduces itself to the scheduler, shows progress, and
keeps the latest roster.

Used by every service but the scheduler. It has no thread and no clock of its own: the service's
loop calls `tick`.
"""

import logging
from pathlib import Path
from typing import Final, Protocol

from msgspec.structs import replace
from pagewire_protocol.channels import NO_INCARNATION, inbox_address
from pagewire_protocol.messages import (
    Goodbye,
    Heartbeat,
    Hello,
    Incarnation,
    Message,
    Peer,
    Role,
    Roster,
    TokenizerFacts,
    ToScheduler,
    WorkerFacts,
)
from pagewire_protocol.structs import SILENCE_S

from . import liveness
from .health_file import WELL, HealthFile
from .parent import Started

HEARTBEAT_S = 1.0
STAGE_LENGTH: Final = 256
"""Characters; as much as a Peer holds."""
log = logging.getLogger("pagewire.process.membership")


class Addressed(Protocol):
    """Of an inbox."""

    address: str
    """By which others send to it."""


class Sender(Protocol):
    """Of an outbox."""

    def send(self, address: str, message: Message) -> bool:
        """See channels.Outbox."""
        ...


class Membership:
    """What the process `name` says of itself, and the latest roster it was sent. `group`, `rank`
    and `group_size` as in Peer."""

    def __init__(
        self,
        role: Role,
        name: str,
        incarnation: Incarnation,
        inbox: Addressed,
        outbox: Sender,
        run_dir: Path,
        group: str = "",
        rank: int = 0,
        group_size: int = 1,
    ) -> None:
        self.scheduler = inbox_address(run_dir, Role.SCHEDULER, NO_INCARNATION)
        self.roster: Roster | None = None
        self.was_forgotten = False
        """By the scheduler of the latest roster, though it knew this process before."""
        self._listed_in = 0
        self.progress = 0
        self.busy = False
        self._incarnation = incarnation
        self._inbox = inbox
        self._outbox = outbox
        self._peer = Peer(
            role,
            name,
            inbox.address,
            incarnation,
            ready=False,
            group=group,
            rank=rank,
            group_size=group_size,
        )
        self._worker: WorkerFacts | None = None
        self._tokenizer: TokenizerFacts | None = None
        self._stage = "starting"
        self._fraction = 0.0
        self._ready = False
        self._next_beat = 0.0
        self._health = HealthFile(run_dir, name) if Started.shows_health else None
        self._run_dir = run_dir
        self._warn_at: float | None = None

    def hello(self) -> None:
        """Introduce this process as it is now."""
        peer = replace(
            self._peer,
            ready=self._ready,
            stage=self._stage,
            fraction=self._fraction,
            failures=0 if self._ready else Started.failures,
        )
        self._send(Hello(peer, self._worker, self._tokenizer))

    def loading(self, stage: str, fraction: float = 0.0) -> None:
        """Say what keeps this process from being ready; shown by /health and the start-up log."""
        self._stage = stage[:STAGE_LENGTH]
        self._fraction = min(1.0, max(0.0, fraction))
        self.hello()

    def ready(
        self, worker: WorkerFacts | None = None, tokenizer: TokenizerFacts | None = None
    ) -> None:
        """This process is ready, and can do what these facts say."""
        self._worker = worker
        self._tokenizer = tokenizer
        self._ready = True
        self._stage = ""
        self._fraction = 1.0
        liveness.own.serving()
        self.hello()

    def tick(self, now: float) -> None:
        """Call several times a second, from the main loop and between long pieces of its work, with
        a monotonic time in seconds."""
        liveness.own.turn()
        if now < self._next_beat:
            return
        self._next_beat = now + HEARTBEAT_S
        if self._health is not None:
            self._health.write(self._state())
        self._warn_when_alone(now)
        beat = Heartbeat(
            self._inbox.address,
            self._incarnation,
            self.progress,
            self.busy,
            self._stage,
            self._fraction,
        )
        self._send(beat)

    def _state(self) -> str:
        if not self._ready:
            return f"{self._stage} ({self._fraction:.0%})"
        if self.roster is None:
            return "no scheduler has answered yet"
        return WELL if self._listed_in == self.roster.epoch else "the scheduler does not know it"

    def _warn_when_alone(self, now: float) -> None:
        """Once: a service whose scheduler lives in another run directory waits for it in vain, but
        rightly when it only starts late. A process that loads reads no messages, and so has no
        roster whoever may be there."""
        if not self._ready:
            return
        if self._warn_at is None:
            self._warn_at = now + SILENCE_S
        elif now >= self._warn_at and self.roster is None:
            self._warn_at = float("inf")
            log.warning(
                "no scheduler has answered in %s for %.0f s; is one running with this --run-dir?",
                self._run_dir,
                SILENCE_S,
            )

    def on_roster(self, roster: Roster) -> bool:
        """Keep the newest roster. True when it comes from a new scheduler, to which this process
        has then said Hello; `was_forgotten` says whether the present one had given up this process,
        as after a pause."""
        former_epoch = self.roster.epoch if self.roster else 0
        if roster.epoch < former_epoch:
            return False
        listed = any(peer.incarnation == self._incarnation for peer in roster.peers)
        self.was_forgotten = not listed and self._listed_in == roster.epoch
        self._listed_in = roster.epoch if listed else 0
        self.roster = roster
        if not listed:
            self.hello()
        return roster.epoch > former_epoch

    @property
    def is_ready(self) -> bool:
        """This process has said that it is ready."""
        return self._ready

    def goodbye(self, failed: bool = False) -> None:
        """This process ends; `failed`: not in order."""
        liveness.own.loading()
        if self._health is not None:
            self._health.close()
        self._send(Goodbye(self._incarnation, failed))

    def _send(self, message: ToScheduler) -> None:
        self._outbox.send(self.scheduler, message)
