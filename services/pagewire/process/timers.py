"""How precisely a thread sleeps, and how soon it runs once it wakes. Only the standard library is
imported here."""

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Iterable
from typing import Final

PR_SET_TIMERSLACK: Final = 29
"""Of linux/prctl.h."""
SLACK_NS: Final = 1000


def sleep_precisely() -> None:
    """This thread sleeps and waits as long as it says, instead of up to 50 us longer, which the
    kernel takes by default to wake several threads at once. Where that cannot be set it stays so."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)


SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
"""The number of the system call, by machine."""
SCHED_ATTR: Final = struct.Struct("=IIQiIQQQ")
"""Of linux/sched/types.h: size, policy, flags, nice, priority, runtime, deadline, period."""
SHORT_NS: Final = 100_000
"""The least that the kernel takes."""
USUAL_NS: Final = 0


def wake_promptly() -> None:
    """All threads of this process ask for short slices of a processor: what wakes and asks for less
    than the one that runs goes before it, where by default that one may run on for 3 ms. For those
    who do little each time, and for whom others wait. Linux 6.12 or newer does it; where it cannot
    be set it stays as it is. Children and threads that begin later have it too."""
    _set_slices(map(int, os.listdir("/proc/self/task")), SHORT_NS)


def wake_as_usual() -> None:
    """This thread, and those that begin later, take slices as everybody does."""
    _set_slices((0,), USUAL_NS)


def _set_slices(threads: Iterable[int], nanoseconds: int) -> None:
    number = SCHED_SETATTR.get(platform.machine())
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    syscall = ctypes.CDLL(None).syscall
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            nice = os.getpriority(os.PRIO_PROCESS, thread)
            attributes = (SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
            syscall(number, thread, SCHED_ATTR.pack(*attributes), 0)
