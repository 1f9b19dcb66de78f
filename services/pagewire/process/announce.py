"""Tells the scheduler of a service's end, for those that start services and see it first: what the
service was doing goes on elsewhere at once, and new work waits for its next life."""

import contextlib
from pathlib import Path

from pagewire_protocol.channels import NO_INCARNATION, Outbox, inbox_address
from pagewire_protocol.messages import Death, Incarnation, Role


class Announcer:
    """Of one stack. Belongs to the thread that calls it."""

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = Path(run_dir).absolute()
        self._scheduler = inbox_address(self._run_dir, Role.SCHEDULER, NO_INCARNATION)
        self._outbox: Outbox | None = None

    def announce(
        self,
        role: Role,
        name: str,
        incarnation: int,
        cause: str,
        failures: int = 1,
        restart_in_s: float = 0.0,
    ) -> None:
        """The service `name` has ended; the rest as in the message Death. Nobody hears of the end
        of a scheduler, whose successor introduces itself. What a killed process leaves in the run
        directory is removed."""
        if role is Role.SCHEDULER:
            return
        inbox = inbox_address(self._run_dir, role, Incarnation(incarnation))
        with contextlib.suppress(OSError):
            Path(inbox.removeprefix("ipc://")).unlink(missing_ok=True)
        if self._outbox is None:
            self._outbox = Outbox()
        # A scheduler that does not read this hears of the next life from that life itself.
        self._outbox.send(
            self._scheduler,
            Death(role, name, incarnation, cause[:4096], failures, restart_in_s),
        )

    def close(self, linger_ms: int = 0) -> None:
        """Close the connection; what is queued gets `linger_ms` milliseconds to leave."""
        if self._outbox is not None:
            self._outbox.close(linger_ms)
            self._outbox = None
