"""What the proxy of a rank and the rank's actor say to each other. Only the standard library is
imported here.

On one host it goes over a socket of the run directory. The proxy sends a `RankProcess` and the
descriptors that the rank inherits, then a byte for each signal that the rank is to get. The actor
sends the rank's exit status when it has ended. Either side is gone when its end of the socket is
closed.

Between hosts it goes over TCP, as frames of a `Kind`: with the above, what the descriptors stand
for. The actor begins with who it is, the proxy answers with a `StartRequest`.
"""

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

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


class Kind(IntEnum):
    """Of a frame between hosts."""

    HELLO = 1
    """From the actor: JSON of a `Hello`."""
    START = 2
    """From the proxy: JSON of a `StartRequest`."""
    RECORD = 3
    """From the proxy: a record of the ring."""
    MESSAGE = 4
    """Both ways: a message of the stack, to or from the rank."""
    SIGNAL = 5
    """From the proxy: its number, a byte."""
    PAGE = 6
    """From the actor: the rank's page of progress, but for the process id."""
    OUTPUT = 7
    """From the actor: what the rank printed."""
    STATUS = 8
    """From the actor: the rank's exit status, the last frame."""


@dataclass(frozen=True)
class Hello:
    """version: of Pagewire, where the actor is. host: its name."""

    version: str
    host: str

    def encode(self) -> bytes:
        """As the data of a frame."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Hello":
        """Raises ValueError and TypeError for what is none."""
        return cls(**json.loads(data))


@dataclass(frozen=True)
class StartRequest:
    """What an actor on another host is to start. incarnation, address: of the rank's inbox."""

    process: RankProcess
    incarnation: int
    address: str

    def encode(self) -> bytes:
        """As the data of a frame."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> "StartRequest":
        """What `encode` wrote."""
        fields = json.loads(data)
        return cls(**{**fields, "process": _rank_process(fields["process"])})


CARRIED: Final = (
    "PAGEWIRE_", "HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "TRITON_", "NCCL_", "GLOO_", "UCX_",
    "CUDA_", "OMP_", "GOMP_", "MKL_", "PYTHONSAFEPATH", "PYTHONHASHSEED",
)  # fmt: skip
"""Beginnings of the names of variables that go to another host; the others are that host's own."""
NOT_CARRIED: Final = (
    "_TOKEN", "_KEY", "_KEYS", "_HOME", "_PATH", "_DIR", "_CACHE", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""Endings of those that do not: nothing on the way is encrypted, and directories and GPUs are the
other host's own."""


def carried(variables: dict[str, str]) -> dict[str, str]:
    """Those that a rank on another host gets from this one."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(CARRIED) and not name.endswith(NOT_CARRIED)
    }


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
    return _rank_process(fields), RankDescriptors(output, page, tuple(place))


def _rank_process(fields: dict[str, Any]) -> RankProcess:
    return RankProcess(**{**fields, "command": tuple(fields["command"])})


def send_status(connection: socket.socket, status: int) -> None:
    """As of subprocess. Raises OSError when the proxy is gone."""
    connection.sendall(encode_status(status))


def encode_status(status: int) -> bytes:
    """Of subprocess, as bytes."""
    return _STATUS.pack(status)


def decode_status(data: bytes) -> int:
    """What `encode_status` wrote."""
    return _STATUS.unpack(data)[0]


def receive_status(connection: socket.socket) -> int | None:
    """Waits for the end of the rank; None when the actor is gone."""
    try:
        return decode_status(_read(connection, _STATUS.size))
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
