"""The prefix cache: hits, their limits, salts, eviction, and that content which is not known to be
good is never shared."""

import numpy as np
import pytest
from pagewire.scheduler.blocks import BlockError, BlockPool, extend_chain, root_hash
from pagewire_protocol.messages import Finish
from scheduler.scheduler_sim import world

PROMPT = list(range(50, 63))


def one(w, prompt, **options):
    h = w.submit(prompt, **options)
    w.run()
    assert w.output(h) == w.expected(h)
    return w.attempts[h].placed.cached_tokens


def test_the_second_time_only_the_rest_is_computed():
    w = world()
    assert one(w, PROMPT) == 0
    assert one(w, PROMPT) == 12
    assert one(w, [*PROMPT[:9], 1, 2, 3]) == 8
    stats = w.scheduler.stats()
    assert stats["prefix_cache_queries"] == 13 + 13 + 12 and stats["prefix_cache_hits"] == 20
    w.assert_idle()


def test_a_wholly_cached_prompt_computes_its_last_token_again():
    w = world()
    assert one(w, PROMPT[:12]) == 0
    assert one(w, PROMPT[:12]) == 8


def test_a_prefix_under_way_is_waited_for_and_computed_once():
    w = world(max_num_batched_tokens=16)
    long = list(range(3, 43))
    first, second, third = w.submit(long), w.submit([*long[:36], 60, 61]), w.submit([60, 61, 62])
    w.tick()
    assert w.scheduler.stats()["num_requests_running"] == 1
    w.run()
    assert [w.output(h) for h in (first, second, third)] == [
        w.expected(h) for h in (first, second, third)
    ]
    assert (
        w.attempts[second].placed.cached_tokens == 32
    )  # the last block of 4 was not worth waiting for
    w.assert_idle()
    (worker,) = w.scheduler.engine.workers.values()
    assert not worker.kv_cache.computing


def test_nobody_waits_for_a_prefix_that_was_given_up():
    w = world(max_num_batched_tokens=16)
    long = list(range(3, 43))
    first, second = w.submit(long), w.submit([*long[:36], 60, 61])
    w.tick()
    w.cancel(first)
    w.run()
    assert w.output(second) == w.expected(second)
    w.assert_idle()
    (worker,) = w.scheduler.engine.workers.values()
    assert not worker.kv_cache.computing


def test_output_is_cached_as_well():
    w = world()
    h = w.submit(PROMPT, max_tokens=12)
    w.run()
    conversation = [*PROMPT, *w.output(h), 7]
    assert one(w, conversation) == 24


def test_salts_do_not_share():
    w = world()
    assert one(w, PROMPT, salt="a") == 0
    assert one(w, PROMPT, salt="b") == 0
    assert one(w, PROMPT) == 0
    assert one(w, PROMPT, salt="a") == 12


def test_caching_can_be_switched_off():
    w = world(enable_prefix_caching=False)
    assert one(w, PROMPT) == 0 == one(w, PROMPT)
    stats = w.scheduler.stats()
    assert stats["prefix_cache_queries"] == 0 and stats["kv_blocks_cached"] == 0
    (worker,) = w.scheduler.engine.workers.values()
    assert worker.kv_cache.pool.free == worker.kv_cache.pool.total


def test_the_least_recently_used_prefix_is_evicted():
    w = world(facts={"num_blocks": 16})
    old, new = [1] * 13, [2] * 13
    one(w, old, max_tokens=1), one(w, new, max_tokens=1), one(w, old, max_tokens=1)
    one(w, [3] * 53, max_tokens=1)
    assert one(w, old, max_tokens=1) == 8
    assert one(w, new, max_tokens=1) == 0


def test_blocks_are_shared_while_in_use():
    w = world()
    first = w.submit(PROMPT, max_tokens=30)
    for _ in range(4):
        w.step()
    second = w.submit(PROMPT, max_tokens=30)
    w.step()
    assert w.attempts[second].placed.cached_tokens == 12
    a, b = (r.blocks for r in next(iter(w.scheduler.engine.workers.values())).requests())
    assert len(set(a) & set(b)) == 3
    w.run()
    assert w.output(first) == w.output(second) == w.expected(first)
    w.assert_idle()


def test_nothing_is_shared_before_its_step_has_returned():
    w = world()
    w.submit(PROMPT)
    w.tick()
    (worker,) = w.scheduler.engine.workers.values()
    assert worker.in_flight.steps and worker.kv_cache.pool._index == {}
    second = w.submit(PROMPT)
    w.tick()
    w.step()
    w.run()
    assert w.attempts[second].placed.cached_tokens in (0, 12)
    w.assert_idle()


