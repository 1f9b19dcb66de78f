"""Requests whose clients read nothing: they give their slots and blocks to others, lose no token,
and go on when their clients read again."""

import pytest
from pagewire.scheduler.request import Phase
from pagewire_protocol.messages import Finish, Park
from scheduler.scheduler_sim import World

PROMPT = list(range(50, 63))


@pytest.fixture
def w():
    made = World(max_num_seqs=2)
    made.add_worker()
    made.add_tokenizer()
    made.tick()
    return made


def park(w, handle, parked=True, attempt=None):
    of = w.attempts[handle]
    w.send(Park(((of.rid, attempt or of.attempt),), parked))


def running(w):
    return w.scheduler.stats()["num_requests_running"]


def test_a_parked_request_gets_no_tokens_until_its_client_reads(w):
    slow, other = w.submit(PROMPT, max_tokens=40), w.submit([7, 8], max_tokens=40)
    for _ in range(5):
        w.step()
    park(w, slow)
    for _ in range(5):
        w.step()
    got = len(w.output(slow))
    w.run()
    assert w.output(other) == w.expected(other)
    assert len(w.output(slow)) == got < 40 and not w.attempts[slow].ends
    stats = w.scheduler.stats()
    assert (stats["requests_parked"], stats["num_requests_waiting"], running(w)) == (1, 0, 0)
    assert stats["kv_blocks_free"] == stats["kv_blocks_total"]
    park(w, slow, False)
    w.run()
    assert w.output(slow) == w.expected(slow)
    w.assert_idle()


def test_its_slot_and_its_blocks_go_to_others(w):
    slow = [w.submit([i, 9], max_tokens=100) for i in range(2)]
    w.step()
    waiting = w.submit(PROMPT, max_tokens=4)
    w.step()
    for handle in slow:
        park(w, handle)
    w.run()
    assert w.output(waiting) == w.expected(waiting)


@pytest.mark.parametrize("steps", range(6))
def test_parked_and_read_again_at_any_moment(w, steps):
    handle = w.submit(PROMPT, max_tokens=12)
    for step in range(40):
        if step >= steps:
            park(w, handle, step % 2 == 0)
        w.step()
    park(w, handle, False)
    w.run()
    assert w.output(handle) == w.expected(handle)
    assert w.end(handle).finish is Finish.LENGTH
    w.assert_idle()


def test_one_that_waits_is_parked_when_its_turn_comes(w):
    first = [w.submit([i, 9], max_tokens=8) for i in range(2)]
    waiting = w.submit(PROMPT, max_tokens=4)
    w.tick()
    park(w, waiting)
    w.run()
    assert all(w.output(h) == w.expected(h) for h in first) and not w.output(waiting)
    assert w.scheduler.engine.parked[w.attempts[waiting].rid].phase is Phase.PARKED
    park(w, waiting, False)
    w.run()
    assert w.output(waiting) == w.expected(waiting)
    w.assert_idle()


def test_a_parked_request_can_be_cancelled_and_replaced(w):
    cancelled, replaced = w.submit(PROMPT, max_tokens=30), w.submit([7, 8], max_tokens=30)
    w.step()
    for handle in (cancelled, replaced):
        park(w, handle)
    w.run()
    w.cancel(cancelled)
    w.tick()
    assert w.end(cancelled).finish is Finish.CANCELLED
    again = w.submit([7, 8], rid=w.attempts[replaced].rid, attempt=2, max_tokens=30)
    w.run()
    assert w.output(again) == w.expected(again)
    assert not w.scheduler.engine.parked
    w.assert_idle()


def test_a_worker_s_death_finds_parked_requests_too(w):
    handle = w.submit(PROMPT, max_tokens=30)
    w.step()
    park(w, handle)
    w.kill_worker(next(iter(w.workers.values())))
    w.tick()
    other = w.add_worker()
    w.tick()
    assert other
    if not w.attempts[handle].ends:
        park(w, handle, False)
        w.run()
        assert w.output(handle) == w.expected(handle)
    else:
        assert w.end(handle).finish is Finish.LOST
    assert not w.scheduler.engine.parked


def test_another_attempt_and_an_unknown_request_are_left_as_they_are(w):
    handle = w.submit(PROMPT, max_tokens=4)
    w.step()
    park(w, handle, attempt=2)
    w.send(Park(((b"x" * 16, 1),), True))
    w.run()
    assert w.output(handle) == w.expected(handle)
    w.assert_idle()
