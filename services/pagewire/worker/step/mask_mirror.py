"""A GPU worker's copy of all masks, in the memory that they are brought to the device from."""

import heapq

import numpy as np
from numpy.typing import NDArray

from .matched_stream import Ints


class MaskMirror:
    """Of `count` slots. Each mask is written to it as soon as it comes, once there are `words`, and
    not again before a token has been said or the request is over."""

    def __init__(self, count: int) -> None:
        self.words: NDArray[np.uint32] | None = None
        """[slots, words]: set before the first request by who wants one, where there are no forced
        runs."""
        self.row_of = np.zeros(count, np.int64)
        """By slot: its row, the lowest one that was free when its request came."""
        self._free = list(range(count))
        """A heap."""

    def take(self, slot: int) -> None:
        """It has a request with a grammar."""
        self.row_of[slot] = heapq.heappop(self._free)

    def give_back(self, slot: int) -> None:
        """That is over."""
        heapq.heappush(self._free, int(self.row_of[slot]))

    def write(self, slots: Ints, masks: NDArray[np.uint32]) -> None:
        """Those of `slots` [R] are masks [R, words]."""
        if self.words is not None:
            self.words[self.row_of[slots]] = masks
