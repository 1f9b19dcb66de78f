"""What a step holds: decode first, chunks, budgets, repeats, growth, preemption, the waste of
running ahead."""

import numpy as np
import pytest
from pagewire.scheduler.state import Tick
from pagewire_protocol.messages import Finish, Step, Tokens
from scheduler.scheduler_sim import QUICK, World, expected_output, ints, next_token, world


def check_done(w, handle, finish=Finish.LENGTH):
    assert w.end(handle).finish is finish
    assert w.output(handle) == w.expected(handle)


def test_one_request_runs_to_its_last_token():
    w = world()
    h = w.submit(range(10, 17), max_tokens=9)
    w.run()
    check_done(w, h)
    w.assert_idle()
    assert w.attempts[h].execution == 1 << 43 | 1


def test_many_requests_of_every_length_get_their_own_chains():
    w = world(facts={"num_blocks": 64, "max_model_len": 64})
    handles = [w.submit(range(i, i + 1 + i * 3 % 23), max_tokens=1 + i % 11) for i in range(30)]
    w.run()
    for h in handles:
        check_done(w, h)
    w.assert_idle()


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_decodes_come_first_and_long_prompts_come_in_chunks(ahead):
    w = world(max_num_batched_tokens=6, steps_in_flight=ahead, facts={"num_blocks": 64})
    short = w.submit([1, 2, 3], max_tokens=30)
    for _ in range(3):
        w.step()
    long = w.submit(range(100, 117), max_tokens=2)
    (worker,) = w.workers.values()
    before = len(worker.steps) + len(worker.inbox)
    w.run()
    slot_of_long = next(
        a.slot for s in worker.steps for a in s.admit if a.execution == w.attempts[long].execution
    )
    counts = []
    for step in worker.steps[before:]:
        slots, sizes = ints(step.run_slots), ints(step.run_counts)
        assert sum(sizes) <= 6
        if slot_of_long in slots and max(sizes) > 1:
            assert slots[1] == slot_of_long and sizes[0] == 1
            counts.append(sizes[1])
    assert counts[:4] == [4, 4, 4, 5]
    check_done(w, short)
    check_done(w, long)


