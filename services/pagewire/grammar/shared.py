"""What a worker and its matcher processes tell each other in every step, in memory that all of them
have: to pack and unpack messages for each process would take longer than masks do.

A worker writes the token of each stream into its place's columns, then the tag that says whose it
is and for which position, and then sends `Look` to the processes concerned; a device writes the same
and sends nothing. A process writes its masks, and then their tags, at which the worker looks, or the
device: who reads, reads a tag first and what belongs to it afterwards. A tag is one word, which is
read and written whole.

Each process has so many places, one for each of its streams. A place goes from one stream to the
next: its process hears in order that the one is over and that the other begins. Each opening of a
stream has a key of its own, so what a process says too late is for nobody.
"""

import mmap
import os
import weakref
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pagewire.process.fence import fence

LINE: Final = 64
"""Bytes of a cache line, of which no two columns share one. Of what a device reads or writes, each
place has a line of its own: the bus brings the same one to it once at a time, some 2.5 us each."""
WORDS_PER_LINE: Final = LINE // 8
MASK_ALIGNMENT: Final = 16
"""Of bytes, at a multiple of which each mask starts: a device reads so many at once."""
NO_POSITION: Final = -1
LEAST_PLACES: Final = 64
"""Of a process, where the worker has as many slots."""
TAG_BITS: Final = 32
"""Of each half of a tag."""
LOW_HALF: Final = (1 << TAG_BITS) - 1
NEVER: Final = (1 << 64) - 1
"""A tag of nothing: no output is so long."""


