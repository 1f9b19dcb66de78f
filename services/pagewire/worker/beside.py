"""Work that takes long and reports nothing, in a thread, so that its process can go on saying that it lives. Knows nothing of the work."""

import threading
from collections.abc import Callable
from typing import Any

TICK_S = 1.0


def beside(work: Callable[[], Any], tick: Callable[[], None]) -> Any:
    """What `work` returns or raises; `tick` is called each second meanwhile. A process that is told to stop does not wait for it."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="beside", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(TICK_S)
        tick()
    if failed:
        raise failed[0]
    return found[0]
