"""Steps for a worker of several pipeline stages: as many micro-batches in flight as there are stages,
with rows of their own."""

from math import inf

import pytest
from pagewire.config import SchedulerConfig
from pagewire.scheduler.step_estimator import StepEstimator
from pagewire_protocol.messages import StepCost
from scheduler.scheduler_sim import QUICK, World, ints


def pipeline(stages, **facts):
    """A world with one worker, which counts for each step that is sent the rows that it has in
    common with a step in flight that samples them."""
    world = World()
    worker = world.add_worker(stages=stages, num_blocks=128, **facts)
    world.add_tokenizer()
    sent, waiting = [], []
    deliver = world._receive

    def receive(inbox, message):
        deliver(inbox, message)
        if inbox == worker.peer.inbox and worker.inbox and worker.inbox[-1] not in sent:
            step = worker.inbox[-1]
            in_flight = world.scheduler.engine.workers[worker.incarnation].in_flight.steps
            awaited = {slot for other in in_flight if other.n < step.n for slot in other.sampled}
            sent.append(step)
            waiting.append(awaited & set(ints(step.run_slots)))

    world.scheduler._send = receive
    return world, worker, waiting


def drain(world):
    """Results come as late as may be: only when no further step is sent."""
    (worker,) = world.workers.values()
    widths = []
    for _ in range(500):
        world.tick()
        widths.append(len(worker.inbox))
        if not worker.inbox:
            return widths
        worker.execute()
        world.deliver(worker)
    raise AssertionError("still busy")


@pytest.mark.parametrize("cost", [None, QUICK], ids=["unmeasured", "measured"])
@pytest.mark.parametrize("stages", [2, 3])
def test_no_row_waits_for_a_step_in_flight(stages, cost):
    world, _, waiting = pipeline(stages, cost=cost)
    handles = [world.submit(range(i, i + 3 + i), max_tokens=6 + i) for i in range(7)]
    widths = drain(world)
    assert not any(waiting) and len(waiting) > 20
    assert max(widths) >= stages
    for handle in handles:
        assert world.output(handle) == world.expected(handle)
    world.assert_idle()


@pytest.mark.parametrize("stages", [2, 4])
def test_stages_have_equal_shares_of_the_rows(stages):
    """Also where all rows began to decode in one step."""
    world, worker, _ = pipeline(stages)
    for i in range(8):
        world.submit([i, 1, 2], max_tokens=30)
    drain(world)
    rows = [ints(step.run_slots) for step in worker.steps if step.run_slots]
    assert [len(row) for row in rows[: 1 + 2 * stages]] == [8] + [8 // stages] * 2 * stages
    assert len({slot for row in rows[1 : 1 + stages] for slot in row}) == 8


def test_chunks_of_one_prompt_follow_each_other_at_once():
    world, worker, waiting = pipeline(2, max_model_len=128)
    world.scheduler.engine.workers[worker.incarnation].estimator.step_tokens = 16
    handle = world.submit(range(100, 160), max_tokens=3)
    world.tick()
    assert len(worker.inbox) == 3, "one in each stage, and one that waits"
    drain(world)
    assert not any(waiting) and world.output(handle) == world.expected(handle)


def test_one_request_alone_has_one_step_in_flight():
    world, _, _ = pipeline(2)
    handle = world.submit([1, 2, 3], max_tokens=9)
    widths = drain(world)
    assert set(widths) == {0, 1}
    assert world.output(handle) == world.expected(handle)


def test_one_more_step_than_stages_is_sent_ahead_where_prompts_fill_it():
    """The first stage then has its next step whenever it is done with one."""
    made = StepEstimator(StepCost(4.0, 0.012, 1.1, 32.0), SchedulerConfig(), stages=2)
    for number in range(3):
        assert made.due(1e6) == -inf
        made.sent(number, 100.0, 10.0, True)
    assert made.due(1e6) > 10
    made.returned(0, 10.2)
    assert made.due(1e6) == -inf


def test_what_later_stages_compute_keeps_no_step_waiting():
    made = StepEstimator(StepCost(4.0, 0.012, 1.1, 32.0), SchedulerConfig(), stages=3)
    made.sent(1, 25.0, 10.0, True)
    made.sent(2, 25.0, 10.0, True)
    assert made.due() == -inf
    made.sent(3, 10.0, 10.0, True)
    made.returned(1, 10.08)
    made.sent(4, 20.0, 10.08, True)
    assert made.due() == pytest.approx(10.08 + (0.8 * 20 - 4) / 1000)
