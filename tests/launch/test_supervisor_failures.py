"""What the supervisor makes of services that fail again and again, or hang, with small programs for
services."""

import os
import signal
import time

import pytest
from launch.test_supervisor_groups import IDLE, alive
from launch.test_supervisor_groups import start as start
from pagewire.launch import supervisor
from pagewire.launch.supervisor import Service
from pagewire.process import liveness

SHOW = "import sys, time; from pagewire.process.liveness import own; own.inherit(); "
WORKS = SHOW + "own.introduce(7); own.serving(); print('up', flush=True); time.sleep(60)"
LACKS_INSTRUCTIONS = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
FAILS = "import sys; print('up', flush=True); sys.exit(3)"
WATCHED = SHOW + (
    "own.settle(0.5); own.serving(); print('up', flush=True)\n"
    "for _ in range(600): own.turn(); time.sleep(0.1)"
)
SPINS = SHOW + "own.settle(0.5); own.serving(); print('up', flush=True)\nwhile True: pass"
ENDS = (
    SHOW + "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
    "own.serving(); print('up', flush=True); time.sleep(60)"
)
LOADS = SHOW + "own.settle(2.0); own.loading(); print('up', flush=True); time.sleep(60)"


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(supervisor, "backoff_s", lambda failures: 0.0)


def test_a_replica_that_cannot_start_does_not_end_the_stack(start, at_once):
    running = start(Service("w-0", (WORKS,)), Service("w-1", (FAILS,)))
    running.until_up("w-0")
    running.until_up("w-1", times=supervisor.GIVE_UP_STARTS + 3)
    assert running.supervisor.failure is None and running.pids()["w-0"]


def test_a_kind_of_which_nobody_can_start_ends_the_stack(start, at_once):
    running = start(Service("w-0", (FAILS,)), Service("w-1", (FAILS,)), Service("t-0", (IDLE,)))
    running.until(lambda: running.supervisor.failure is not None, "failure")
    assert f"died {supervisor.GIVE_UP_STARTS} times" in running.supervisor.failure


def test_a_processor_that_is_too_old_ends_the_stack_at_once_and_is_named(start):
    services = Service("w-0", (LACKS_INSTRUCTIONS,)), Service("t-0", (IDLE,))
    running = start(*services, ready=False)
    running.until(lambda: running.supervisor.failure is not None, "failure")
    failure = running.supervisor.failure
    assert failure.startswith("w-0 was killed by SIGILL: ") and "x86-64-v2" in failure
    assert not any("starting it again" in line for _, line in running.lines)


def test_a_service_that_worked_is_started_again_however_often_it_is_killed(start, at_once):
    running = start(Service("w-0", (WORKS,)))
    for times in range(1, supervisor.GIVE_UP_STARTS + 3):
        os.kill(running.until_up("w-0", times=times)["w-0"], signal.SIGKILL)
    running.until_up("w-0", times=supervisor.GIVE_UP_STARTS + 3)
    assert running.supervisor.failure is None


def test_pauses_grow_as_long_as_it_does_not_work():
    pauses = [supervisor.backoff_s(failures) for failures in range(1, 12)]
    assert pauses[:5] == [0.0, 0.5, 1.0, 2.0, 4.0] and pauses[-1] == supervisor.LONGEST_PAUSE_S
    failures = supervisor.Failures()
    for ready_at, in_a_row in ((None, 1), (99.5, 2), (99.2, 3), (None, 4), (90.0, 1)):
        failures.count(100.0, ready_at)
        assert failures.in_a_row == in_a_row


def test_deaths_are_announced_with_the_incarnation_before_the_next_life(start, at_once):
    deaths = []
    running = start(Service("w-0", (WORKS,)))
    running.supervisor._announce = lambda death: deaths.append(
        (death, running.lines.count(("w-0", "up")))
    )
    os.kill(running.until_up("w-0")["w-0"], signal.SIGSEGV)
    running.until_up("w-0", times=2)
    ((death, lives),) = deaths
    assert (death.service.name, death.incarnation, death.failures, lives) == ("w-0", 7, 1, 1)
    assert death.cause == "was killed by SIGSEGV"


@pytest.mark.parametrize("program", [WATCHED, SPINS])
def test_a_service_that_stops_or_spins_is_killed_and_replaced(program, start, at_once):
    running = start(Service("w-0", (program,)))
    pid = running.until_up("w-0")["w-0"]
    if program == WATCHED:
        time.sleep(1.5)
        assert running.pids()["w-0"] == pid, "it made progress, and was replaced"
        os.kill(pid, signal.SIGSTOP)
    running.until_up("w-0", times=2)
    assert not alive(pid)
    assert any("w-0 made no progress for" in line for _, line in running.lines)


def test_a_service_that_loads_has_more_time_unless_a_signal_has_stopped_it(start, monkeypatch):
    monkeypatch.setattr(liveness, "STOPPED_PATIENCE_S", 0.5)
    running = start(Service("w-0", (LOADS,)))
    pid = running.until_up("w-0")["w-0"]
    time.sleep(1.0)
    assert running.pids()["w-0"] == pid
    os.kill(pid, signal.SIGSTOP)
    running.until_up("w-0", times=2)
    assert not alive(pid)


def test_an_end_in_order_is_no_failure(start):
    """However often somebody asks for it."""
    running = start(Service("w-0", (ENDS,)))
    for times in range(1, supervisor.GIVE_UP_STARTS + 3):
        os.kill(running.until_up("w-0", times=times)["w-0"], signal.SIGTERM)
    running.until_up("w-0", times=supervisor.GIVE_UP_STARTS + 3)
    assert running.supervisor.failure is None
    assert not any(" in " in line for name, line in running.lines if name == "supervisor")
