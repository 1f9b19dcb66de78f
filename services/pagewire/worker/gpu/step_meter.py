"""How busy the GPU is: the time that steps take on it and the time between them, logged once a
second. For `--log-steps`.

Knows steps by their number of tokens alone. It costs two events a step and no wait.
"""

import logging
import time
from collections import deque
from typing import Final

import torch

log = logging.getLogger("pagewire.worker")
EVERY_S: Final = 1.0


class StepMeter:
    """A StepObserver (runner.py)."""

    def __init__(self) -> None:
        self._steps: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()
        self._began: torch.cuda.Event | None = None
        self._next = time.monotonic() + EVERY_S

    def begin(self) -> None:
        """Before a step's first launch."""
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record()

    def end(self, tokens: int) -> None:
        """After its last; the step computed so many tokens."""
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        if self._began is not None:
            self._steps.append((self._began, ended, tokens))
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY_S
            self._log()

    def _log(self) -> None:
        """Of the steps that are over. A pause of the load counts as time between steps, so look at
        seconds under load."""
        busy = idle = 0.0
        steps = tokens = 0
        while len(self._steps) > 1 and self._steps[1][1].query():
            began, ended, count = self._steps.popleft()
            busy += began.elapsed_time(ended)
            idle += ended.elapsed_time(self._steps[0][0])
            steps += 1
            tokens += count
        if steps:
            log.info(
                "%d steps of %.1f tokens and %.2f ms; between them %.3f ms, %.1f%% of the time",
                steps, tokens / steps, busy / steps, idle / steps, 100 * idle / (busy + idle),
            )  # fmt: skip
