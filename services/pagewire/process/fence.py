"""What one process writes to memory that others have, they see in that order. Only the standard
library is imported here."""

import ctypes
import platform
from typing import Final

KEEPS_ORDER: Final = platform.machine() == "x86_64"
"""Stores are seen in their order, and loads happen in theirs."""
NR_MEMBARRIER: Final = {"x86_64": 324}.get(platform.machine(), 283)
"""Of asm/unistd.h; 283 on all newer architectures."""
GLOBAL_EXPEDITED: Final = 2
"""Of linux/membarrier.h."""
_libc: Final = ctypes.CDLL(None, use_errno=True)


def membarrier() -> bool:
    """A full barrier of the calling thread, by the kernel; whether it knows the call (Linux 4.16)."""
    return _libc.syscall(NR_MEMBARRIER, GLOBAL_EXPEDITED, 0, 0) == 0


def fence() -> None:
    """What is before it in this thread happens before what is behind it, for other processes too.
    Python has no such instruction, so where the processor needs one it is a system call. A kernel
    that refuses it leaves the order to the locks of the call itself."""
    if not KEEPS_ORDER:
        membarrier()
