"""Signals that end a process. Only the standard library is imported here."""

import signal
from collections.abc import Callable, Iterable
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a request to end, and a terminal that was closed."""


def handle(numbers: Iterable[signal.Signals], handler: Callable[..., Any]) -> None:
    """Call `handler` for these signals, except for those that were ignored when this process was
    started: `nohup` ignores SIGHUP, and a shell ignores SIGINT for what a script puts into the
    background, so that they do not end it."""
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
