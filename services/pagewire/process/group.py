"""Processes that run one model together: how each knows its rank, and the memory by which rank 0
hands bytes to the others. Only the standard library is imported here.

Whoever starts a group makes a `GroupMemory` for one life of it, and gives every rank the `Place`
that it has. The memory is a ring: one writes, all others read everything. What is there, and what
is free, is counted by eventfds, through which the kernel orders memory between processes; nothing
polls, and nothing is left behind when a group ends.
"""

import contextlib
import mmap
import os
import secrets
import select
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

PLACE_VARIABLE: Final = "PAGEWIRE_RANK"
"""Names, in a child's environment, its place in a group; not there in a process that is alone."""
RING_BYTES: Final = 1 << 20
"""A step of decodes is some tens of bytes; what is longer than the ring goes through it in
pieces."""
PATIENCE_S: Final = 60.0
"""How long rank 0 waits for a rank that reads nothing: longer than steps take."""

_LENGTH: Final = struct.Struct("=Q")


class RankSilent(ConnectionError):
    """Another rank neither reads nor writes: it has ended, or hangs."""


@dataclass(frozen=True)
class Place:
    """One rank of one life of a group. ring_fd: the ring's memory. filled_fds, freed_fds: of each
    rank but the first, the eventfds that count the bytes written for it and those it has read."""

    group: str
    rank: int
    size: int
    life: str
    """Of this life of the group alone."""
    ring_fd: int
    filled_fds: tuple[int, ...]
    freed_fds: tuple[int, ...]

    @property
    def fds(self) -> tuple[int, ...]:
        """All descriptors that the process must inherit."""
        return (self.ring_fd, *self.filled_fds, *self.freed_fds)

    def as_variable(self) -> str:
        """For the environment of the rank's process."""
        fds = ",".join(map(str, self.fds))
        return f"{self.rank}/{self.size}/{self.life}/{fds}/{self.group}"

    def with_fds(self, fds: Sequence[int]) -> "Place":
        """The same place with other descriptors of the same memory, in the order of `fds`."""
        ring, *others = fds
        half = len(others) // 2
        return replace(
            self, ring_fd=ring, filled_fds=tuple(others[:half]), freed_fds=tuple(others[half:])
        )

    @classmethod
    def inherited(cls) -> "Place | None":
        """That of this process, None where it is alone. Taken once."""
        text = os.environ.pop(PLACE_VARIABLE, "")
        return cls.read(text) if text else None

    @classmethod
    def read(cls, text: str) -> "Place":
        """What `as_variable` wrote."""
        rank, size, life, fds, group = text.split("/", 4)
        ring, *others = map(int, fds.split(","))
        half = len(others) // 2
        return cls(
            group, int(rank), int(size), life, ring, tuple(others[:half]), tuple(others[half:])
        )


class GroupMemory:
    """What the ranks of one life of a group share, as the process holds it that starts them."""

    def __init__(self, group: str, size: int) -> None:
        self._group = group
        self._size = size
        self._life = secrets.token_hex(8)
        self._ring = os.memfd_create("pagewire-ring", os.MFD_CLOEXEC)
        os.truncate(self._ring, RING_BYTES)
        self._filled = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(size - 1)]
        self._freed = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(size - 1)]

    def place(self, rank: int) -> Place:
        """For the process of `rank`."""
        return Place(
            self._group,
            rank,
            self._size,
            self._life,
            self._ring,
            tuple(self._filled),
            tuple(self._freed),
        )

    def close(self) -> None:
        """The processes keep theirs."""
        for fd in (self._ring, *self._filled, *self._freed):
            os.close(fd)


class RingWriter:
    """Rank 0's end."""

    def __init__(self, place: Place, patience_s: float = PATIENCE_S) -> None:
        self._ring = mmap.mmap(place.ring_fd, RING_BYTES)
        self._filled = place.filled_fds
        self._freed = place.freed_fds
        self._room = [RING_BYTES] * len(self._filled)
        self._at = 0
        self._patience_s = patience_s

    def write(self, record: bytes) -> None:
        """Hand `record` to all other ranks. Raises RankSilent where one has read nothing for so
        long that there is no room."""
        rest = memoryview(_LENGTH.pack(len(record)) + record)
        while rest:
            count = min(len(rest), self._free(), RING_BYTES - self._at)
            self._ring[self._at : self._at + count] = rest[:count]
            for reader, fd in enumerate(self._filled):
                os.eventfd_write(fd, count)
                self._room[reader] -= count
            self._at = (self._at + count) % RING_BYTES
            rest = rest[count:]

    def _free(self) -> int:
        """Bytes that every reader has room for, at least one."""
        for reader, fd in enumerate(self._freed):
            if not self._room[reader] and not select.select([fd], [], [], self._patience_s)[0]:
                raise RankSilent(
                    f"rank {reader + 1} has taken no step for {self._patience_s:g} s: it hangs"
                )
            self._room[reader] += _count(fd)
        return min(self._room)


class RingReader:
    """The end of any other rank."""

    def __init__(self, place: Place) -> None:
        self._ring = mmap.mmap(place.ring_fd, RING_BYTES, prot=mmap.PROT_READ)
        self._filled = place.filled_fds[place.rank - 1]
        self._freed = place.freed_fds[place.rank - 1]
        self._at = 0
        self._available = 0

    def read(self, timeout_s: float) -> bytes | None:
        """The next record; None when none has begun within `timeout_s` seconds. Waits for the rest
        of one that has, for any time: rank 0 writes it in one go."""
        if not self._available and not self._wait(timeout_s):
            return None
        (length,) = _LENGTH.unpack(b"".join(self._pieces(_LENGTH.size)))
        return b"".join(self._pieces(length))

    def expect(self, timeout_s: float) -> bytes:
        """The next record. Raises RankSilent when none comes within `timeout_s` seconds."""
        record = self.read(timeout_s)
        if record is None:
            raise RankSilent(f"rank 0 has said nothing for {timeout_s:g} s in a step: it hangs")
        return record

    def _pieces(self, length: int) -> Iterator[bytes]:
        while length:
            while not self._available:
                self._wait(PATIENCE_S)
            count = min(length, self._available, RING_BYTES - self._at)
            piece = self._ring[self._at : self._at + count]
            os.eventfd_write(self._freed, count)
            self._at = (self._at + count) % RING_BYTES
            self._available -= count
            length -= count
            yield piece

    def _wait(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self._available:
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._filled], [], [], left)[0]:
                return False
            self._available += _count(self._filled)
        return True


def _count(fd: int) -> int:
    """What an eventfd has counted since it was last asked."""
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(fd)
    return 0
