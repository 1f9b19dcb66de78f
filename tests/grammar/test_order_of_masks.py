"""In which order a matcher process computes masks, with a stand-in for what computes them."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pagewire.grammar import process
from pagewire.grammar.messages import Close, Failed, Open, framed
from pagewire.grammar.process import HEAR_S, PATIENCE, Process
from pagewire_protocol.grammar import Grammar, GrammarKind


class Work:
    """Both the matchers and the places: `costs` by key, in seconds of the clock that stands still
    otherwise; `news` by key of a mask, which streams are told a token while it is computed."""

    def __init__(self, costs: dict[int, float], news: dict[int, list[int]] | None = None) -> None:
        self.now = 0.0
        self.costs = costs
        self.news = news or {}
        self.fails: set[int] = set()
        self.written: list[int] = []
        self.closed: list[int] = []
        self.over: set[int] = set()
        """Keys of streams that the service has closed."""
        self.at: dict[int, Callable[[], None]] = {}
        """By key of a mask: what happens while it is computed."""
        self._told: list[int] = []

    def perf_counter(self) -> float:
        return self.now

    def cost(self, key: int) -> float:
        return self.costs[key]

    def __contains__(self, key: int) -> bool:
        return key not in self.over

    def place(self, key: int) -> int:
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
        """Of matchers (key), or of places (key, place, position, forced)."""
        key = given[0]
        if len(given) > 1:
            self.written.append(key)
            return ""
        self.now += self.costs[key]
        self._told += self.news.get(key, [])
        self.at.get(key, lambda: None)()
        return "it cannot be held" if key in self.fails else ""

    def close(self, key: int, place: int | None = None) -> int | None:
        """Of matchers (key), or of places (key, place)."""
        if place is None:
            self.over.add(key)
            return key
        self.closed.append(key)
        return None


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    ours, theirs = socket.socketpair()
    one = Process(theirs)

    def run(work: Work, keys: list[int]) -> list[int]:
        monkeypatch.setattr(process.time, "perf_counter", work.perf_counter)
        both: Any = work
        one._opened = keys
        one._matchers = one._places = both
        one._write(both, both)
        return work.written

    one._unusable = "no grammar is held"
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


def busy(masks: int) -> Work:
    """Each of so many masks takes 0.2 ms, while which another stream is told a token."""
    return Work(dict.fromkeys(range(masks), 0.2e-3), {key: [key + 1] for key in range(masks - 1)})


def test_a_service_is_heard_while_there_are_always_masks_to_be_computed(at_work: Any) -> None:
    """A stream that is opened where masks take longer than steps waits for no pause, which may
    never come."""
    work = busy(200)
    answers: list[bytes] = []
    opening = Open(1000, 0, Grammar(GrammarKind.REGEX, "a"), b"")
    work.at[50] = lambda: at_work.ours.sendall(framed(opening))
    work.at[50 + int(HEAR_S / 0.2e-3) + 2] = lambda: answers.append(at_work.ours.recv(1000))
    at_work.ours.setblocking(False)
    assert at_work(work, [0]) == list(range(200))
    assert b"no grammar is held" in answers[0]


def test_what_is_closed_while_it_waits_is_not_computed(at_work: Any) -> None:
    work = busy(200)
    work.costs[1000] = 0.1  # it waits PATIENCE times as long
    work.at[50] = lambda: at_work.ours.sendall(framed(Close((1000,))))
    assert at_work(work, [0, 1000]) == list(range(200))
    assert work.over == {1000}


def test_what_is_closed_as_soon_as_it_is_compiled_is_not_computed(at_work: Any) -> None:
    work = Work({1: 0.0})
    work.over = {2}
    assert at_work(work, [2, 1]) == [1]
