"""Which processes of a kind live in a run directory, and which of them are about to leave: each
holds the lock of a file, which the kernel frees however the process ends. Only the standard library
is imported here."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

PREFIX: Final = "alive-"
LEAVING: Final = b"leaving"


class Alive:
    """Shows that this process lives, as `kind` and under `incarnation`."""

    def __init__(self, run_dir: Path, kind: str, incarnation: int) -> None:
        """Raises OSError."""
        self._path = run_dir / f"{PREFIX}{kind}-{incarnation:016x}"
        fresh = self._path.with_suffix(".new")
        self._fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Locked before others can see it: to them a file without a lock is one of a dead process.
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        fresh.rename(self._path)

    def leave(self) -> None:
        """This process was told to end, and finishes what it has."""
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, LEAVING, 0)

    def close(self) -> None:
        """It ends now."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._fd)


def living(run_dir: Path, kind: str) -> dict[int, bool]:
    """Whether it is leaving, of each living process of this kind, by incarnation. Files of dead
    ones are removed."""
    found: dict[int, bool] = {}
    start = f"{PREFIX}{kind}-"
    for path in run_dir.glob(f"{start}*"):
        digits = path.name.removeprefix(start)
        with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
            incarnation = int(digits, 16)
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found[incarnation] = file.read(len(LEAVING)) == LEAVING
            else:
                path.unlink()
    return found
