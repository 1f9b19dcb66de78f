"""The health of a service that nobody supervises, as in a container: a line in the run directory
that it writes anew each second, so that a health check reads a file and starts nothing. Only the
standard library is imported here."""

import contextlib
import os
import time
from pathlib import Path
from typing import Final

PREFIX: Final = "health-"
LINE_BYTES: Final = 400
WELL: Final = "ok"


class HealthFile:
    """The line of the service `name`: seconds since the machine started, as in /proc/uptime, and
    `ok` or what is missing."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._path = run_dir / f"{PREFIX}{name.replace('/', '_')}"
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, text: str) -> None:
        """The state now. A full disk must not end a service: the line then gets old."""
        now = int(time.clock_gettime(time.CLOCK_BOOTTIME))
        line = f"{now} {' '.join(text.split())}".encode(errors="replace")[: LINE_BYTES - 1]
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, line.ljust(LINE_BYTES - 1) + b"\n", 0)

    def close(self) -> None:
        """The service has ended."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._fd)
        self._fd = -1
