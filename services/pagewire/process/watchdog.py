"""A service that nobody supervises, as in a container: it runs in a child process, and this one
ends it when it hangs, so that whoever starts containers starts it again.

A process of its own, since a thread could not run while the hung one holds the interpreter. Only
the standard library is imported before the service ends.
"""

import contextlib
import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from . import last_words, liveness, parent

LOOK_S: Final = 0.5
STOP_LOOK_S: Final = 0.03
"""Once the service was asked to end: its successor may start only when it has."""
KILLED: Final = 128
"""What a shell adds to a signal's number for the status of a process that it ended."""


@dataclass(frozen=True)
class Ending:
    """How a service has ended."""

    pid: int
    incarnation: int
    cause: str
    """In words, its own where it left some."""
    in_order: bool
    """Somebody asked for it."""


class Stop:
    """When a service that was asked to end is told so: after a while in which it goes on, or when
    those that it works for have gone, but not as long as all of them finish what they have."""

    def __init__(self, delay_s: float, frontends: Callable[[], Mapping[int, bool]]) -> None:
        """`frontends` gives those that live, and whether each is leaving (process.alive.living)."""
        self._delay_s = delay_s
        self._frontends = frontends
        self._at: float | None = None

    def ask(self) -> bool:
        """SIGTERM has come. Whether the service shall be told at once."""
        at_once = self._at is not None or not self._delay_s
        # Told once: another signal could meet the service at its very end, when it handles none.
        self._at = float("inf") if at_once else time.monotonic() + self._delay_s
        return at_once

    @property
    def is_pending(self) -> bool:
        """It was asked to end, and not told yet."""
        return self._at is not None and self._at != float("inf")

    def is_due(self, now: float) -> bool:
        """Whether the service shall be told now; once."""
        if self._at is None or not self.is_pending:
            return False
        frontends = self._frontends()
        if frontends and (all(frontends.values()) or now < self._at):
            return False
        self._at = float("inf")
        return True


def run_watched(
    name: str, run: Callable[[], int], report: Callable[[Ending], None], stop: Stop
) -> int:
    """`run` in a child process. Returns its exit status there; here, once it has ended, the same,
    or 1 when it hung. `report` is called here with its end; `stop` says when SIGTERM is passed
    on."""
    page = mmap.mmap(-1, liveness.PAGE_BYTES)
    words = last_words.new_page()
    own_pid = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:  # the child
        parent.end_with(own_pid)
        liveness.own.show(page)
        last_words.leave_in(words)
        return run()

    signal.signal(signal.SIGINT, lambda number, _: _pass_on(pid, number))
    signal.signal(signal.SIGTERM, lambda number, _: stop.ask() and _pass_on(pid, number))
    watched = liveness.Watched(page, pid, time.monotonic())
    hung = _wait(pid, watched, stop)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if hung:
        no_progress = f"no progress for {watched.silent_s:.1f} s"
        print(f"pagewire {name}: {no_progress}: hung, and ended", file=sys.stderr)
        status = 1
        cause = f"made {no_progress}"
    else:
        cause = _cause(status, last_words.read(words), watched.was_ready)
    report(Ending(pid, watched.incarnation, cause, in_order=not status))
    return status if status >= 0 else KILLED - status


def _cause(status: int, own_words: str, was_ready: bool) -> str:
    """Why a child that did not hang has ended, with this exit status."""
    if not status:
        return "was stopped"
    cause = own_words or parent.how_it_ended(status)
    return cause if was_ready else f"could not start: {cause}"


def _wait(pid: int, watched: liveness.Watched, stop: Stop) -> bool:
    """Until the child ends. Whether it hung, and was killed."""
    end = os.pidfd_open(pid)
    ending = select.poll()
    ending.register(end, select.POLLIN)
    try:
        while not ending.poll(1000 * (STOP_LOOK_S if stop.is_pending else LOOK_S)):
            now = time.monotonic()
            if watched.look(now):
                os.kill(pid, signal.SIGKILL)
                return True
            if stop.is_due(now):
                _pass_on(pid, signal.SIGTERM)
    finally:
        os.close(end)
    return False


def _pass_on(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
