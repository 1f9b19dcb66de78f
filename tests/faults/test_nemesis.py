"""Short runs of the nemesis: sixty faults in half a minute, and every token checked."""

import asyncio
import random

import pytest
from e2e.conftest import Stack
from faults.nemesis import (
    KINDS,
    MATCHER,
    Fault,
    Record,
    attack,
    is_void,
    model_flags,
    report,
    stalls_of,
)

STREAMS = 32
FLAGS = (
    *("--fake-step-ms", "4", "--watchdog-timeout", "1"),
    *("--num-frontends", "2", "--num-tokenizers", "2", "--num-workers", "2"),
)


@pytest.mark.parametrize(("held", "faults"), [(0.0, 60), (0.5, 30)], ids=["plain", "grammars"])
def test_faults_cost_no_token(held: float, faults: int) -> None:
    flags = (*model_flags(held), *FLAGS)
    stack = Stack(*flags)
    seed = random.randrange(2**32)
    try:
        stack.wait_ready()
        record = asyncio.run(
            attack(stack, 60.0, faults, STREAMS, pause_s=0.6, seed=seed, held=held)
        )
    finally:
        stack.end()
    text = f"seed {seed}\n{report(record, STREAMS, flags)}"
    assert not is_void(record, STREAMS), text
    assert len(record.faults) >= faults, text
    kinds = {fault.kind for fault in record.faults}
    assert kinds >= ({MATCHER} if held else set(KINDS)), text
    assert record.is_sound, text + "\n".join(stack.lines[-100:])


def test_stalls_are_those_of_single_faults() -> None:
    record = Record(
        faults=[
            Fault(10.0, "kill", "worker", 1, ready_s=1.0),
            Fault(20.0, "kill", "worker", 1, ready_s=1.0),
            Fault(21.0, "kill", "scheduler", 0, ready_s=9.0),
            Fault(25.0, "kill", "worker", 1, ready_s=1.0),
        ],
        stalls=[(9.95, 0.3), (10.1, 0.2), (14.0, 5.0), (20.1, 3.0), (25.0, 7.0)],
    )
    assert stalls_of(record, "worker", "kill") == [0.3]
    assert not record.statuses and record.is_sound
