"""The place in a stack of a rank that runs on another host than the stack: its messages go through
a stream that it has inherited, whose other end has an inbox for it in the stack's run directory.

Such a rank is never the first of its group: it only talks to the scheduler, and hears from it who
is there, and whether it is to end.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from pagewire_protocol.channels import DECODE_ERRORS, prepare_run_dir
from pagewire_protocol.messages import Incarnation, Message, Role, ToWorker

from . import liveness
from .frames import FrameStream
from .membership import Membership

STREAM_VARIABLE: Final = "PAGEWIRE_STREAM"
"""Names, in the environment of such a rank, its Stream."""
MESSAGE: Final = 0
"""The kind of a frame: there is one."""


@dataclass(frozen=True)
class Stream:
    """fd: of a stream socket. incarnation, address: of the inbox at its other end."""

    fd: int
    incarnation: int
    address: str

    def as_variable(self) -> str:
        """For the environment of the rank's process."""
        return f"{self.fd}/{self.incarnation}/{self.address}"

    @classmethod
    def inherited(cls) -> "Stream | None":
        """Of this process, None where it has an inbox of its own. Taken once."""
        text = os.environ.pop(STREAM_VARIABLE, "")
        if not text:
            return None
        fd, incarnation, address = text.split("/", 2)
        return cls(int(fd), int(incarnation), address)


class StreamInbox:
    """What arrives through the stream, as channels.Inbox has it."""

    def __init__(self, stream: FrameStream, address: str) -> None:
        self.address = address
        self._stream = stream
        self._decoder = msgspec.msgpack.Decoder(ToWorker)

    def drain(self) -> Iterator[ToWorker]:
        """The messages that have arrived; undecodable ones are dropped. Raises OSError when the
        other end is gone."""
        for frame in self._stream.available():
            try:
                message = self._decoder.decode(frame.data)
            except DECODE_ERRORS:
                continue
            yield message

    def close(self) -> None:
        """Of the connection, both ways."""
        self._stream.close()


class StreamOutbox:
    """Sends through the stream, as channels.Outbox does, to the scheduler alone."""

    def __init__(self, stream: FrameStream) -> None:
        self._stream = stream
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, address: str, message: Message) -> bool:
        """True when it is on its way; `address` is the scheduler's. Several threads may call it."""
        try:
            self._stream.send(MESSAGE, self._encoder.encode(message))
        except OSError:
            return False
        return True


class StreamNode:
    """As Node, of a worker's rank."""

    def __init__(
        self, stream: Stream, run_dir: str | Path, name: str, group: str, rank: int, size: int
    ) -> None:
        """run_dir: of this process's own. Raises as Node."""
        self.run_dir = prepare_run_dir(str(run_dir))
        self.where = f"rank {rank} on {socket.gethostname()}"
        """For errors: files and GPUs are those of another host than the reader's."""
        self.incarnation = Incarnation(stream.incarnation)
        liveness.own.introduce(self.incarnation)
        connection = FrameStream(socket.socket(fileno=stream.fd))
        self.inbox = StreamInbox(connection, stream.address)
        self.outbox = StreamOutbox(connection)
        self.membership = Membership(
            Role.WORKER,
            name,
            self.incarnation,
            self.inbox,
            self.outbox,
            self.run_dir,
            group,
            rank,
            size,
        )

    def close(self, linger_ms: int = 0) -> None:
        """What was sent arrives: the kernel has it."""
        self.inbox.close()