def num_places(rows: int, processes: int) -> int:
    """Of each of `processes`, for a worker with so many slots, `rows`: twice its share, so that few
    streams have to go elsewhere than to the least busy process, and enough in all of them together
    for all slots."""
    return min(rows, max(LEAST_PLACES, 2 * -(-rows // processes)))


def tag_of(openings: ArrayLike, positions: ArrayLike) -> NDArray[np.uint64]:
    """[R]: the tags of masks, or tokens, for the output positions `positions` [R] of the streams
    `openings` [R]: the lowest 32 bits of the opening, which the next 2^32 - 1 openings do not have,
    before the position + 1, which is 0 where there is none."""
    low = np.asarray(positions, np.int64) + 1
    return np.asarray(openings, np.uint64) << np.uint64(TAG_BITS) | low.astype(np.uint64)


def positions_of(tags: NDArray[np.uint64], openings: NDArray[np.uint64]) -> NDArray[np.int64]:
    """[R]: what the masks with `tags` [R] are for, where they are those of the streams `openings`
    [R]; NO_POSITION of others, and where there is none."""
    low_half, bits = np.uint64(LOW_HALF), np.uint64(TAG_BITS)
    own = tags >> bits == openings & low_half
    return np.where(own, (tags & low_half).astype(np.int64) - 1, NO_POSITION)


class SharedMasks:
    """Of `processes` matchers with `places` each, with masks of `words` uint32 and forced runs of
    `max_forced` tokens at most. Columns go over the places of all processes, those of the first
    one first. `fileno`: of the memory that another process has made."""

    def __init__(
        self, places: int, words: int, processes: int, max_forced: int, fileno: int | None = None
    ) -> None:
        self.places = places
        """Of each process."""
        count = processes * places
        padded = -(-4 * words // MASK_ALIGNMENT) * MASK_ALIGNMENT // 4
        layout: dict[str, tuple[Any, tuple[int, ...]]] = {
            "told": (np.uint64, (count, WORDS_PER_LINE)),
            "tags": (np.uint64, (count, WORDS_PER_LINE)),
            "forced_counts": (np.int32, (count,)),
            "forced": (np.int32, (count, max_forced)),
            "masks": (np.uint32, (count, padded)),
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

        self.address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        """Where this process has the memory, of which all columns are parts."""
        self.nbytes = size
        """Of all of it."""
        told = column("told")
        self.told_tags = told[:, 0]
        """[all places]: whose the last token told is, and its position in the output."""
        self.told_tokens = told.view(np.int64)[:, 1]
        """[all places]: that token."""
        self.tags = column("tags")[:, 0]
        """[all places]: see `tag_of`; where the low half is 0, there is no mask. 0: there is no
        stream either."""
        self.forced_counts = column("forced_counts")
        """[all places]: tokens of the forced run before the mask's position."""
        self.forced = column("forced")
        """[all places, max_forced]: these tokens."""
        self.masks = column("masks")[:, :words]
        """[all places, words]: bit i % 32 of word i // 32 is set where token i may come. Words
        between one mask and the next are 0."""

    def of_process(self, process: int) -> slice:
        """Its places."""
        return slice(process * self.places, (process + 1) * self.places)

    def tell(self, places: NDArray[Any], keys: NDArray[Any], positions: Any, tokens: Any) -> None:
        """The next tokens [R] of the streams `keys` [R] in `places` [R], whose positions in their
        outputs are `positions` [R]."""
        self.told_tokens[places] = tokens
        fence()
        self.told_tags[places] = tag_of(keys, positions)

    def is_told(self, place: int) -> bool:
        """The token for the position of the mask there has been told: the next mask is due."""
        return bool(self.tags[place] and self.told_tags[place] == self.tags[place])

    def forget(self, process: int) -> None:
        """That process has ended: nothing that it wrote counts."""
        self.tags[self.of_process(process)] = 0

    def tag_addresses(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """[R]: where this process has the tags of `places` [R]."""
        return int(self.tags.ctypes.data) + self.tags.strides[0] * places

    @property
    def told_offsets(self) -> tuple[int, int]:
        """Bytes from the tag of a place's mask to the token told there, and to that token's tag."""
        tags = int(self.tags.ctypes.data)
        return int(self.told_tokens.ctypes.data) - tags, int(self.told_tags.ctypes.data) - tags

    def mask_addresses(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """[R]: where this process has the masks of `places` [R], each at a multiple of
        MASK_ALIGNMENT."""
        return int(self.masks.ctypes.data) + self.masks.strides[0] * places


class Places:
    """What one process writes and is told. It counts its places from 0."""

    def __init__(self, shared: SharedMasks, process: int) -> None:
        own = shared.of_process(process)
        self.masks = shared.masks[own]
        """[places, words]: see SharedMasks."""
        self._tags = shared.tags[own]
        self._forced_counts = shared.forced_counts[own]
        self._forced = shared.forced[own]
        self._told_tags = shared.told_tags[own]
        self._told_tokens = shared.told_tokens[own]
        self._expected = np.full(shared.places, NEVER, np.uint64)
        """By place: the tag of the token that is to be told next; NEVER: there is no mask for it
        yet."""
        self._open: dict[int, int] = {}
        """Keys by place."""

    def open(self, key: int, place: int) -> None:
        """The stream `key` has that place from now on, and no mask yet."""
        self._tags[place] = _tag(key, NO_POSITION)
        fence()  # before the next mask: who copies the last one looks at the tag once more
        self._expected[place] = NEVER
        self._open[place] = key

    @property
    def any(self) -> bool:
        """Some stream is open."""
        return bool(self._open)

    def close(self, key: int, place: int) -> None:
        """It is over."""
        if self._open.get(place) == key:
            del self._open[place]
            self._expected[place] = NEVER

    def told(self) -> tuple[list[int], list[int]]:
        """Keys and tokens of the streams that have been told their next token."""
        places = np.flatnonzero(self._told_tags == self._expected)
        if not len(places):
            return [], []
        fence()
        self._expected[places] = NEVER  # until the next mask has been written
        keys = [self._open[place] for place in places.tolist()]
        return keys, self._told_tokens[places].tolist()

    def write(self, key: int, place: int, position: int, forced: list[int]) -> None:
        """The mask of the stream `key`, which has this place, is there, for this output position;
        the last tokens before it, `forced`, were not told."""
        if self._forced.shape[1]:
            self._forced_counts[place] = len(forced)
            self._forced[place, : len(forced)] = forced
        tag = _tag(key, position)
        self._expected[place] = tag
        fence()
        self._tags[place] = tag


def _tag(key: int, position: int) -> int:
    """As `tag_of`, which takes longer for one number."""
    return (key & LOW_HALF) << TAG_BITS | (position + 1)
