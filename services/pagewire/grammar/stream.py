"""Frames out of a socket's bytes. Knows no messages."""

import socket

from .messages import HEAD

CHUNK = 1 << 18


class FrameReader:
    """What has arrived at `source`."""

    def __init__(self, source: socket.socket) -> None:
        self.may_have_more = False
        """The last reading took as much as one can."""
        self._source = source
        self._data = bytearray()

    def read(self) -> list[bytes] | None:
        """The frames that are whole after one reading; None where the socket has ended. Raises
        BlockingIOError where nothing is there and the socket does not block."""
        try:
            data = self._source.recv(CHUNK)
        except (ConnectionError, TimeoutError):
            return None
        if not data:
            return None
        self.may_have_more = len(data) == CHUNK
        self._data += data
        frames: list[bytes] = []
        start = 0
        while len(self._data) - start >= HEAD.size:
            (size,) = HEAD.unpack_from(self._data, start)
            end = start + HEAD.size + size
            if end > len(self._data):
                break
            frames.append(bytes(self._data[start + HEAD.size : end]))
            start = end
        del self._data[:start]
        return frames
