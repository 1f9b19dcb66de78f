"""Frames over Unix sockets: many senders, one receiver. Knows bytes and paths, nothing of messages, roles or threads.

A frame is in the kernel when the call that sends it returns, and the receiver's own thread takes it out: no other thread is woken on the
way, which would be most of what a message costs between processes that sleep. A frame is its length, four bytes, little-endian, and so
many bytes.
"""

import contextlib
import os
import select
import socket
import struct
import time
from collections import deque
from pathlib import Path
from typing import Final

LENGTH: Final = struct.Struct("<I")
READ: Final = 1 << 18
"""Bytes taken from a sender at a time."""
SEND_BUFFER: Final = 1 << 22
"""Bytes that the kernel may hold for a receiver, if it allows so many."""
BACKLOG: Final = 1024
RETRY_S: Final = (0.02, 0.5)
"""The first pause between two attempts to reach a receiver, and the longest; each is twice the one before."""


def framed(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


class _Peer:
    """A connection from a sender: what has come of its next frame, and how many bytes there must be before it is worth a look."""

    __slots__ = ("link", "needs", "rest")

    def __init__(self, link: socket.socket) -> None:
        self.link, self.rest, self.needs = link, bytearray(), LENGTH.size


class Receiver:
    """Bound to `path`, in place of what may have been there. `frames` holds what has arrived, without the lengths.

    A sender that announces more than `most` bytes is cut off."""

    def __init__(self, path: str, most: int) -> None:
        self.frames: deque[bytes] = deque()
        self._path, self._most = path, most
        self._peers: dict[int, _Peer] = {}
        self._buffer = memoryview(bytearray(READ))
        self._listener = _bound(path)
        self._poll = select.epoll()
        self._poll.register(self._listener, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable while `receive` has something to do."""
        return self._poll.fileno()

    def watch(self, fd: int) -> None:
        """Have `receive` tell when this descriptor can be read, too."""
        self._poll.register(fd, select.EPOLLIN)

    def receive(self, timeout_s: float | None) -> list[int]:
        """Take what has arrived, after waiting up to `timeout_s` for anything at all. Returns the descriptors where something happened;
        it may be less than a whole frame."""
        ready = [fd for fd, _ in self._poll.poll(None if timeout_s is None else max(0.0, timeout_s))]
        for fd in ready:
            if (peer := self._peers.get(fd)) is not None:
                self._read(fd, peer)
            elif fd == self._listener.fileno():
                self._accept()
        return ready

    def _accept(self) -> None:
        """Who connects has something to say: it is read at once."""
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                fd = connection.fileno()
                peer = self._peers[fd] = _Peer(connection)
                self._poll.register(fd, select.EPOLLIN)
                self._read(fd, peer)

    def _read(self, fd: int, peer: _Peer) -> None:
        try:
            count = peer.link.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count:
            peer.rest += self._buffer[:count]
        if not count or (len(peer.rest) >= peer.needs and not self._split(peer)):
            del self._peers[fd]
            peer.link.close()

    def _split(self, peer: _Peer) -> bool:
        """Cut the whole frames off. False when the next one is longer than it may be."""
        data, at, peer.needs = bytes(peer.rest), 0, LENGTH.size
        while len(data) - at >= LENGTH.size:
            (size,) = LENGTH.unpack_from(data, at)
            if size > self._most:
                return False
            start = at + LENGTH.size
            if len(data) - start < size:
                peer.needs += size
                break
            at = start + size
            self.frames.append(data[start:at])
        del peer.rest[:at]
        return True

    def close(self) -> None:
        for peer in self._peers.values():
            peer.link.close()
        self._peers.clear()
        self._listener.close()
        self._poll.close()
        Path(self._path).unlink(missing_ok=True)


def _bound(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o077)
    try:
        Path(path).unlink(missing_ok=True)
        listener.bind(path)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(old)
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


class Sender:
    """The way to the receiver at `path`, which need not be there yet. What cannot go waits, at most `most` frames: call `push` again."""

    def __init__(self, path: str, most: int) -> None:
        self.waiting: deque[bytes] = deque()
        self.retry_at = 0.0
        """Monotonic seconds; a receiver that could not be reached is not tried again before."""
        self._path, self._most = path, most
        self._socket: socket.socket | None = None
        self._proven = False
        self._gone = 0
        """Bytes of the first waiting frame that the kernel has."""
        self._pause = RETRY_S[0]

    @property
    def blocked(self) -> int | None:
        """The descriptor that must become writable before a `push` can do anything."""
        return self._socket.fileno() if self._socket and self.waiting else None

    def send(self, frame: bytes) -> bool:
        """False when too much waits. `frame`: with its length."""
        if len(self.waiting) >= self._most:
            return False
        self.waiting.append(frame)
        self.push()
        return True

    def push(self) -> None:
        """Send what waits, as far as the kernel takes it. A frame that breaks off with its connection is lost, like those before it that
        the receiver had not read."""
        waiting = self.waiting
        while waiting and (link := self._socket or self._connect()):
            frame = waiting[0]
            try:
                self._gone += link.send(memoryview(frame)[self._gone :] if self._gone else frame)
            except BlockingIOError:
                return
            except OSError:
                self._broken()
                continue
            self._proven = True
            if self._gone == len(frame):
                waiting.popleft()
                self._gone = 0

    def _connect(self) -> socket.socket | None:
        if time.monotonic() < self.retry_at:
            return None
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.setblocking(False)
        try:
            link.connect(self._path)
        except OSError:
            link.close()
            self._later()
            return None
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._socket, self._proven = link, False
        return link

    def _later(self) -> None:
        self.retry_at = time.monotonic() + self._pause
        self._pause = min(RETRY_S[1], 2 * self._pause)

    def _broken(self) -> None:
        """A successor may be there already; one that takes nothing either is given time."""
        if self._gone:
            self.waiting.popleft()
        if self._proven:
            self._pause = RETRY_S[0]
        else:
            self._later()
        self.close()

    def close(self) -> None:
        """Let go of the connection; what waits stays."""
        if self._socket:
            self._socket.close()
        self._socket, self._gone = None, 0
