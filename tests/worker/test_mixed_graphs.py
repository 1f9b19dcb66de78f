"""Which graph a step replays before all are captured."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pagewire.worker.gpu.mixed_graphs import MISSES, Key, MixedGraphs
from pagewire.worker.gpu.runner import GpuRunner

SIZES = [[(size, 64) for size in range(160, 64, -16)], [(size, 16) for size in range(160, 0, -16)]]


class Captures:
    def __init__(self) -> None:
        self.keys: list[Key] = []
        self.graphs = MixedGraphs(self.capture)
        self.graphs.start(SIZES)
        self.at_start = len(self.keys)

    def capture(self, tokens: int, rows: int) -> Key:
        self.keys.append((tokens, rows))
        return tokens, rows

    @property
    def later(self) -> list[Key]:
        return self.keys[self.at_start :]


def test_a_start_captures_the_largest_and_a_third_of_the_rest() -> None:
    captures, told = Captures(), list[int]()
    assert captures.keys == [(160, 64), (112, 64), (160, 16), (112, 16), (64, 16), (16, 16)]
    MixedGraphs(captures.capture).start(SIZES, told.append)
    assert told == list(range(6))
    assert MixedGraphs.count_at_start(SIZES) == 6


def test_a_step_without_a_graph_replays_the_next_larger_one() -> None:
    graphs = Captures().graphs
    assert graphs.find((112, 64)) == (112, 64)
    assert graphs.find((80, 64)) == (112, 64)
    assert graphs.find((80, 16)) == (112, 16)
    assert graphs.find((48, 16)) == (64, 16)
    assert graphs.find((48, 64)) == (112, 64)  # never of fewer rows, and too few tokens for its own
    assert graphs.find((176, 64)) is None
    assert graphs.find((16, 8)) is None


def test_a_size_that_is_missed_often_gets_its_graph() -> None:
    captures = Captures()
    for _ in range(MISSES):
        assert captures.graphs.find((128, 16)) == (160, 16)
        assert captures.graphs.find((48, 64)) == (112, 64)
    assert not captures.later
    assert captures.graphs.find((128, 16)) == (128, 16)
    assert captures.later == [(128, 16)]
    for _ in range(2 * MISSES):  # a size that is to have none does not get one
        captures.graphs.find((48, 64))
    assert captures.later == [(128, 16)]


def test_idle_time_captures_the_rest_once() -> None:
    captures = Captures()
    captures.graphs.own((144, 16))
    while captures.graphs.capture_next():
        pass
    assert sorted(captures.keys) == sorted(key for keys in SIZES for key in keys)
    assert captures.later[:2] == [(144, 16), (144, 64)]
    assert captures.graphs.find((144, 64)) == (144, 64)


def test_eager_steps_have_none() -> None:
    graphs = MixedGraphs(lambda tokens, rows: (tokens, rows))
    graphs.start([])
    assert graphs.find((16, 16)) is None
    assert graphs.own((16, 16)) is None
    assert not graphs.capture_next()


def test_a_size_that_cannot_be_captured_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker serves on, with the next larger graph."""
    captures = Captures()

    def fails(tokens: int, rows: int) -> Key:
        captures.keys.append((tokens, rows))
        raise torch.OutOfMemoryError("all of it is used by another process")

    monkeypatch.setattr(captures.graphs, "_capture", fails)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    runner: Any = SimpleNamespace(_mixed=captures.graphs)
    GpuRunner.idle(runner)
    GpuRunner.idle(runner)
    assert captures.later == [(144, 64), (128, 64)]
    assert "used by another process" in caplog.text
    assert captures.graphs.find((144, 64)) == (160, 64)
