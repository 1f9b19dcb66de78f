"""Slices of a processor, as the kernel says what it has taken."""

import ctypes
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pagewire.process.timers import (
    SCHED_ATTR,
    SCHED_SETATTR,
    SHORT_NS,
    wake_promptly,
)

NICE, RUNTIME = 3, 5


def attributes(thread: int = 0) -> tuple[int, ...]:
    """sched_getattr's; zeros where there is no such call, as in some sandboxes."""
    data = ctypes.create_string_buffer(SCHED_ATTR.size)
    if number := SCHED_SETATTR.get(platform.machine()):
        ctypes.CDLL(None).syscall(number + 1, thread, data, SCHED_ATTR.size, 0)
    return SCHED_ATTR.unpack(data.raw)


def slices_are_known() -> bool:
    """Since 6.12 the kernel says of any thread how long its slices are."""
    return attributes()[RUNTIME] > 0


pytestmark = pytest.mark.skipif(not slices_are_known(), reason="this kernel has no such slices")


def in_child(code: str) -> str:
    """What the code prints, in a process of its own: what is set stays set."""
    head = "from process.test_timers import *\nfrom pagewire.process.timers import wake_as_usual\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_threads_and_those_that_follow_have_short_slices() -> None:
    printed = in_child("show_all_threads()")
    assert printed.split() == [str(SHORT_NS)] * 3


def show_all_threads() -> None:
    """Of one that is there, of this one, of one that begins later."""
    os.nice(4)
    asked = threading.Event()

    def show() -> None:
        asked.wait(10)
        print(attributes()[RUNTIME])

    first = threading.Thread(target=show)
    first.start()
    wake_promptly()
    assert attributes()[NICE] == 4
    asked.set()
    first.join()
    print(attributes()[RUNTIME])
    later = threading.Thread(target=show)
    later.start()
    later.join()


def test_a_child_may_take_usual_slices_again() -> None:
    usual = attributes()[RUNTIME]
    assert usual > SHORT_NS
    code = "wake_promptly(); print(attributes()[RUNTIME]); wake_as_usual(); print(attributes()[RUNTIME])"
    assert in_child(code).split() == [str(SHORT_NS), str(usual)]
    assert attributes()[RUNTIME] == usual
