"""A service that nobody supervises, as in a container: it runs in a child process, and this one ends
it when it hangs, so that whoever starts containers starts it again.

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
from collections.abc import Callable
from typing import Final

from . import liveness, parent

LOOK_S: Final = 0.25
FORWARDED: Final = (signal.SIGTERM, signal.SIGINT)
KILLED: Final = 128
"""What a shell adds to a signal's number for the status of a process that it ended."""


def run_watched(name: str, run: Callable[[], int], report: Callable[[int, int, str], None]) -> int:
    """`run` in a child process. Returns its exit status there; here, once it has ended, the same,
    or 1 when it hung. `report` is called here with the child's process id, its incarnation and the
    cause of its end, unless that was orderly."""
    page = mmap.mmap(-1, liveness.PAGE_BYTES)
    own_pid = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        parent.end_with(own_pid)
        liveness.own.show(page)
        return run()
    for number in FORWARDED:
        signal.signal(number, lambda number, _: _pass_on(pid, number))
    watched = liveness.Watched(page, pid, time.monotonic())
    hung = _wait(pid, watched)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if hung:
        cause = f"made no progress for {watched.silent_s:.1f} s"
        print(f"pagewire {name}: {cause.replace('made ', '')}: hung, and ended", file=sys.stderr)
        status = 1
    else:
        cause = parent.how_it_ended(status)
    if status:
        report(pid, watched.incarnation, cause)
    return status if status >= 0 else KILLED - status


def _wait(pid: int, watched: liveness.Watched) -> bool:
    """Until the child ends. Whether it hung, and was killed."""
    end = os.pidfd_open(pid)
    try:
        while not select.select([end], [], [], LOOK_S)[0]:
            if watched.look(time.monotonic()):
                os.kill(pid, signal.SIGKILL)
                return True
    finally:
        os.close(end)
    return False


def _pass_on(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
