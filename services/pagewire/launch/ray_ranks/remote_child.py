"""What the actor of a rank does on another host than `pagewire serve`: it has there what the ranks
of one host share, a ring, a page of progress, a pipe and an inbox's place, all for this rank alone,
and passes on what comes and goes.
"""

import contextlib
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ...process import liveness
from ...process.frames import FrameStream
from ...process.group import GroupMemory, Place, RingWriter
from ...process.hosts import HOSTS_VARIABLE, Hosts
from ...process.stream_node import MESSAGE, STREAM_VARIABLE, Stream
from ...version import __version__
from .. import stack
from . import child, handover, handshake
from .handover import Hello, Kind, RankDescriptors, RankProcess, StartRequest

PAGE_S: Final = 0.1
"""How often it is looked whether the rank makes progress."""
LAST_WORDS_S: Final = 2.0
"""How long what a rank has left when it ended is waited for; a process of its own may hold its
output."""
RUN_DIR: Final = "--run-dir="
OF_THE_ACTOR: Final = "OMP_NUM_THREADS"
"""Set by Ray for a process of its own."""


@dataclass(frozen=True)
class Assignment:
    """Where the proxy of a rank listens, and the secret by which it knows the actor. devices,
    hosts: as of child.run_rank."""

    host: str
    port: int
    secret: bytes
    devices: str | None
    hosts: Hosts


def run_rank(assignment: Assignment) -> None:
    """As child.run_rank. Raises NoProxy and, for a program that cannot be started, OSError."""
    connection = handshake.connect(assignment.host, assignment.port, assignment.secret)
    try:
        connection.send(Kind.HELLO, Hello(__version__, socket.gethostname()).encode())
        frame = connection.receive()
        if frame is None:
            return  # the proxy says why, if it is not gone
        run_dir = stack.new_run_dir()
        try:
            _RemoteRank(connection, StartRequest.decode(frame.data), assignment, run_dir).run()
        finally:
            stack.remove_run_dir(run_dir)
    finally:
        connection.close()


class _RemoteRank:
    """One rank, from its start to its end."""

    def __init__(
        self, connection: FrameStream, request: StartRequest, assignment: Assignment, run_dir: Path
    ) -> None:
        """Starts the rank."""
        self._connection = connection
        self._group = Place.read(request.process.place)
        self._memory = GroupMemory(self._group.group, 2)
        self._ring = RingWriter(self._memory.place(0))
        page = liveness.new_page()
        self._page = mmap.mmap(page, liveness.PAGE_BYTES)
        self._output, output = os.pipe()
        own, theirs = socket.socketpair()
        self._messages = FrameStream(own)
        stream = Stream(theirs.fileno(), request.incarnation, request.address)
        variables = {
            STREAM_VARIABLE: stream.as_variable(),
            HOSTS_VARIABLE: assignment.hosts.as_variable(),
        }
        with theirs:
            self._child = child.start(
                of_this_host(request.process, run_dir),
                RankDescriptors(output, page, self._place_fds()),
                assignment.devices,
                variables,
                (theirs.fileno(),),
            )
        self._watched = liveness.Watched(self._page, self._child.pid, time.monotonic())
        self._is_alone = False
        """The proxy is gone, or the rank hangs."""

    def _place_fds(self) -> tuple[int, ...]:
        """Of the rank's place in its group. The rank uses only its own part of them, and this ring
        has one reader: it stands for every other one, too."""
        place = self._memory.place(1)
        others = self._group.size - 1
        fds = (place.ring_fd, *place.filled_fds * others, *place.freed_fds * others)
        return tuple(os.dup(fd) for fd in fds)

    def run(self) -> None:
        """Until the rank has ended, at the latest when the proxy is gone."""
        passing = [
            threading.Thread(target=self._pass_output, name="output", daemon=True),
            threading.Thread(target=self._pass_messages, name="messages", daemon=True),
        ]
        taking = threading.Thread(target=self._take_all, name="from the proxy", daemon=True)
        for thread in (*passing, taking):
            thread.start()
        try:
            self._watch()
        finally:
            child.signal_group(self._child, signal.SIGKILL)
            status = self._child.wait()
            deadline = time.monotonic() + LAST_WORDS_S
            for thread in passing:
                thread.join(max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                self._connection.send(Kind.STATUS, handover.encode_status(status))
            self._close(taking)

    def _watch(self) -> None:
        """Until the rank has ended or is alone: show its progress to the proxy, and look at it as
        the one that starts a group does."""
        end = os.pidfd_open(self._child.pid)
        gone = select.poll()
        gone.register(end, select.POLLIN)
        gone.register(self._connection, select.POLLRDHUP)
        shown = b""
        try:
            while not self._is_alone:
                page = self._page[: liveness.SHARED_BYTES]
                if page != shown:
                    self._connection.send(Kind.PAGE, page)
                    shown = page
                if gone.poll(1000 * PAGE_S):
                    return
                self._kill_if_hung()
        except OSError:
            return
        finally:
            os.close(end)

    def _kill_if_hung(self) -> None:
        if self._watched.look(time.monotonic()):
            who = f"rank {self._group.rank} on {socket.gethostname()}"
            line = f"{who} made no progress for {self._watched.silent_s:.1f} s: killed\n"
            self._connection.send(Kind.OUTPUT, line.encode())
            self._is_alone = True

    def _take_all(self) -> None:
        """In a thread: what comes from the proxy. A rank that takes no records for long hangs, and
        is alone."""
        with contextlib.suppress(OSError):
            while (frame := self._connection.receive()) is not None:
                match frame.kind:
                    case Kind.RECORD:
                        self._ring.write(frame.data)
                    case Kind.MESSAGE:
                        self._messages.send(MESSAGE, frame.data)
                    case Kind.SIGNAL:
                        child.signal_group(self._child, frame.data[0])
                    case _:
                        break
        self._is_alone = True

    def _pass_output(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._output, handover.PIECE_BYTES):
                self._connection.send(Kind.OUTPUT, data)

    def _pass_messages(self) -> None:
        with contextlib.suppress(OSError):
            while (frame := self._messages.receive()) is not None:
                self._connection.send(Kind.MESSAGE, frame.data)

    def _close(self, taking: threading.Thread) -> None:
        self._connection.shut()
        self._messages.shut()
        taking.join(LAST_WORDS_S)
        if taking.is_alive():
            return  # it waits for room in a ring that nobody reads; the actor ends soon
        self._watched.close()
        self._messages.close()
        self._memory.close()
        os.close(self._output)


def of_this_host(process: RankProcess, run_dir: Path) -> RankProcess:
    """`process`, which another host describes, with this one's interpreter, directories and
    variables."""
    words = [word for word in process.command[1:] if not word.startswith(RUN_DIR)]
    own = {name: value for name, value in os.environ.items() if name != OF_THE_ACTOR}
    directory = process.directory
    if not os.path.isdir(directory):
        directory = os.path.expanduser("~")
    return replace(
        process,
        command=(sys.executable, *words, f"{RUN_DIR}{run_dir}"),
        directory=directory,
        variables={**own, **handover.carried(process.variables)},
    )
