"""Ends Python code that runs too long, in whatever thread it runs. It does not know what the code
is.

A chat template is a program: `range` and output are limited elsewhere, but nested loops that print
nothing could run for ever. The code runs inside `with limit:`, which costs two dictionary
operations; a daemon thread checks a few times a second and raises RenderTimeout inside a block
that is late.
"""

import ctypes
import threading
import time


class RenderTimeout(Exception):
    """Raised inside the late block."""


class RenderLimit:
    """A context manager that ends what runs inside it after `timeout_s`. One serves all threads."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._since: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="render-limit", daemon=True)
            self._thread.start()
        with self._lock:
            self._since[threading.get_ident()] = time.monotonic()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            late = self._since.pop(threading.get_ident(), None) is None
        if late:
            # The exception is pending: the interpreter raises it at the next jump backwards. This
            # loop has some, so it is raised here, inside the caller's `try`.
            for _turn in range(10_000):
                pass

    def _watch(self) -> None:
        while True:
            time.sleep(self.timeout_s / 4)
            limit = time.monotonic() - self.timeout_s
            with self._lock:
                for thread in [thread for thread, since in self._since.items() if since < limit]:
                    del self._since[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(RenderTimeout)
                    )
