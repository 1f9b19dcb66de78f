"""In which order the memory of matchers is written and read, for processors that keep none."""

from typing import Any

import numpy as np
import pytest
from pagewire.grammar import shared
from pagewire.grammar.shared import NO_POSITION, Rows, SharedMasks
from pagewire.process import fence

KEY, ROW, TOKEN = 7, 1, 40


class Order:
    """What the memory holds at each fence."""

    def __init__(self, memory: SharedMasks) -> None:
        self._memory = memory
        self.seen: list[tuple[int, ...]] = []

    def __call__(self) -> None:
        memory = self._memory
        columns: tuple[Any, ...] = (
            memory.told_tokens[ROW], memory.told_positions[ROW], memory.told_keys[ROW],
            memory.positions[0, ROW], memory.forced_counts[0, ROW],
        )  # fmt: skip
        self.seen.append(tuple(map(int, columns)))


def test_what_says_that_something_is_there_is_written_last(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SharedMasks(2, 3, 1, 4)
    rows = Rows(memory, 0)
    order = Order(memory)
    monkeypatch.setattr(shared, "fence", order)
    rows.open(KEY, ROW)
    rows.write(ROW, 2, [5, 6])
    assert order.seen == [(0, 0, 0, NO_POSITION, 2)]
    assert memory.positions[0, ROW] == 2
    memory.tell(np.array([ROW]), np.array([KEY], np.uint64), np.array([2]), np.array([TOKEN]))
    assert order.seen[1:] == [(TOKEN, 0, 0, 2, 2)]


def test_what_says_that_something_is_there_is_read_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is seen late is read behind the fence."""
    memory = SharedMasks(2, 3, 1, 0)
    rows = Rows(memory, 0)
    rows.open(KEY, ROW)
    rows.write(ROW, 0, [])
    memory.told_positions[ROW] = 0
    memory.told_keys[ROW] = KEY
    monkeypatch.setattr(shared, "fence", lambda: memory.told_tokens.__setitem__(ROW, TOKEN))
    assert rows.told() == ([KEY], [TOKEN])


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
