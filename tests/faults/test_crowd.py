"""A round of requests of every kind, alone and at once."""

import random

from e2e.conftest import Stack
from faults.crowd import FLAGS, attack, report
from faults.nemesis import model_flags


def test_what_comes_in_a_crowd_is_what_comes_alone() -> None:
    stack = Stack(*model_flags(1.0), *FLAGS)
    seed = random.randrange(2**32)
    try:
        stack.wait_ready()
        stack.wait_serving()
        outcome = attack(stack, 0.0, 1, seed)
    finally:
        stack.end()
    text = f"seed {seed}\n{report(outcome)}" + "\n".join(outcome.wrong)
    assert not outcome.wrong, text + "\n".join(stack.lines[-100:])
    assert outcome.requests > 100 and outcome.preemptions, text
