"""Long work in a thread, with signs of life meanwhile."""

import threading

import pytest
from pagewire.worker.load import in_thread as module
from pagewire.worker.load.in_thread import Ticker, run_in_thread, ticking
from pagewire.worker.loop import _Narrator


def test_the_result_comes_back_and_ticks_meanwhile(monkeypatch):
    monkeypatch.setattr(module, "TICK_S", 0.001)
    ticks, enough = [], threading.Event()

    def tick():
        ticks.append(threading.current_thread())
        if len(ticks) > 3:
            enough.set()

    assert (
        run_in_thread(lambda: enough.wait(30) and threading.current_thread(), tick)
        is not threading.current_thread()
    )
    assert len(ticks) > 3 and set(ticks) == {threading.current_thread()}


def test_errors_come_back():
    def fail():
        raise ValueError("it cannot be had")

    with pytest.raises(ValueError, match="it cannot be had"):
        run_in_thread(fail, lambda: None)


def test_ticks_come_while_this_thread_is_held_up_and_end_with_the_block(monkeypatch):
    monkeypatch.setattr(module, "TICK_S", 0.001)
    ticks, enough = [], threading.Event()

    def tick():
        ticks.append(threading.current_thread())
        if len(ticks) > 3:
            enough.set()

    with ticking(tick):
        assert enough.wait(30)
    assert (
        threading.current_thread() not in ticks and len(set(ticks)) == 1 and not ticks[0].is_alive()
    )


def test_an_error_of_the_block_comes_back_and_ends_the_ticks(monkeypatch):
    monkeypatch.setattr(module, "TICK_S", 0.001)
    first, threads = threading.Event(), set()

    def tick():
        threads.add(threading.current_thread())
        first.set()

    with pytest.raises(ValueError, match="it cannot be had"), ticking(tick):
        assert first.wait(30)
        raise ValueError("it cannot be had")
    assert not any(thread.is_alive() for thread in threads)


class Membership:
    """Notices two threads at once."""

    def __init__(self):
        self.inside, self.both, self.beats, self.enough = 0, False, 0, threading.Event()

    def loading(self, stage, fraction):
        self._say()

    def tick(self, now):
        self.beats += 1
        self._say()
        if self.beats > 20:
            self.enough.set()

    def _say(self):
        self.inside += 1
        self.both |= self.inside > 1
        threading.Event().wait(0.001)
        self.inside -= 1


def test_a_worker_that_loads_says_that_it_lives_but_not_while_it_reports(monkeypatch):
    monkeypatch.setattr(module, "TICK_S", 0.0001)
    membership = Membership()
    narrate = _Narrator(membership)
    with ticking(narrate.alive):
        stage = 0
        while not membership.enough.is_set():
            narrate(f"stage {stage}", 0.5)
            stage += 1
    assert membership.beats > 20 and stage and not membership.both


def test_ticks_come_inside_of_long_work_only() -> None:
    ticks: list[bool] = []
    enough = threading.Event()
    is_inside = False

    def tick() -> None:
        ticks.append(is_inside)
        if len(ticks) > 3:
            enough.set()

    ticker = Ticker(tick, 0.001)
    assert not enough.wait(0.05) and not ticks
    for _ in range(3):
        with ticker:
            is_inside = True
            assert enough.wait(30)
            is_inside = False
        enough.clear()
        ticks[:] = [flag for flag in ticks if not flag]
    assert ticks == []