def test_non_finite_logits_fail_the_request_and_share_nothing():
    w = world()
    (worker,) = w.workers.values()
    good = w.submit([4, 4, 4], max_tokens=12)
    bad = w.submit(PROMPT, max_tokens=12)
    w.tick()
    w.step()
    w.step()
    (state,) = w.scheduler.engine.workers.values()
    slot = next(r.slot for r in state.requests() if r.handle == bad)
    seen = len(w.output(bad))
    worker.flag_next.add(slot)
    w.run()
    end = w.end(bad)
    assert end.finish is Finish.FAILED and end.status == 500
    assert end.message == f"the model produced non-finite logits at position {13 + seen}"
    assert w.output(bad) == w.expected(bad)[:seen]
    assert w.output(good) == w.expected(good)
    assert one(w, PROMPT, max_tokens=12) == 0
    w.assert_idle()


def chain(tokens, salt="", size=4):
    made = []
    extend_chain(made, root_hash(salt), np.array(tokens, np.int32), size)
    return made


def test_hashes_are_chained():
    assert len(chain(range(11))) == 2 and all(len(key) == 16 for key in chain(range(11)))
    assert chain(range(8)) == chain(range(11))
    assert chain([9, 1, 2, 3, 4, 5, 6, 7])[1] != chain([0, 1, 2, 3, 4, 5, 6, 7])[1]
    assert chain(range(8), "x")[0] != chain(range(8))[0]
    stepwise = chain(range(4))
    extend_chain(stepwise, root_hash(""), np.arange(12, dtype=np.int32), 4)
    assert stepwise == chain(range(12))
    assert root_hash("a", "b") != root_hash("ab", "")


def test_the_pool_refuses_what_would_break_the_law():
    pool = BlockPool(4)
    first, second = pool.take(2)
    pool.seal(first, b"k" * 16)
    with pytest.raises(BlockError, match="not writable"):
        pool.seal(first, b"l" * 16)
    with pytest.raises(BlockError, match="not sealed"):
        pool.hold([second])
    pool.release([first, second])
    for block in (first, second):
        with pytest.raises(BlockError, match="released twice"):
            pool.release([block])
    with pytest.raises(BlockError, match="5 blocks wanted"):
        pool.take(5)
    assert pool.match([b"k" * 16], 1) == [first] and pool.available == 4
    pool.check()
    pool._free.append(first)
    with pytest.raises(BlockError, match="of 4 blocks"):
        pool.check()


def test_of_two_equal_blocks_one_is_shared_and_the_other_freed():
    pool = BlockPool(4)
    first, second = pool.take(2)
    pool.seal(first, b"k" * 16)
    pool.seal(second, b"k" * 16)
    pool.release([second])
    assert pool.free == 3
    pool.release([first])
    assert pool.cached == 1
    pool.check()


def test_the_hashes_of_one_prompt_are_made_once(monkeypatch: pytest.MonkeyPatch):
    """However many choices have it. Those of another salt have hashes of their own."""
    hashed = []

    def counted(chain, root, tokens, block_size):
        before = len(chain)
        extend_chain(chain, root, tokens, block_size)
        hashed.append(len(chain) - before)

    monkeypatch.setattr("pagewire.scheduler.request.extend_chain", counted)
    w = world()
    handles = [w.submit(PROMPT, max_tokens=2) for _ in range(16)]
    w.run()
    assert all(w.output(h) == w.expected(h) for h in handles)
    assert sum(hashed) == len(PROMPT) // 4
    one(w, PROMPT, salt="other", max_tokens=2)
    assert sum(hashed) == 2 * (len(PROMPT) // 4)
    w.assert_idle()


def test_blocks_are_given_out_so_many_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Cached prompts fit a step in any number, and finding their blocks takes time in which nobody
    else is served."""
    monkeypatch.setattr("pagewire.scheduler.engine.BLOCKS_AT_A_TIME", 8)
    w = world()
    one(w, PROMPT)
    handles = [w.submit(PROMPT) for _ in range(6)]
    w.tick()
    assert w.scheduler.stats()["num_requests_running"] == 4, "two of 4 blocks in each of 2 steps"
    w.run()
    assert all(w.output(h) == w.expected(h) for h in handles)
    w.assert_idle()


@pytest.mark.parametrize("caching", [True, False])
def test_requests_with_one_prompt_do_not_keep_each_other(caching):
    """Without a prefix cache none of them makes the hashes for which it knows the one before."""
    w = world(enable_prefix_caching=caching)
    for _ in range(20):
        w.submit([1, 2, 3, 4, 5], max_tokens=1)
        w.run()
    (latest,) = w.scheduler.engine._same_prompt.values()
    assert latest.twin is None or latest.twin.twin is None
