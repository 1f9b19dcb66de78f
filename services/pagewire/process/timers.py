"""How precisely a thread sleeps. Only the standard library is imported here."""

import ctypes
from typing import Final

PR_SET_TIMERSLACK: Final = 29
"""Of linux/prctl.h."""
SLACK_NS: Final = 1000


def sleep_precisely() -> None:
    """This thread sleeps and waits as long as it says, instead of up to 50 us longer, which the
    kernel takes by default to wake several threads at once. Where that cannot be set it stays so."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)
