"""How many processors there are for this process. Only the standard library is imported here."""

import contextlib
import os
from pathlib import Path
from typing import Final

QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def usable() -> int:
    """Those of its affinity, or of its control group's quota if that is less."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = QUOTA.read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count
