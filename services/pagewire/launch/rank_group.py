"""`pagewire worker` over several ranks, by itself, as in a container: this process starts one for
each rank, and starts them all again when one of them ends or hangs. In a whole stack the stack's
own supervisor does that.
"""

import dataclasses
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from pagewire_protocol.structs import Role

from ..config import RunConfig, SchedulerConfig, WorkerConfig
from ..process import alive, last_words, signals
from ..process.announce import Announcer
from ..process.parent import HEALTH_VARIABLE
from ..process.watchdog import Stop
from . import stack
from .supervisor import ServiceDeath, Supervisor


def run(run: RunConfig, model: Any, scheduler: SchedulerConfig, worker: WorkerConfig) -> int:
    """Until a signal ends it. 0 after an orderly stop, 1 when the ranks cannot be started or kept
    running: stderr's last line says why. Raises config.BadSetting."""
    stack.check_backend(worker)
    return _RankGroup(run, model, scheduler, worker).run()


class _RankGroup:
    def __init__(
        self, run: RunConfig, model: Any, scheduler: SchedulerConfig, worker: WorkerConfig
    ) -> None:
        service = stack.worker_service(run, model, scheduler, worker)
        self._announcer = Announcer(run.run_dir)
        first, *others = stack.ranks_of(service, worker.world_size)
        first = dataclasses.replace(first, environment=((HEALTH_VARIABLE, "1"),))
        self._supervisor = Supervisor([first, *others], _print_line, self._announce)
        self._stop = Stop(run.shutdown_delay, lambda: alive.living(Path(run.run_dir), "frontend"))

    def run(self) -> int:
        signals.handle(signals.ENDING, self._on_signal)
        try:
            code = self._supervisor.run(self._tick)
        finally:
            self._announcer.close(linger_ms=500)
        if self._supervisor.failure:
            last_words.say("worker", self._supervisor.failure.removeprefix("worker: "))
        return code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGTERM or self._stop.ask():
            self._supervisor.stop()

    def _tick(self) -> None:
        if self._supervisor.all_ready:
            self._supervisor.mark_ready()
        if self._stop.is_due(time.monotonic()):
            self._supervisor.stop()

    def _announce(self, death: ServiceDeath) -> None:
        self._announcer.announce(
            Role.WORKER,
            death.service.name,
            death.incarnation,
            death.cause,
            death.failures,
            death.pause_s,
        )


def _print_line(name: str, line: str) -> None:
    print(line, file=sys.stderr, flush=True)
