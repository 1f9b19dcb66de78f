"""Groups of services that start, end and restart as one, with small programs for services."""

import os
import signal
import sys
import threading
import time

import pytest
from pagewire.launch import supervisor
from pagewire.launch.supervisor import Service, Supervisor

IDLE = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(60)"
)


class Running:
    """A supervisor in a thread, whose services are Python programs."""

    def __init__(self, *services, ready=True):
        self.lines = []
        self.supervisor = Supervisor(list(services), lambda *line: self.lines.append(line))
        if ready:
            self.supervisor.mark_ready()
        self.thread = threading.Thread(target=self.supervisor.run, daemon=True)
        self.thread.start()

    def pids(self):
        return self.supervisor.pids()

    def until(self, condition, what, seconds=20.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after {seconds} s: {self.lines}"
            time.sleep(0.02)

    def until_up(self, *names, times=1):
        self.until(
            lambda: all(self.lines.count((name, "up")) >= times for name in names),
            f"{names} up {times} times",
        )
        return self.pids()

    def stop(self):
        self.supervisor.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setattr(
        supervisor, "command_of", lambda service: [sys.executable, "-c", *service.arguments]
    )
    started = []

    def run(*services, **options):
        started.append(Running(*services, **options))
        return started[-1]

    yield run
    for running in started:
        running.stop()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_death_of_one_member_restarts_all_of_its_group_and_nobody_else(start):
    names = ("a-0", "a-1", "a-2")
    running = start(
        *(Service(name, (IDLE,), group="a") for name in names),
        Service("b-0", (IDLE,), group="b"),
        Service("alone", (IDLE,)),
    )
    before = running.until_up(*names, "b-0", "alone")
    os.kill(before["a-1"], signal.SIGKILL)
    after = running.until_up(*names, times=2)
    assert not {after[name] for name in names} & {before[name] for name in names}
    assert not any(alive(before[name]) for name in names)
    assert (after["b-0"], after["alone"]) == (before["b-0"], before["alone"])
    told = [line for name, line in running.lines if name == "supervisor"]
    assert told == ["a-1 was killed by SIGKILL; starting its group a again"]


def test_no_member_starts_before_all_have_ended(start, monkeypatch):
    """One of them does not end when it is asked to."""
    monkeypatch.setattr(supervisor, "ORDERLY_EXIT_S", 0.6)
    running = start(Service("a-0", (IDLE,), group="a"), Service("a-1", (STUBBORN,), group="a"))
    before = running.until_up("a-0", "a-1")
    killed_at = time.monotonic()
    os.kill(before["a-0"], signal.SIGKILL)
    running.until(lambda: "a-0" not in running.pids(), "end of a-0")
    while alive(before["a-1"]):
        assert "a-0" not in running.pids(), "a-0 started while a-1 was still there"
        time.sleep(0.01)
    assert time.monotonic() - killed_at > 0.5
    running.until_up("a-0", "a-1", times=2)


def test_deaths_of_different_members_count_together(start, monkeypatch):
    monkeypatch.setattr(supervisor, "backoff_s", lambda failures: 0.0)
    running = start(Service("a-0", (IDLE,), group="a"), Service("a-1", (IDLE,), group="a"))
    for times in range(1, supervisor.GIVE_UP_STARTS + 1):
        pids = running.until_up("a-0", "a-1", times=times)
        os.kill(pids[f"a-{times % 2}"], signal.SIGKILL)
    running.until(lambda: running.supervisor.failure is not None, "failure")
    assert f"died {supervisor.GIVE_UP_STARTS} times" in running.supervisor.failure
