"""Typed pieces of bytes, *frames*, over a stream socket, both ways. Only the standard library is
imported here."""

import select
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Final, NamedTuple

MOST_BYTES: Final = 1 << 27
"""Of one frame: a message of the stack has half of it at most."""
PIECE_BYTES: Final = 1 << 16

_HEAD: Final = struct.Struct("!BI")


class Frame(NamedTuple):
    """One piece. kind: 0 to 255, by whoever uses the connection."""

    kind: int
    data: bytes


class FrameTooLong(ConnectionError):
    """The other end says that a frame has more bytes than any has: it is not who it should be."""


class FrameStream:
    """One end of a connected stream socket, which it owns. Any thread may send, one may receive."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._received = bytearray()

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._connection.fileno()

    def send(self, kind: int, data: bytes = b"") -> None:
        """Waits while the other end takes nothing. Raises OSError when it is gone."""
        with self._sending:
            self._connection.sendall(_HEAD.pack(kind, len(data)) + data)

    def receive(self) -> Frame | None:
        """The next frame, for which it waits; None when the other end has closed. Raises OSError
        when it is gone in some other way."""
        while (frame := self._take()) is None:
            if not self._fill():
                return None
        return frame

    def available(self) -> Iterator[Frame]:
        """The frames that have arrived. Raises OSError when the other end is gone."""
        while select.select([self._connection], [], [], 0)[0] and self._fill():
            pass
        while (frame := self._take()) is not None:
            yield frame

    def _fill(self) -> bool:
        piece = self._connection.recv(PIECE_BYTES)
        self._received += piece
        return bool(piece)

    def _take(self) -> Frame | None:
        received = self._received
        if len(received) < _HEAD.size:
            return None
        kind, length = _HEAD.unpack_from(received)
        if length > MOST_BYTES:
            raise FrameTooLong(f"a frame of {length} bytes was announced, {MOST_BYTES} are allowed")
        end = _HEAD.size + length
        if len(received) < end:
            return None
        frame = Frame(kind, bytes(received[_HEAD.size : end]))
        del received[:end]
        return frame

    def shut(self) -> None:
        """End the connection for both ends, and every `receive` of it; `close` is still due."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Let go of the socket."""
        self._connection.close()
