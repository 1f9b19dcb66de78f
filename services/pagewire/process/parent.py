"""A child process that ends with its parent, and how a child has ended. Only the standard library
is imported here."""

import contextlib
import ctypes
import os
import signal

PARENT_VARIABLE = "PAGEWIRE_PARENT"
"""Names, in a child's environment, the process that started it."""
FAILURES_VARIABLE = "PAGEWIRE_FAILURES"
"""In a child's environment: how many lives before this one ended in a row; not there in a first
life."""
HEALTH_VARIABLE = "PAGEWIRE_HEALTH_FILE"
"""Set in the environment of a child that shows its health as if nobody had started it."""
REASON_IN_OUTPUT = 3
"""Exit status of a child that failed and whose last line of output says why, for its parent to
say."""
TOO_OLD = (
    ": an instruction that this processor does not have; on x86-64, NumPy and PyTorch take x86-64-v2 "
    "(SSE4.2, POPCNT), which virtual machines of the CPU type qemu64 or kvm64 lack: `host` has it"
)
"""What SIGILL means, in words: the packages' code comes compiled for a least processor."""
PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""


class Started:
    """How this process was started."""

    by_parent = False
    """By a launcher, which gave it all its settings as flags."""
    failures = 0
    """Lives before this one that ended; 0: this is the first."""
    shows_health = True
    """In a file, for whoever looks after containers."""


def die_with_parent() -> None:
    """Called first thing in a child: the kernel kills this process when its parent is gone, however
    the parent ended."""
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if not parent:
        return
    Started.by_parent = True
    Started.failures = int(os.environ.pop(FAILURES_VARIABLE, "0"))
    Started.shows_health = bool(os.environ.pop(HEALTH_VARIABLE, ""))
    end_with(int(parent))


def end_with(parent: int) -> None:
    """The kernel kills this process when `parent`, which started it, is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def how_it_ended(returncode: int) -> str:
    """In words. returncode: as of subprocess, a signal's number below 0."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    with contextlib.suppress(ValueError):
        hint = TOO_OLD if returncode == -signal.SIGILL else ""
        return f"was killed by {signal.Signals(-returncode).name}{hint}"
    return f"was killed by signal {-returncode}"
