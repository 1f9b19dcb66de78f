"""Random bytes for files of random weights: made once, written again and again, so that a file of
any size takes no longer than the disk does and is never held in memory."""

from typing import BinaryIO


class Pool:
    """Bytes, taken in turn, from the beginning again after the last. They should be a prime number
    of elements: rows of other lengths then begin at another one each."""

    def __init__(self, data: memoryview) -> None:
        """data: of one dimension and single bytes."""
        self._bytes = data
        self._next = 0

    def write(self, file: BinaryIO, nbytes: int) -> None:
        while nbytes:
            part = self._bytes[self._next : self._next + nbytes]
            file.write(part)
            nbytes -= len(part)
            self._next = (self._next + len(part)) % len(self._bytes)
