"""The memory of matchers: in which order it is written and read, for processors that keep none, and
where a device finds what is in it."""

import ctypes
from typing import Any

import numpy as np
import pytest
from pagewire.grammar import shared
from pagewire.grammar.shared import (
    LINE,
    MASK_ALIGNMENT,
    NO_POSITION,
    Places,
    SharedMasks,
    num_places,
    positions_of,
    tag_of,
)
from pagewire.process import fence

KEY, PLACE, TOKEN = 7, 1, 40


class Order:
    """What the memory holds at each fence."""

    def __init__(self, memory: SharedMasks) -> None:
        self._memory = memory
        self.seen: list[tuple[int, ...]] = []

    def __call__(self) -> None:
        memory = self._memory
        columns: tuple[Any, ...] = (
            memory.told_tokens[PLACE], memory.told_tags[PLACE], memory.tags[PLACE], memory.forced_counts[PLACE],
        )  # fmt: skip
        self.seen.append(tuple(map(int, columns)))


def test_what_says_that_something_is_there_is_written_last(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SharedMasks(2, 3, 1, 4)
    places = Places(memory, 0)
    order = Order(memory)
    monkeypatch.setattr(shared, "fence", order)
    places.open(KEY, PLACE)
    places.write(KEY, PLACE, 2, [5, 6])
    opened = tag_of(KEY, NO_POSITION)
    assert order.seen == [(0, 0, opened, 0), (0, 0, opened, 2)]
    assert memory.tags[PLACE] == tag_of(KEY, 2)
    memory.tell(np.array([PLACE]), np.array([KEY], np.uint64), np.array([2]), np.array([TOKEN]))
    assert order.seen[2:] == [(TOKEN, 0, tag_of(KEY, 2), 2)]


def test_what_says_that_something_is_there_is_read_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is seen late is read behind the fence."""
    memory = SharedMasks(2, 3, 1, 0)
    places = Places(memory, 0)
    places.open(KEY, PLACE)
    places.write(KEY, PLACE, 0, [])
    memory.told_tags[PLACE] = tag_of(KEY, 0)
    monkeypatch.setattr(shared, "fence", lambda: memory.told_tokens.__setitem__(PLACE, TOKEN))
    assert places.told() == ([KEY], [TOKEN])


def test_a_tag_says_whose_mask_it_is_and_for_which_position() -> None:
    openings = np.array([1, 1, 2**32 - 1, 2**40 + 5, 5, 2**32], np.uint64)
    positions = np.array([0, NO_POSITION, 2**31, 7, 7, NO_POSITION])
    tags = tag_of(openings, positions)
    assert tags.dtype == np.uint64
    assert tags.tolist() == [
        1 << 32 | 1, 1 << 32, (2**32 - 1) << 32 | 2**31 + 1, 5 << 32 | 8, 5 << 32 | 8, 0,
    ]  # fmt: skip
    assert positions_of(tags, openings).tolist() == positions.tolist()
    assert (positions_of(tags, openings + np.uint64(1)) == NO_POSITION).all()


@pytest.mark.parametrize("process", [0, 2])
def test_each_process_has_places_of_its_own(process: int) -> None:
    """In memory that both ends have by its descriptor, and what it wrote is forgotten alone."""
    ours = SharedMasks(4, 3, 3, 2)
    theirs = Places(SharedMasks(4, 3, 3, 2, ours.fileno), process)
    place = 4 * process + PLACE
    theirs.open(KEY, PLACE)
    assert np.flatnonzero(ours.tags).tolist() == [place]
    theirs.masks[PLACE] = [1, 2, 3]
    theirs.write(KEY, PLACE, 0, [9])
    assert ours.tags[place] == tag_of(KEY, 0)
    assert ours.forced[place, : ours.forced_counts[place]].tolist() == [9]
    assert ours.masks[place].tolist() == [1, 2, 3] and np.count_nonzero(ours.masks) == 3
    ours.tell(np.array([place]), np.array([KEY], np.uint64), np.array([0]), np.array([TOKEN]))
    assert theirs.told() == ([KEY], [TOKEN])
    ours.forget(1)
    assert ours.tags[place] == tag_of(KEY, 0)
    ours.forget(process)
    assert not ours.tags.any()


def test_a_mask_of_an_earlier_stream_of_the_place_is_not_that_of_the_next() -> None:
    """For the same position, until the process has heard of the next one, and after."""
    memory = SharedMasks(1, 3, 1, 0)
    places = Places(memory, 0)
    places.open(1, 0)
    places.write(1, 0, 4, [])
    next_one = np.array([2], np.uint64)
    assert positions_of(memory.tags, next_one) == NO_POSITION
    places.close(1, 0)
    places.open(2, 0)
    assert positions_of(memory.tags, next_one) == NO_POSITION
    places.write(2, 0, 4, [])
    assert positions_of(memory.tags, next_one) == 4


@pytest.mark.parametrize("words", [1, 3, 4, 1536, 1537])
def test_what_lies_at_the_addresses_is_what_was_written(words: int) -> None:
    memory = SharedMasks(3, words, 2, 5)
    places = np.arange(6)
    memory.masks[:] = np.arange(6 * words).reshape(6, words)
    memory.tags[:] = tag_of(places + 1, places)
    tags, masks = memory.tag_addresses(places), memory.mask_addresses(places)
    told = [tags + offset for offset in memory.told_offsets]
    lines = np.concatenate((tags // LINE, told[1] // LINE))
    assert len(set(lines.tolist())) == 12, "the bus brings each line once at a time"
    assert (told[0] // LINE == told[1] // LINE).all()
    assert tags.dtype == masks.dtype == np.int64
    assert not (masks % MASK_ALIGNMENT).any() and not (tags % 8).any()
    size = np.diff(masks)[0]
    assert masks[-1] + size <= memory.address + memory.nbytes and memory.address <= tags[0]
    for place in places:
        assert ctypes.c_uint64.from_address(int(tags[place])).value == memory.tags[place]
        there = (ctypes.c_uint32 * (int(size) // 4)).from_address(int(masks[place]))
        assert list(there)[:words] == memory.masks[place].tolist()
        assert not any(list(there)[words:]), "between two masks there is nothing"


def test_all_processes_together_have_places_enough() -> None:
    for processes in range(1, 65):
        for rows in (*range(1, 300), 512, 1000, 1024, 4096, 65535):
            places = num_places(rows, processes)
            assert places * processes >= rows >= places
    assert [num_places(*given) for given in ((1024, 32), (1024, 8), (1024, 1), (6, 3))] == [
        64, 256, 1024, 6,
    ]  # fmt: skip


def test_the_kernel_gives_a_barrier() -> None:
    assert fence.membarrier()


@pytest.mark.parametrize("keeps_order", [True, False])
def test_it_is_asked_for_one_only_where_the_processor_needs_it(
    keeps_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    monkeypatch.setattr(fence, "KEEPS_ORDER", keeps_order)
    monkeypatch.setattr(fence, "membarrier", lambda: asked.append(None))
    fence.fence()
    assert len(asked) == (not keeps_order)
