"""Work that takes long and reports nothing, and a process that goes on saying that it lives: either
is put into a thread. Knows nothing of the work."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

TICK_S = 1.0


def run_in_thread(work: Callable[[], Any], tick: Callable[[], None]) -> Any:
    """What `work` returns or raises; `tick` is called each second meanwhile. A process that is told
    to stop does not wait for it."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="run_in_thread", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(TICK_S)
        tick()
    if failed:
        raise failed[0]
    return found[0]


class Ticker:
    """One thread that calls `tick` each second while this one is inside `with ticker`, for work
    that comes often and sometimes takes long: a step on a CPU. It may come between any two calls of
    that work, never outside of it."""

    def __init__(self, tick: Callable[[], None], tick_s: float = TICK_S) -> None:
        self._tick = tick
        self._tick_s = tick_s
        self._lock = threading.Lock()
        self._is_inside = False
        threading.Thread(target=self._run, name="ticker", daemon=True).start()

    def __enter__(self) -> None:
        """Around one piece of work: `with ticker:`."""
        with self._lock:
            self._is_inside = True

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_inside = False

    def _run(self) -> None:
        while True:
            time.sleep(self._tick_s)
            with self._lock:
                if self._is_inside:
                    self._tick()


@contextlib.contextmanager
def ticking(tick: Callable[[], None]) -> Iterator[None]:
    """`tick` is called each second by another thread while the block runs, for work that must stay
    in this one, such as what binds a GPU's context. It may come between any two calls of the block,
    never after it."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(TICK_S):
            tick()

    thread = threading.Thread(target=run, name="ticking", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
