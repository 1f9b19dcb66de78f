"""What the proxy of a rank and the rank's actor say to each other, over a socket of the run
directory. Only the standard library is imported here.

The proxy sends a `RankProcess` and the descriptors that the rank inherits, then a byte for each
signal that the rank is to get. The actor sends the rank's exit status when it has ended. Either
side is gone when its end of the socket is closed.
"""

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ...process.group import Place

MOST_FDS: Final = 250
"""The kernel passes at most 253 at a time."""
PIECE_BYTES: Final = 1 << 16

_LENGTH: Final = struct.Struct("=I")
_STATUS: Final = struct.Struct("=i")


@dataclass(frozen=True)
class RankProcess:
    """How the process of a rank is started. place: Place.as_variable, with the proxy's descriptors.
    variables: the whole environment, without those that name descriptors or a parent."""

    command: tuple[str, ...]
    directory: str
    variables: dict[str, str]
    place: str


@dataclass(frozen=True)
class RankDescriptors:
    """What the process of a rank inherits: its output, its page of progress, its Place's."""

    output: int
    page: int
    place: tuple[int, ...]


def socket_path(run_dir: str | Path, place: Place, rank: int) -> Path:
    """Where the proxy of `rank` listens, in this life of the group."""
    return Path(run_dir) / f"{place.life}.{rank}"


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket at `path` that exists within, and takes one connection."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen(1)
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


def accept(listener: socket.socket, timeout_s: float) -> socket.socket | None:
    """The actor's connection; None when it does not come within `timeout_s` seconds."""
    listener.settimeout(timeout_s)
    try:
        connection = listener.accept()[0]
    except TimeoutError:
        return None
    connection.settimeout(None)
    return connection


def send(connection: socket.socket, process: RankProcess, descriptors: RankDescriptors) -> None:
    """Raises OSError when the actor is gone."""
    text = json.dumps(asdict(process)).encode()
    fds = [descriptors.output, descriptors.page, *descriptors.place]
    socket.send_fds(connection, [_LENGTH.pack(len(text))], fds)
    connection.sendall(text)


def receive(connection: socket.socket) -> tuple[RankProcess, RankDescriptors]:
    """Raises ConnectionError when the proxy is gone."""
    head, fds, _, _ = socket.recv_fds(
        connection, _LENGTH.size, MOST_FDS, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL
    )
    if len(head) != _LENGTH.size:
        raise ConnectionError("the proxy of the rank ended before it said what to start")
    (length,) = _LENGTH.unpack(head)
    fields = json.loads(_read(connection, length))
    output, page, *place = fds
    process = RankProcess(**{**fields, "command": tuple(fields["command"])})
    return process, RankDescriptors(output, page, tuple(place))


def send_status(connection: socket.socket, status: int) -> None:
    """As of subprocess. Raises OSError when the proxy is gone."""
    connection.sendall(_STATUS.pack(status))


def receive_status(connection: socket.socket) -> int | None:
    """Waits for the end of the rank; None when the actor is gone."""
    try:
        return _STATUS.unpack(_read(connection, _STATUS.size))[0]
    except ConnectionError:
        return None


def _read(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(min(PIECE_BYTES, length - len(data)))
        if not piece:
            raise ConnectionError("the other end is gone")
        data += piece
    return bytes(data)


def close_all(descriptors: RankDescriptors) -> None:
    """The process of the rank keeps its own copies."""
    for fd in (descriptors.output, descriptors.page, *descriptors.place):
        os.close(fd)
