"""Long work in a thread, with signs of life meanwhile."""

import threading

import pytest
from pagewire.worker import beside as module
from pagewire.worker.beside import beside


def test_the_result_comes_back_and_ticks_meanwhile(monkeypatch):
    monkeypatch.setattr(module, "TICK_S", 0.001)
    ticks, enough = [], threading.Event()

    def tick():
        ticks.append(threading.current_thread())
        if len(ticks) > 3:
            enough.set()

    assert beside(lambda: enough.wait(30) and threading.current_thread(), tick) is not threading.current_thread()
    assert len(ticks) > 3 and set(ticks) == {threading.current_thread()}


def test_errors_come_back():
    def fail():
        raise ValueError("it cannot be had")

    with pytest.raises(ValueError, match="it cannot be had"):
        beside(fail, lambda: None)
