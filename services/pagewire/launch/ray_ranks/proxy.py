"""The process that the supervisor starts and watches in the place of a rank that Ray places. It
ends as the rank does, with its exit status or by the same signal; what the rank prints goes to the
supervisor without it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Final, NoReturn

from ...config import RunConfig, WorkerConfig
from ...process import last_words, liveness
from ...process.group import Place
from ...process.parent import FAILURES_VARIABLE, HEALTH_VARIABLE, Started, how_it_ended
from . import handover
from .handover import RankDescriptors, RankProcess

ON_THIS_HOST: Final = "--distributed-executor-backend=mp"
"""Of the rank itself, which is placed already."""
DRIVER: Final = "pagewire.launch.ray_ranks.placement"
DRIVER_S: Final = 0.5
"""How long it takes at most that a driver which has lost its actors has ended."""
LOOK_S: Final = 0.5
SAID_WHY: Final = 1
"""Exit status of a driver that left a line."""


class Stopped(BaseException):
    """SIGTERM has come before there was a rank."""


def run(run_config: RunConfig, worker: WorkerConfig, arguments: list[str]) -> int:
    """Returns the rank's exit status; 1, with a line that says why, when Ray cannot place the group
    or has lost the actor. `arguments`: of `pagewire worker`."""
    place = Place.inherited()
    assert place is not None
    page = os.dup(int(os.environ[liveness.PAGE_VARIABLE]))
    liveness.own.inherit()
    descriptors = RankDescriptors(os.dup(sys.stdout.fileno()), page, place.fds)
    process = rank_process(arguments, place)
    return _Proxy(run_config, worker, place).run(process, descriptors)


def rank_process(arguments: list[str], place: Place) -> RankProcess:
    """The rank, with this process's environment."""
    variables = {**os.environ, FAILURES_VARIABLE: str(Started.failures)}
    if Started.shows_health:
        variables[HEALTH_VARIABLE] = "1"
    command = (sys.executable, "-m", "pagewire", "worker", *arguments, ON_THIS_HOST)
    return RankProcess(command, os.getcwd(), variables, place.as_variable())


class _Proxy:
    def __init__(self, run_config: RunConfig, worker: WorkerConfig, place: Place) -> None:
        self._run_dir = run_config.run_dir
        self._device = worker.device
        self._place = place
        self._driver: subprocess.Popen[bytes] | None = None
        """Rank 0's: of Ray's cluster, for the whole group. It ends with its standard input."""
        self._actor: socket.socket | None = None

    def run(self, process: RankProcess, descriptors: RankDescriptors) -> int:
        signal.signal(signal.SIGTERM, self._on_signal)
        try:
            actor = self._connect()
            if actor is None:
                return 1
            status = self._status_of(actor, process, descriptors)
        except Stopped:
            return 0
        if status is None:
            if self._driver_status(DRIVER_S) != SAID_WHY:
                last_words.say("worker", f"Ray's actor of rank {self._place.rank} has ended")
            return 1
        if status < 0:
            _end_by(-status)
        return status

    def _status_of(
        self, actor: socket.socket, process: RankProcess, descriptors: RankDescriptors
    ) -> int | None:
        """The rank's exit status, when it has ended; None when the actor is gone."""
        with contextlib.suppress(OSError):
            handover.send(actor, process, descriptors)
            handover.close_all(descriptors)
            self._actor = actor
            return handover.receive_status(actor)
        return None

    def _connect(self) -> socket.socket | None:
        """The actor's connection; None when the driver has failed, and it was said why."""
        path = handover.socket_path(self._run_dir, self._place, self._place.rank)
        with handover.listening(path) as listener:
            if self._place.rank == 0:
                self._start_driver()
            while (status := self._driver_status(0)) is None:
                liveness.own.turn()
                actor = handover.accept(listener, LOOK_S)
                if actor is not None:
                    return actor
        if status != SAID_WHY:
            last_words.say("worker", f"the group's driver of Ray {how_it_ended(status)}")
        return None

    def _start_driver(self) -> None:
        place = self._place
        ranks = range(place.size)
        request = {
            "group": place.group,
            "life": place.life,
            "device": self._device,
            "paths": [str(handover.socket_path(self._run_dir, place, rank)) for rank in ranks],
        }
        self._driver = subprocess.Popen(
            [sys.executable, "-m", DRIVER], stdin=subprocess.PIPE, process_group=0
        )
        assert self._driver.stdin is not None
        self._driver.stdin.write(json.dumps(request).encode() + b"\n")
        self._driver.stdin.flush()

    def _driver_status(self, within_s: float) -> int | None:
        """Of this process's driver, if it has one that has ended or does so within `within_s`
        seconds."""
        if self._driver is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._driver.wait(within_s)
        return self._driver.returncode

    def _on_signal(self, number: int, frame: object) -> None:
        if self._actor is None:
            raise Stopped
        # where the actor is gone, `run` is about to see it
        with contextlib.suppress(OSError):
            self._actor.send(bytes((number,)))


def _end_by(number: int) -> NoReturn:
    """As the rank did."""
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(1)
