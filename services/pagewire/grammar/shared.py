"""What a worker and its matcher processes tell each other in every step, in memory that all of them
have: to pack and unpack messages for each process would take longer than masks do.

A worker writes the token of each stream into its slot's columns, and then sends `Look` to the
processes concerned. A process writes its masks, and then the positions that they are for, at which
the worker looks: it reads a position first and what belongs to it afterwards, and so does a process
with what it is told.

Rows are the worker's slots. Each process has masks and columns of its own, and each opening of a
stream has a key of its own, so what a process says too late is for nobody.
"""

import mmap
import os
import weakref
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pagewire.process.fence import fence

LINE: Final = 64
"""Bytes of a cache line, of which no two columns share one."""
NO_POSITION: Final = -1


class SharedMasks:
    """Of `rows` slots and `processes` matchers, with masks of `words` uint32 and forced runs of
    `max_forced` tokens at most. `fileno`: of the memory that another process has made."""

    def __init__(
        self, rows: int, words: int, processes: int, max_forced: int, fileno: int | None = None
    ) -> None:
        layout: dict[str, tuple[Any, tuple[int, ...]]] = {
            "told_keys": (np.uint64, (rows,)),
            "told_positions": (np.int64, (rows,)),
            "told_tokens": (np.int32, (rows,)),
            "keys": (np.uint64, (processes, rows)),
            "positions": (np.int64, (processes, rows)),
            "forced_counts": (np.int32, (processes, rows)),
            "forced": (np.int32, (processes, rows, max_forced)),
            "masks": (np.uint32, (processes, rows, words)),
        }
        starts: dict[str, int] = {}
        size = 0
        for name, (dtype, shape) in layout.items():
            starts[name] = size
            size += -(-np.dtype(dtype).itemsize * prod(shape) // LINE) * LINE
        if fileno is None:
            fileno = os.memfd_create("pagewire-masks", os.MFD_CLOEXEC)
            os.truncate(fileno, size)
            weakref.finalize(self, os.close, fileno)
        self.fileno = fileno
        memory = mmap.mmap(fileno, size)

        def column(name: str) -> NDArray[Any]:
            dtype, shape = layout[name]
            flat = np.frombuffer(memory, dtype, prod(shape), starts[name])
            return flat.reshape(shape)

        self.told_keys = column("told_keys")
        """[rows]: the stream that the last token told was for."""
        self.told_positions = column("told_positions")
        """[rows]: that token's place in the stream's output."""
        self.told_tokens = column("told_tokens")
        """[rows]: the token."""
        self.keys = column("keys")
        """[processes, rows]: the stream that a process has in this row; 0: none."""
        self.positions = column("positions")
        """[processes, rows]: the output position that the mask is for; NO_POSITION: there is
        none."""
        self.forced_counts = column("forced_counts")
        """[processes, rows]: tokens of the forced run before that position."""
        self.forced = column("forced")
        """[processes, rows, max_forced]: these tokens."""
        self.masks = column("masks")
        """[processes, rows, words]: bit i % 32 of word i // 32 is set where token i may come."""

    def tell(self, rows: NDArray[Any], keys: NDArray[Any], positions: Any, tokens: Any) -> None:
        """The next tokens [R] of the streams `keys` [R] in `rows` [R], whose places in their outputs
        are `positions` [R]."""
        self.told_tokens[rows] = tokens
        fence()
        self.told_positions[rows] = positions
        self.told_keys[rows] = keys

    def forget(self, process: int) -> None:
        """That process has ended: nothing that it wrote counts."""
        self.keys[process] = 0
        self.positions[process] = NO_POSITION


class Rows:
    """What one process writes and is told."""

    def __init__(self, shared: SharedMasks, process: int) -> None:
        self._shared = shared
        self._process = process
        self.masks = shared.masks[process]
        """[rows, words]: see SharedMasks."""
        self._next = np.zeros(len(shared.told_keys), np.int64)
        """By row: the place in the output of the token that is to be told next."""
        self._open: dict[int, int] = {}
        """Keys by row."""
        self._of_open: tuple[NDArray[np.int64], NDArray[np.uint64]] | None = None
        """Rows and keys of all open streams; None: not up to date."""

    def open(self, key: int, row: int) -> None:
        """The stream `key` has that row from now on, and no mask yet."""
        self._shared.positions[self._process, row] = NO_POSITION
        self._shared.keys[self._process, row] = key
        self._next[row] = NO_POSITION
        self._open[row] = key
        self._of_open = None

    def close(self, key: int, row: int) -> None:
        """It is over."""
        if self._open.get(row) == key:
            del self._open[row]
            self._of_open = None

    def told(self) -> tuple[list[int], list[int]]:
        """Keys and tokens of the streams that have been told their next token."""
        if self._of_open is None:
            rows = np.fromiter(self._open.keys(), np.int64, len(self._open))
            self._of_open = rows, np.fromiter(self._open.values(), np.uint64, len(self._open))
        rows, keys = self._of_open
        shared = self._shared
        new = (shared.told_keys[rows] == keys) & (shared.told_positions[rows] == self._next[rows])
        rows = rows[new]
        fence()
        self._next[rows] = NO_POSITION  # until its mask has been written
        return keys[new].tolist(), shared.told_tokens[rows].tolist()

    def write(self, row: int, position: int, forced: list[int]) -> None:
        """The mask of this row is there, for this output position; the last tokens before it,
        `forced`, were not told."""
        shared, process = self._shared, self._process
        if shared.forced.shape[2]:
            shared.forced_counts[process, row] = len(forced)
            shared.forced[process, row, : len(forced)] = forced
        self._next[row] = position
        fence()
        shared.positions[process, row] = position