def test_the_longest_decode_first():
    w = world(facts={"num_blocks": 64})
    for length in (5, 40, 12, 40, 3):
        w.submit(range(100, 100 + length), max_tokens=20)
    w.run()
    (worker,) = w.workers.values()
    known, orders = dict[int, int](), []
    for step in worker.steps:
        known |= {a.slot: len(a.prompt) // 4 for a in step.admit}
        orders += (
            [[known[slot] for slot in ints(step.run_slots)]]
            if step.run_slots and max(ints(step.run_counts)) == 1
            else []
        )
    assert [40, 40, 12, 5, 3] in orders and all(
        order == sorted(order, reverse=True) for order in orders
    )


def test_no_step_has_more_rows_than_max_num_seqs():
    w = world(max_num_seqs=3, facts={"max_num_seqs": 8})
    handles = [w.submit([i, 5], max_tokens=4) for i in range(10)]
    w.tick()
    assert w.scheduler.engine.queue.count == 7 and w.scheduler.stats()["num_requests_waiting"] == 7
    w.run()
    (worker,) = w.workers.values()
    assert max(len(ints(s.run_slots)) for s in worker.steps) == 3
    for h in handles:
        check_done(w, h)


def test_more_decodes_than_the_token_budget_take_turns():
    w = world(max_num_batched_tokens=2)
    handles = [w.submit([i, 5, 6], max_tokens=6) for i in range(5)]
    w.run()
    for h in handles:
        check_done(w, h)


def test_an_unchanged_run_set_is_a_repeat():
    w = world(facts={"num_blocks": 64})
    handles = [w.submit([i, 5, 6], max_tokens=20) for i in range(4)]
    w.run()
    (worker,) = w.workers.values()
    repeats = [s for s in worker.steps if s.repeat]
    assert len(repeats) >= 15 and not any(s.run_slots or s.run_counts for s in repeats)
    assert any(s.grow_slots for s in repeats)
    for h in handles:
        check_done(w, h)


def test_steps_in_flight_are_sent_before_the_first_result():
    w = world(steps_in_flight=3, facts={"cost": QUICK})
    w.submit([1, 2, 3], max_tokens=20)
    w.tick()
    (worker,) = w.workers.values()
    assert [s.n for s in worker.inbox] == [1, 2, 3]
    w.tick()
    assert len(worker.inbox) == 3


@pytest.mark.parametrize("ahead", [1, 3, 4])
def test_tokens_of_steps_in_flight_after_the_end_are_dropped(ahead):
    prompt = [1, 2, 3]
    eos = expected_output(prompt, World().config and sampling(20))[5]
    w = world(facts={"eos": (eos,), "cost": QUICK}, steps_in_flight=ahead)
    h = w.submit(prompt, max_tokens=20)
    w.run()
    (worker,) = w.workers.values()
    assert w.end(h).finish is Finish.STOP and w.end(h).stop_reason is None
    assert w.output(h) == w.expected(h, eos=(eos,)) and w.output(h)[-1] == eos
    ran = sum(1 for s in worker.steps if s.repeat or s.run_slots)
    assert ran == len(w.output(h)) + ahead - 1
    w.assert_idle()


@pytest.mark.parametrize("ahead", [2, 4])
def test_blocks_wait_for_the_steps_in_flight(ahead):
    prompt = [1, 2, 3]
    eos = expected_output(prompt, sampling(20))[1]
    w = world(facts={"eos": (eos,), "cost": QUICK}, steps_in_flight=ahead)
    h = w.submit(prompt, max_tokens=20)
    w.tick()
    w.step()
    w.step()
    assert w.end(h).finish is Finish.STOP
    (worker,) = w.scheduler.engine.workers.values()
    for _ in range(ahead - 1):
        assert (
            worker.kv_cache.pool.available < worker.kv_cache.pool.total
            and worker.in_flight.steps
            and worker.load == 0
        )
        w.step()
    assert worker.kv_cache.pool.available == worker.kv_cache.pool.total


def test_length_end_wastes_no_step():
    w = world(facts={"cost": QUICK})
    h = w.submit([1, 2, 3], max_tokens=5)
    w.run()
    (worker,) = w.workers.values()
    assert sum(1 for s in worker.steps if s.repeat or s.run_slots) == 5
    check_done(w, h)


def test_stop_tokens_min_tokens_and_ignore_eos():
    prompt = [9, 9, 9]
    free = expected_output(prompt, sampling(30))
    w = world(facts={"eos": (free[4],), "num_blocks": 64})
    stop = w.submit(prompt, max_tokens=30, stop_token_ids=(free[2], 5_000_000))
    late = w.submit(prompt, max_tokens=30, min_tokens=6)
    deaf = w.submit(prompt, max_tokens=30, ignore_eos=True)
    w.run()
    assert w.output(stop) == free[:3] and w.end(stop).stop_reason == free[2]
    assert (
        w.output(late) == expected_output(prompt, sampling(30, min_tokens=6), (free[4],))
        and len(w.output(late)) >= 6
    )
    assert w.output(deaf) == free and w.end(deaf).finish is Finish.LENGTH
    w.assert_idle()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_preemption_happens_and_changes_no_token(caching, ahead):
    w = world(
        facts={"num_blocks": 16, "block_size": 4, "cost": QUICK},
        enable_prefix_caching=caching,
        steps_in_flight=ahead,
    )
    handles = [w.submit([i, 2, 3, 4, 5], max_tokens=40) for i in range(4)]
    w.run()
    assert w.scheduler.stats()["num_preemptions"] > 0
    for h in handles:
        check_done(w, h)
    w.assert_idle()


def test_the_youngest_of_the_lowest_priority_is_preempted():
    w = world(facts={"num_blocks": 16, "block_size": 4})
    urgent_but_late = [
        w.submit([i, 2, 3, 4, 5], max_tokens=40, priority=p) for i, p in enumerate([5, 5, -1, -1])
    ]
    preempted = []
    (worker,) = w.scheduler.engine.workers.values()
    original = worker.preempt
    worker.preempt = lambda request: (preempted.append(request.handle), original(request))
    w.run()
    assert preempted and preempted[0] == urgent_but_late[1]
    for h in urgent_but_late:
        check_done(w, h)


def test_lower_priority_number_goes_first():
    w = world(facts={"max_num_seqs": 1})
    ordinary = [w.submit([i, 7], max_tokens=3) for i in range(3)]
    urgent = w.submit([8, 7], max_tokens=3, priority=-1)
    w.run()
    order = sorted([*ordinary, urgent], key=lambda h: w.attempts[h].execution)
    assert order == [urgent, *ordinary]


def test_a_slot_is_used_again_in_the_step_that_retires_it():
    w = world(facts={"max_num_seqs": 1})
    prompt = [3, 1]
    first = w.submit(prompt, max_tokens=20)
    second = w.submit([4, 1], max_tokens=3)
    w.step()
    w.cancel(first)
    w.run()
    (worker,) = w.workers.values()
    swap = [s for s in worker.steps if s.retire and s.admit]
    assert len(swap) == 1 and ints(swap[0].retire) == [swap[0].admit[0].slot] == [0]
    assert w.end(first).finish is Finish.CANCELLED
    check_done(w, second)


def test_rows_in_another_order_are_matched_by_slot():
    w = world()
    (worker,) = w.workers.values()
    worker.shuffle = True
    handles = [w.submit([i, 2, 3], max_tokens=7) for i in range(5)]
    w.run()
    for h in handles:
        check_done(w, h)


def sampling(max_tokens, **more):
    from pagewire_protocol.sampling import Sampling

    return Sampling(seed=0, max_tokens=max_tokens, **more)


def test_the_simulated_model_is_a_chain():
    assert (
        next_token([1, 2]) != next_token([2, 1])
        and np.unique([next_token([i]) for i in range(50)]).size > 40
    )


def sent_in_a_tick(w):
    """The steps and tokens that a tick sends, each with the number of steps in flight when it
    left."""
    sent = []
    (worker,) = w.scheduler.engine.workers.values()
    receive = w._receive

    def record(inbox, message):
        if isinstance(message, (Step, Tokens)):
            sent.append((message, len(worker.in_flight)))
        receive(inbox, message)

    w.scheduler._send = record
    w.scheduler.handle(Tick(w.now + 0.001))
    return sent


def test_each_step_leaves_before_the_next_one_is_made():
    w = world(steps_in_flight=2)
    w.submit([1, 2, 3], max_tokens=5)
    sent = sent_in_a_tick(w)
    assert [type(message) for message, _ in sent] == [Step, Step, Tokens]
    assert [in_flight for _, in_flight in sent] == [1, 2, 2]
    assert [message.n for message, _ in sent[:2]] == [1, 2] and sent[2][0].placed


def test_tokens_leave_before_the_steps_that_follow_them():
    w = world(steps_in_flight=2)
    w.submit([1, 2, 3], max_tokens=5)
    w.tick()
    (worker,) = w.workers.values()
    worker.execute()
    w.deliver(worker)
    assert [type(message) for message, _ in sent_in_a_tick(w)] == [Tokens, Step]
