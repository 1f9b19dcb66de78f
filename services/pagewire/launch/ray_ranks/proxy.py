"""The process that the supervisor starts and watches in the place of a rank that Ray places. It
ends as the rank does, with its exit status or by the same signal; what a rank of this host prints
goes to the supervisor without it."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from ...config import RunConfig, WorkerConfig
from ...process import last_words, liveness
from ...process.frames import FrameStream
from ...process.group import Place
from ...process.parent import FAILURES_VARIABLE, HEALTH_VARIABLE, Started, how_it_ended
from . import handover, handshake
from .handover import RankDescriptors, RankProcess
from .relay import Relay, UnlikeVersions, receive_hello

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
        self._log_format = run_config.log_format
        self._stage_size = worker.tensor_parallel_size
        self._place = place
        self._driver: subprocess.Popen[bytes] | None = None
        """Rank 0's: of Ray's cluster, for the whole group. It ends with its standard input."""
        self._pass_signal: Callable[[int], None] | None = None
        """To the rank, once there is one."""
        self._is_ending = False
        """The rank was asked to end; with rank 0 Ray's actors end as well, perhaps before they have
        said how."""

    def run(self, process: RankProcess, descriptors: RankDescriptors) -> int:
        signal.signal(signal.SIGTERM, self._on_signal)
        try:
            actor = self._connect()
            if actor is None:
                return 1
            if isinstance(actor, FrameStream):
                return self._run_remote(actor, process, descriptors)
            status = self._status_of(actor, process, descriptors)
        except Stopped:
            return 0
        except ConnectionError as error:
            last_words.say("worker", str(error))
            return 1
        if status is None:
            if not self._is_ending and self._driver_status(DRIVER_S) != SAID_WHY:
                last_words.say("worker", f"Ray's actor of rank {self._place.rank} has ended")
            return 1
        return _ended(status)

    def _status_of(
        self, actor: socket.socket, process: RankProcess, descriptors: RankDescriptors
    ) -> int | None:
        """The rank's exit status, when it has ended; None when the actor is gone."""
        with contextlib.suppress(OSError):
            handover.send(actor, process, descriptors)
            handover.close_all(descriptors)
            self._pass_signal = lambda number: actor.sendall(bytes((number,)))
            return handover.receive_status(actor)
        return None

    def _run_remote(
        self, actor: FrameStream, process: RankProcess, descriptors: RankDescriptors
    ) -> int:
        """The same on another host, with the whole of `run`'s result."""
        rank = self._place.rank
        try:
            hello = receive_hello(actor)
        except UnlikeVersions as error:
            last_words.say("worker", str(error))
            return 1
        status = None
        if hello is not None:
            run_dir = Path(self._run_dir)
            relay = Relay(actor, self._place, run_dir, descriptors.page, descriptors.output)
            self._pass_signal = relay.signal
            status = relay.run(process)
        if status is not None:
            return _ended(status)
        if not self._is_ending:
            where = f" on {hello.host}" if hello is not None else ""
            last_words.say(
                "worker",
                f"the connection to rank {rank}{where} is gone: its host, the network or Ray's "
                "actor has ended",
            )
        return 1

    def _connect(self) -> socket.socket | FrameStream | None:
        """The actor's connection, from this host or another one; None when the driver has failed,
        and it was said why."""
        path = handover.socket_path(self._run_dir, self._place, self._place.rank)
        with (
            handover.listening(path) as listener,
            handover.listening(handshake.listener_path(path)) as offers,
        ):
            if self._place.rank == 0:
                self._start_driver()
            while (status := self._driver_status(0)) is None:
                liveness.own.turn()
                readable, _, _ = select.select([listener, offers], [], [], LOOK_S)
                if listener in readable:
                    return listener.accept()[0]
                if offers in readable:
                    return self._connect_remote(offers.accept()[0])
        if status != SAID_WHY:
            last_words.say("worker", f"the group's driver of Ray {how_it_ended(status)}")
        return None

    def _connect_remote(self, offer: socket.socket) -> FrameStream:
        """Waits for the actor as long as the group is not ended: the proxy of rank 0 sees when Ray
        has lost it."""
        with contextlib.closing(handshake.take_listener(offer)) as listener:
            while (actor := listener.accept(LOOK_S)) is None:
                liveness.own.turn()
        return actor

    def _start_driver(self) -> None:
        place = self._place
        ranks = range(place.size)
        request = {
            "group": place.group,
            "life": place.life,
            "device": self._device,
            "stage_size": self._stage_size,
            "log_format": self._log_format,
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
        if self._pass_signal is None:
            raise Stopped
        self._is_ending = True
        # where the actor is gone, `run` is about to see it
        with contextlib.suppress(OSError):
            self._pass_signal(number)


def _ended(status: int) -> int:
    """As the rank did: its exit status, or its signal for this process."""
    if status < 0:
        _end_by(-status)
    return status


def _end_by(number: int) -> NoReturn:
    """As the rank did."""
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(1)
