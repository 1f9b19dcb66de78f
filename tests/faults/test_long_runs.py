"""Short forms of the long runs, without what depends on how busy the machine is: nothing is kept,
nothing is lost, and what finds no room is told so."""

import asyncio

from e2e.conftest import Stack
from faults import overload, soak


def test_everything_is_back_after_kills_and_clients_that_leave() -> None:
    stack = Stack(*soak.FLAGS)
    try:
        stack.wait_ready()
        record, differences = asyncio.run(soak.measure(stack, 6.0, 1.2, streams=16))
    finally:
        stack.end()
    # how many kills there are in the time is the machine's affair
    assert record.left and record.faults
    assert not soak.faults_of(record, differences, streams=16)


def test_ten_times_the_load_is_answered_and_costs_no_accepted_stream() -> None:
    stack = Stack(*overload.flags_of(8))
    try:
        stack.wait_ready()
        outcome = asyncio.run(overload.measure(stack, 8, 5.0))
    finally:
        stack.end()
    assert outcome.over.refusals() and not outcome.over.others()
    assert not outcome.over.wrong and not outcome.best.wrong
    assert outcome.grown < overload.GROWN
