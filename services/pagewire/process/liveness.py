"""How a process shows that it makes progress to the one that started it, and how that one tells a
hung process from a slow one. Only the standard library is imported here.

A hung process still exists, holds its sockets and may even answer ZeroMQ's own heartbeats. So each
service counts the turns of its main loop in a page of memory that it shares with its parent, beside
the time within which the next turn will come. Neither a socket nor a thread is needed to read it,
whatever the process holds.
"""

import contextlib
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Final

PAGE_VARIABLE: Final = "PAGEWIRE_PROGRESS_FD"
"""Names, in a child's environment, the descriptor of its page."""
LOADING_PATIENCE_S: Final = 60.0
"""Of a process that starts or ends: an import or a large file may hold its interpreter for long."""
STOPPED_PATIENCE_S: Final = 1.5
"""Of a process that a signal has stopped, whatever it was doing: it will not go on by itself, and
with its successor's start it is replaced within three seconds."""
PAUSE_S: Final = 1.0
"""A watcher that has not looked for longer than this was stopped itself, as all processes of a
virtual machine are when that is paused."""
NANOSECONDS: Final = 1e9

_TURNS: Final = struct.Struct("=Q")
_PATIENCE: Final = struct.Struct("=d")
_LIFE: Final = struct.Struct("=Q?")
_PATIENCE_AT: Final = 8
_LIFE_AT: Final = 16
_PID: Final = struct.Struct("=i")
_PID_AT: Final = 28
PAGE_BYTES: Final = 32
SHARED_BYTES: Final = _PID_AT
"""Of a page, what holds on every host: all but the process id."""


class Liveness:
    """What this process shows of itself. Without a watcher it is shown to nobody."""

    def __init__(self) -> None:
        self._page: mmap.mmap | bytearray = bytearray(PAGE_BYTES)
        self._turns = 0
        self._timeout_s = math.inf

    def show(self, page: mmap.mmap) -> None:
        """From now on this process is watched by whoever else has `page`."""
        self._page = page
        _PID.pack_into(page, _PID_AT, os.getpid())
        self.loading()

    def inherit(self) -> None:
        """Show it to the parent that has passed its page on, if one has."""
        number = os.environ.pop(PAGE_VARIABLE, "")
        if number:
            self.show(mmap.mmap(int(number), PAGE_BYTES))
            os.close(int(number))

    def settle(self, timeout_s: float) -> None:
        """What `serving` allows between two turns, in seconds; 0: any time."""
        self._timeout_s = timeout_s or math.inf

    def introduce(self, incarnation: int) -> None:
        """Under which incarnation the stack knows this process."""
        _LIFE.pack_into(self._page, _LIFE_AT, incarnation, False)

    def loading(self) -> None:
        """This process starts or ends: turns may take long."""
        patience_s = max(LOADING_PATIENCE_S, self._timeout_s)
        _PATIENCE.pack_into(self._page, _PATIENCE_AT, patience_s)
        self.turn()

    def serving(self) -> None:
        """This process is ready: from now on its main loop never stands still for long."""
        incarnation, _ = _LIFE.unpack_from(self._page, _LIFE_AT)
        _LIFE.pack_into(self._page, _LIFE_AT, incarnation, True)
        _PATIENCE.pack_into(self._page, _PATIENCE_AT, self._timeout_s)
        self.turn()

    def turn(self) -> None:
        """The main loop has come round, or is between two pieces of work."""
        self._turns += 1
        _TURNS.pack_into(self._page, 0, self._turns)


own: Final = Liveness()
"""This process's."""


def new_page() -> int:
    """The descriptor of a fresh page, to be inherited by one child."""
    fd = os.memfd_create("pagewire-progress", os.MFD_CLOEXEC)
    os.truncate(fd, PAGE_BYTES)
    return fd


class Watched:
    """One process as its parent sees it."""

    def __init__(self, page: mmap.mmap, pid: int, now: float) -> None:
        """pid: of the process that was started; another one may show itself in its place. now:
        monotonic seconds, as in `look`."""
        self._page = page
        self._started = pid
        self._turns = -1
        self._since = self._looked = now
        self._processor_wait = ProcessorWait(pid)
        self._waited_s = 0.0
        self.silent_s = 0.0
        """How long it has made no progress, as of the last look."""

    @property
    def incarnation(self) -> int:
        """Under which the stack knows it; 0 as long as it has none."""
        return _LIFE.unpack_from(self._page, _LIFE_AT)[0]

    @property
    def _pid(self) -> int:
        """Of the process that shows itself."""
        return _PID.unpack_from(self._page, _PID_AT)[0] or self._started

    @property
    def was_ready(self) -> bool:
        """It has got as far as serving."""
        return _LIFE.unpack_from(self._page, _LIFE_AT)[1]

    def look(self, now: float) -> bool:
        """Whether it hangs. Call a few times a second.

        What the process waited for a processor does not count: on a busy machine it is late, and
        would be later yet if it were started again."""
        if now - self._looked > PAUSE_S:
            self._since += now - self._looked
        self._looked = now
        (turns,) = _TURNS.unpack_from(self._page, 0)
        waited_s = self._processor_wait.seconds()
        if turns != self._turns:
            self._turns = turns
            self._since = now
            self._waited_s = waited_s
        (patience_s,) = _PATIENCE.unpack_from(self._page, _PATIENCE_AT)
        self.silent_s = now - self._since - max(0.0, waited_s - self._waited_s)
        if not turns:
            patience_s = LOADING_PATIENCE_S
        if STOPPED_PATIENCE_S < self.silent_s <= patience_s < math.inf and is_stopped(self._pid):
            return True
        return self.silent_s > patience_s

    def close(self) -> None:
        """The process is gone."""
        self._page.close()
        self._processor_wait.close()


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process: field 3 of proc(5)'s stat."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    return False


class ProcessorWait:
    """How long the main thread of a process could have run and had no processor. The file of the
    kernel stays open: its reader looks several times a second for as long as the process lives."""

    def __init__(self, pid: int) -> None:
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(f"/proc/{pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def seconds(self) -> float:
        """Since the process started; 0 where the kernel does not count it."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int(os.pread(self._fd, 96, 0).split()[1]) / NANOSECONDS
        return 0.0

    def close(self) -> None:
        """The process is gone."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
