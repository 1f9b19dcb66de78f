"""What all tests have in common.

`make test` runs them in two lanes (`pytest -n 2`). What starts services, talks to
sockets or waits for time runs in one lane, test after test, as if it were alone; what only computes
is taken file by file by whoever is free, with one thread and at low priority, so that it fills the
processor's time that the other lane leaves. Without `-n` everything runs in one process, in order.
"""

import os
import random
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores Ctrl-C for what a script puts into the background, and a process that is started
    # from here would inherit that: tests that press Ctrl-C need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# To be set before torch is imported: its threads spin for each other as briefly as the worker's do,
# since other processes want the cores as well.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

TESTS = Path(__file__).parent
COMPUTING = {
    "bench/test_bench_kernels.py",
    "e2e/test_other_processors.py",
    "faults/test_simulation.py",
    "layout",
    "ops",
    "protocol",
    "requests",
    "scheduler",
    "tokenizer",
    "worker",
}
"""Folders and files of tests that only compute."""
WAITING = {
    "protocol/test_channels.py",
    "scheduler/test_scheduler_loop.py",
    "tokenizer/test_tokenizer_service.py",
    "worker/test_loop.py",
}
"""Files in those folders that do not."""
LOW_PRIORITY = 5
is_low = False

SEED = os.environ.get("PAGEWIRE_TEST_SEED", "")
"""Another text here draws other inputs for all tests."""


def computes(path: str) -> bool:
    """Whether the tests of a file, named from this folder on, only compute."""
    return path not in WAITING and bool({path, path.partition("/")[0]} & COMPUTING)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's own groups (`--dist loadgroup`) mean nothing to pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class TwoLanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0].removeprefix(f"{TESTS.name}/")
            return path if computes(path) else "waiting"

    return TwoLanes(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test draws the same random inputs whenever it runs, alone or among others: one that fails
    for one input in thousands can be run again."""
    global is_low
    alone = computes(item.path.relative_to(TESTS).as_posix())
    seed = zlib.crc32(f"{SEED}{item.nodeid}".encode())
    random.seed(seed)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(seed)
        torch.set_num_threads(1 if alone else len(os.sched_getaffinity(0)))
    if alone and not is_low and hasattr(item.config, "workerinput"):
        os.nice(LOW_PRIORITY)
        is_low = True
