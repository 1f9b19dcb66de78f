"""In which order a matcher process computes masks, with a stand-in for what computes them."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from pagewire.grammar import process
from pagewire.grammar.messages import Failed
from pagewire.grammar.process import PATIENCE, Process


class Work:
    """Both the matchers and the rows: `costs` by key, in seconds of the clock that stands still
    otherwise; `news` by key of a mask, which streams are told a token while it is computed."""

    def __init__(self, costs: dict[int, float], news: dict[int, list[int]] | None = None) -> None:
        self.now = 0.0
        self.costs = costs
        self.news = news or {}
        self.fails: set[int] = set()
        self.written: list[int] = []
        self.closed: list[int] = []
        self._told: list[int] = []

    def perf_counter(self) -> float:
        return self.now

    def cost(self, key: int) -> float:
        return self.costs[key]

    def row(self, key: int) -> int:
        return key

    def position(self, key: int) -> int:
        return key

    def forced(self, key: int) -> list[int]:
        return []

    def told(self) -> tuple[list[int], list[int]]:
        keys, self._told = self._told, []
        return keys, [0] * len(keys)

    def advance(self, keys: list[int], tokens: list[int]) -> list[int]:
        return keys

    def write(self, *given: Any) -> str:
        """Of matchers (key), or of rows (row, position, forced)."""
        key = given[0]
        if len(given) > 1:
            self.written.append(key)
            return ""
        self.now += self.costs[key]
        self._told += self.news.get(key, [])
        return "it cannot be held" if key in self.fails else ""

    def close(self, key: int, row: int) -> None:
        self.closed.append(key)


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    ours, theirs = socket.socketpair()
    one = Process(theirs)

    def run(work: Work, keys: list[int]) -> list[int]:
        monkeypatch.setattr(process.time, "perf_counter", work.perf_counter)
        both: Any = work
        one._write(both, both, keys)
        return work.written

    run.ours = ours  # type: ignore[attr-defined]
    yield run
    for end in (ours, theirs, one._woken, one._waker):
        end.close()


def test_what_is_likely_to_take_long_comes_last(at_work: Any) -> None:
    assert at_work(Work({1: 0.3e-3, 2: 0.02e-3, 3: 0.1e-3}), [1, 2, 3]) == [2, 3, 1]


def test_what_is_told_meanwhile_is_seen_between_two_masks(at_work: Any) -> None:
    costs = {1: 0.5e-3, 2: 0.2e-3, 3: 0.02e-3}
    assert at_work(Work(costs, {2: [3]}), [1, 2]) == [2, 3, 1]


def test_nobody_waits_for_ever_behind_others(at_work: Any) -> None:
    """Another one is told with each mask, and there is always one that takes less."""
    quick = range(2, 60)
    work = Work({1: 0.5e-3, **dict.fromkeys(quick, 0.2e-3)}, {key: [key + 1] for key in quick[:-1]})
    written = at_work(work, [1, 2])
    assert sorted(written) == [1, *quick]
    assert written.index(1) <= PATIENCE * 0.5 / 0.2 + 1


def test_what_has_no_mask_holds_up_nobody(at_work: Any) -> None:
    work = Work({1: 0.0, 2: 0.0, 3: 0.0})
    work.fails = {2}
    assert sorted(at_work(work, [1, 2, 3])) == [1, 3] and work.closed == [2]
    said = at_work.ours.recv(1000)
    assert b"it cannot be held" in said and Failed.__name__.encode() in said


def test_without_news_there_is_nothing_to_do(at_work: Any) -> None:
    assert at_work(Work({}), []) == []
