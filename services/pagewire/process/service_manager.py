"""What a service manager such as systemd wants to hear (sd_notify(3)): a datagram to the socket
that NOTIFY_SOCKET names. Without that variable nothing is sent. Only the standard library is
imported here."""

import contextlib
import os
import socket
from collections.abc import Mapping
from typing import Final

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"
WATCHDOG: Final = "WATCHDOG=1"
MICROSECONDS: Final = 1_000_000
PATIENCE_S: Final = 1.0


class ServiceManager:
    """Tells the manager of this process how far it is. `tick` is called often."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the zero byte of Linux's abstract names.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._every_s = _watchdog_s(environment) / 2
        self._next = 0.0

    def say(self, *states: str, timeout_s: float = PATIENCE_S) -> None:
        """States as in sd_notify(3). What does not reach the manager in time, because it does not
        read, is no reason to end or to wait."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(timeout_s)
            out.connect(self._address)
            out.send("\n".join(states).encode())

    def tick(self, now: float) -> None:
        """now: monotonic seconds. Twice in each period of the manager's watchdog, which begins with
        READY, it hears that this process lives."""
        if self._every_s and now >= self._next:
            self._next = now + self._every_s
            self.say(WATCHDOG, timeout_s=0.0)


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """The watchdog's period; 0 where there is none, or where it is for another process."""
    pid = environment.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return 0.0
    text = environment.get("WATCHDOG_USEC", "")
    return int(text) / MICROSECONDS if text.isdecimal() else 0.0
