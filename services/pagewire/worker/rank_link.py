"""What rank 0 of a group hands to the others, and what they do with it: each step as it came, the
word that all requests are to be forgotten, and which rows of a step with grammars can be sampled.
Knows records, not what is in them.
"""

from enum import IntEnum
from typing import Final, NamedTuple

from ..process.group import RingReader, RingWriter

MASKS_S: Final = 60.0
"""How long a rank waits within a step for rank 0, which waits for a matcher process much less."""


class RecordKind(IntEnum):
    """The first byte of a record."""

    STEP = 1
    CLEAR = 2
    MASKS = 3


class Record(NamedTuple):
    """One thing that rank 0 said."""

    kind: RecordKind
    data: bytes


class Leader:
    """Rank 0's end. All methods raise RankSilent."""

    def __init__(self, ring: RingWriter) -> None:
        self._ring = ring

    def step(self, frame: bytes) -> None:
        """A step as the scheduler sent it, before rank 0 runs it."""
        self._write(RecordKind.STEP, frame)

    def clear(self) -> None:
        """There is a new scheduler: no request is left."""
        self._write(RecordKind.CLEAR, b"")

    def masks(self, decision: bytes) -> None:
        """Within a step: rank_masks.Decision."""
        self._write(RecordKind.MASKS, decision)

    def _write(self, kind: RecordKind, data: bytes) -> None:
        self._ring.write(bytes((kind,)) + data)


class Follower:
    """The end of another rank."""

    def __init__(self, ring: RingReader) -> None:
        self._ring = ring

    def read(self, timeout_s: float) -> Record | None:
        """The next step, or the word to forget; None when there is none within `timeout_s`
        seconds."""
        data = self._ring.read(timeout_s)
        return None if data is None else Record(RecordKind(data[0]), data[1:])

    def masks(self) -> bytes:
        """Within a step: what rank 0 decided about its rows. Raises RankSilent when it says
        nothing, and ValueError when it says something else."""
        data = self._ring.expect(MASKS_S)
        if data[0] != RecordKind.MASKS:
            raise ValueError(f"rank 0 sent a {RecordKind(data[0]).name} in the middle of a step")
        return data[1:]


Link = Leader | Follower
"""A rank's connection to the others; a worker of one process has none."""
