"""A short run of the nemesis: sixty faults in half a minute, and every token checked."""

import asyncio
import random

from e2e.conftest import Stack
from faults.nemesis import KINDS, VOCAB, Fault, Record, attack, is_void, report, stalls_of

STREAMS = 32
FLAGS = (
    "--device",
    "fake",
    "--skip-tokenizer-init",
    "--fake-vocab-size",
    str(VOCAB),
    "--fake-step-ms",
    "4",
    "--watchdog-timeout",
    "1",
    "--num-frontends",
    "2",
    "--num-tokenizers",
    "2",
    "--num-workers",
    "2",
)


def test_sixty_faults_cost_no_token() -> None:
    stack = Stack(*FLAGS)
    seed = random.randrange(2**32)
    try:
        stack.wait_ready()
        record = asyncio.run(attack(stack, 60.0, 60, STREAMS, pause_s=0.6, seed=seed))
    finally:
        stack.end()
    text = f"seed {seed}\n{report(record, STREAMS, FLAGS)}"
    assert not is_void(record, STREAMS), text
    assert len(record.faults) >= 60, text
    assert {fault.kind for fault in record.faults} == set(KINDS), text
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
