"""The proxy's side of a rank on another host: it is the rank's end of all that the ranks of one
host share, and passes it on.

It reads the ring and the rank's inbox, and writes the page of progress, the output and what the
rank says to the scheduler. Each direction that waits has a thread of its own.
"""

import contextlib
import mmap
import os
import queue
import threading
from pathlib import Path
from typing import Final

from pagewire_protocol.channels import (
    NO_INCARNATION,
    Inbox,
    Outbox,
    inbox_address,
    new_incarnation,
)
from pagewire_protocol.messages import Role, ToWorker

from ...process import liveness
from ...process.frames import Frame, FrameStream
from ...process.group import Place, RingReader
from ...version import __version__
from . import handover
from .handover import Hello, Kind, RankProcess, StartRequest

LOOK_S: Final = 1.0
LINGER_MS: Final = 500
"""For the rank's last words to the scheduler."""


class UnlikeVersions(ValueError):
    """The other host has another version of Pagewire; the message names both."""


def receive_hello(connection: FrameStream) -> Hello | None:
    """Who is at the other end; None when it is gone. Raises UnlikeVersions."""
    try:
        frame = connection.receive()
        if frame is None:
            return None
        hello = Hello.decode(frame.data)
    except (OSError, ValueError, TypeError):
        return None
    if hello.version != __version__:
        raise UnlikeVersions(
            f"{hello.host} has Pagewire {hello.version}, and this machine {__version__}: install "
            "one version on all hosts of a group"
        )
    return hello


class Relay:
    """Of one rank, from its start to its end."""

    def __init__(
        self, connection: FrameStream, place: Place, run_dir: Path, page: int, output: int
    ) -> None:
        """page, output: descriptors of the rank's page of progress and of where it prints to."""
        self._connection = connection
        self._ring = RingReader(place)
        self._page = mmap.mmap(page, liveness.PAGE_BYTES)
        self._output = output
        self._incarnation = new_incarnation()
        self._inbox: Inbox[ToWorker] = Inbox(run_dir, Role.WORKER, self._incarnation)
        self._outbox = Outbox()
        self._scheduler = inbox_address(run_dir, Role.SCHEDULER, NO_INCARNATION)
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._has_ended = False

    def run(self, process: RankProcess) -> int | None:
        """Start the rank, and pass on all that comes and goes. Its exit status, when it has ended;
        None when the connection is gone."""
        request = StartRequest(process, self._incarnation, self._inbox.address)
        listener = threading.Thread(target=self._pass_messages, name="messages", daemon=True)
        status = None
        with contextlib.suppress(OSError):
            self._connection.send(Kind.START, request.encode())
            listener.start()
            for passing in (self._pass_records, self._pass_signals):
                threading.Thread(target=passing, name=passing.__name__, daemon=True).start()
            status = self._take_all()
        self._end(listener)
        return status

    def signal(self, number: int) -> None:
        """For the rank; safe from a signal handler."""
        self._signals.put(number)

    def _take_all(self) -> int | None:
        """What comes from the actor, until the rank has ended. Raises OSError."""
        while (frame := self._connection.receive()) is not None:
            if frame.kind == Kind.STATUS:
                return handover.decode_status(frame.data)
            self._take(frame)
        return None

    def _take(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.MESSAGE:
                self._outbox.send_frame(self._scheduler, frame.data)
            case Kind.PAGE:
                data = frame.data[: liveness.SHARED_BYTES]
                self._page[: len(data)] = data
            case Kind.OUTPUT:
                _write(self._output, frame.data)
            case _:
                raise ConnectionError(f"an actor sends no frames of kind {frame.kind}")

    def _pass_records(self) -> None:
        with contextlib.suppress(OSError):
            while not self._has_ended:
                record = self._ring.read(LOOK_S)
                if record is not None:
                    self._connection.send(Kind.RECORD, record)

    def _pass_messages(self) -> None:
        with contextlib.suppress(OSError):
            while not self._has_ended:
                self._inbox.wait(LOOK_S)
                for frame in self._inbox.frames():
                    self._connection.send(Kind.MESSAGE, frame)

    def _pass_signals(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._connection.send(Kind.SIGNAL, bytes((self._signals.get(),)))

    def _end(self, listener: threading.Thread) -> None:
        self._has_ended = True
        self._connection.shut()
        self._inbox.wake()
        if listener.ident is not None:
            listener.join()
        self._inbox.close()
        self._outbox.close(LINGER_MS)


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
