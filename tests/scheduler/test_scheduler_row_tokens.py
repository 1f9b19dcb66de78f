"""Rows that bring several tokens or none, requests that want no token, and the fields of a request
that the scheduler only carries."""

import msgspec
import numpy as np
import pytest
from pagewire.scheduler.results import WorkerFault, absorb
from pagewire_protocol.grammar import Grammar, GrammarKind
from pagewire_protocol.messages import Finish, LogprobColumns, RequestKind, Submit, pack, unpack
from pagewire_protocol.sampling import Sampling
from scheduler.scheduler_sim import VOCAB, World, expected_output, ints, next_token

PROMPT = list(range(50, 63))


def world(row_tokens=(1,), facts=None, **config):
    w = World(**{"max_num_batched_tokens": 64, **config})
    w.add_worker(**{"row_tokens": row_tokens, **(facts or {})})
    w.add_tokenizer()
    w.tick()
    return w


# --- several tokens a row, or none ---


@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("row_tokens", [(0, 1), (1,), (3,), (0, 1, 3), (0, 0, 0, 2)])
def test_requests_get_their_tokens_whatever_a_row_brings(row_tokens, ahead):
    w = world(row_tokens, steps_in_flight=ahead)
    handles = [w.submit(range(i, i + 5), max_tokens=7 + i) for i in range(5)]
    w.run()
    for h in handles:
        assert w.output(h) == w.expected(h) and w.end(h).finish is Finish.LENGTH
    w.assert_idle()


def test_three_tokens_a_row_take_a_third_of_the_steps():
    steps = {}
    for row_tokens in ((1,), (3,)):
        w = world(row_tokens, steps_in_flight=1)
        w.submit(PROMPT, max_tokens=30)
        w.run()
        (worker,) = w.workers.values()
        steps[row_tokens] = sum(1 for step in worker.steps if step.repeat or step.run_slots)
    assert steps[1,] == 30 and steps[3,] <= 12


@pytest.mark.parametrize("row_tokens", [(3,), (0, 3, 2)])
def test_what_follows_a_stop_token_in_its_row_is_dropped(row_tokens):
    full = expected_output(PROMPT, Sampling(seed=0, max_tokens=8))
    for i in range(8):
        w = world(row_tokens)
        h = w.submit(PROMPT, max_tokens=8, stop_token_ids=(full[i],))
        w.run()
        assert w.output(h) == full[: i + 1] and w.end(h).finish is Finish.STOP
        w.assert_idle()


@pytest.mark.parametrize("row_tokens", [(3,), (0, 1, 3)])
@pytest.mark.parametrize("caching", [True, False])
def test_preemption_and_shared_blocks_with_rows_of_any_length(row_tokens, caching):
    w = world(
        row_tokens,
        {"num_blocks": 16, "block_size": 4, "cascade": True},
        enable_prefix_caching=caching,
    )
    handles = [w.submit([*PROMPT[:8], i], max_tokens=20) for i in range(6)]
    w.run()
    assert w.scheduler.stats()["num_preemptions"] > 0
    for h in handles:
        assert w.output(h) == w.expected(h)
    w.assert_idle()


@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("forced", [(2,), (0, 0, 3), (15, 0)])
@pytest.mark.parametrize("caching", [True, False])
def test_forced_tokens_come_in_fewer_steps_and_need_no_room_kept_for_them(forced, ahead, caching):
    """Blocks are small and few, so that rows are left out and share what they have."""
    facts = {"num_blocks": 24, "block_size": 4, "forced": forced}
    w = world(facts=facts, steps_in_flight=ahead, enable_prefix_caching=caching)
    handles = [w.submit([*PROMPT[:8], i], max_tokens=20) for i in range(6)]
    w.run()
    for h in handles:
        assert w.output(h) == w.expected(h) and w.end(h).finish is Finish.LENGTH
    (worker,) = w.workers.values()
    assert worker.left_out > 0 or ahead == 1 or forced == (2,)
    w.assert_idle()


def test_a_request_alone_needs_a_step_for_each_run():
    steps = {}
    for forced in ((0,), (3,)):
        w = world(facts={"block_size": 16, "forced": forced}, steps_in_flight=2)
        w.submit(PROMPT, max_tokens=40)
        w.run()
        (worker,) = w.workers.values()
        steps[forced] = sum(1 for step in worker.steps if step.repeat or step.run_slots)
    assert steps[0,] <= 42 and steps[3,] <= 20


@pytest.mark.parametrize("forced", [(3,), (0, 2)])
def test_what_follows_a_stop_token_in_a_forced_run_is_dropped(forced):
    full = expected_output(PROMPT, Sampling(seed=0, max_tokens=8))
    for i in range(8):
        w = world(facts={"forced": forced})
        h = w.submit(PROMPT, max_tokens=8, stop_token_ids=(full[i],))
        w.run()
        assert w.output(h) == full[: i + 1] and w.end(h).finish is Finish.STOP
        w.assert_idle()


def test_rows_in_another_order_keep_their_tokens():
    w = world((2, 0, 3, 1), facts={"max_num_seqs": 6})
    (worker,) = w.workers.values()
    worker.shuffle = True
    handles = [w.submit([i, 2, 3], max_tokens=9) for i in range(6)]
    w.run()
    for h in handles:
        assert w.output(h) == w.expected(h)


@pytest.mark.parametrize(
    ("counts", "tokens"),
    [([1, 1, 0], [1, 2]), ([2], [1, 2]), ([4, 0], [1, 2, 3, 4]), ([-1, 2], [1]), ([1, 0], [1, 2])],
    ids=["rows", "too few rows", "too many tokens", "negative", "sum"],
)
def test_counts_that_do_not_fit_are_a_fault_of_the_worker(counts, tokens):
    w = world((3,))
    for i in range(2):
        w.submit([i, 2, 3], max_tokens=9)
    w.tick()
    (worker,) = w.workers.values()
    (state,) = w.scheduler.engine.workers.values()
    worker.execute()
    result = msgspec.structs.replace(
        worker.results[0], counts=pack("i", counts), tokens=pack("i", tokens)
    )
    engine = w.scheduler.engine
    with pytest.raises(WorkerFault):
        absorb(state, result, engine.out, engine.end, engine._failed)
    w.deliver(worker)
    w.run()
    w.assert_idle()


def test_tokens_beyond_the_blocks_of_a_row_are_a_fault_of_the_worker():
    """Found before anything is changed: that the tokens are not in the cache."""
    w = world(facts={"num_blocks": 24, "block_size": 4, "forced": (15,)}, steps_in_flight=1)
    w.submit(PROMPT, max_tokens=40)
    (worker,) = w.workers.values()
    (state,) = w.scheduler.engine.workers.values()
    w.tick()
    worker.execute()
    w.deliver(worker)
    w.tick()
    worker.execute()
    result = worker.results[0]
    allocated = int(state.slots.num_allocated[0])
    count = allocated - int(state.slots.num_received[0]) + 2
    assert 1 < count <= 16
    changed = msgspec.structs.replace(
        result, counts=pack("i", [count]), tokens=pack("i", [next_token(PROMPT)] * count)
    )
    engine = w.scheduler.engine
    with pytest.raises(WorkerFault, match=f"computed {allocated + 1} tokens .* hold {allocated}"):
        absorb(state, changed, engine.out, engine.end, engine._failed)
    w.deliver(worker)
    w.run()
    w.assert_idle()


def test_logprobs_follow_the_tokens_that_were_taken():
    """Of a row of three the second token ends the request."""
    first = next_token(PROMPT)
    second = next_token([*PROMPT, first])
    w = world((3,))
    handle = w.submit(PROMPT, max_tokens=8, stop_token_ids=(second,))
    w.tick()
    (worker,) = w.workers.values()
    (state,) = w.scheduler.engine.workers.values()
    worker.execute()
    result = worker.results[0]
    tokens = ints(result.tokens)
    assert len(tokens) == 3 and tokens[:2] == [first, second]
    three = pack("i", [0, 1, 2])
    ones = pack("i", [1, 1, 1])
    columns = LogprobColumns(three, ones, ones, result.tokens, pack("f", [-1.0, -2.0, -3.0]))
    result = msgspec.structs.replace(result, logprobs=columns)
    engine = w.scheduler.engine
    absorb(state, result, engine.out, engine.end, engine._failed)
    (outgoing,) = engine.out.take().values()
    message = outgoing.message()
    assert ints(message.counts) == [2] and ints(message.tokens) == tokens[:2]
    assert ints(message.handles) == [handle] and ints(message.positions) == [0]
    assert ints(message.logprobs.rows) == [0, 1]
    assert np.frombuffer(message.logprobs.values, np.float32).tolist() == [-1.0, -2.0]


# --- no token at all ---


@pytest.mark.parametrize("budget", [4, 64])
@pytest.mark.parametrize("ahead", [1, 3])
def test_a_request_for_no_tokens_ends_when_its_prompt_is_computed(budget, ahead):
    w = world(max_num_batched_tokens=budget, steps_in_flight=ahead)
    other = w.submit([1, 2, 3], max_tokens=20)
    handle = w.submit(PROMPT, max_tokens=0)
    w.run()
    end = w.end(handle)
    assert end.finish is Finish.LENGTH and end.stop_reason is None and w.output(handle) == []
    assert w.attempts[handle].placed.cached_tokens == 0
    assert w.output(other) == w.expected(other)
    (worker,) = w.workers.values()
    assert sum(len(ints(step.run_slots)) > 1 for step in worker.steps), "they ran side by side"
    w.assert_idle()


def test_its_blocks_are_in_the_cache_afterwards():
    w = world()
    w.submit(PROMPT, max_tokens=0)
    w.run()
    again = w.submit(PROMPT, max_tokens=3)
    w.run()
    assert w.attempts[again].placed.cached_tokens == 12
    assert w.output(again) == w.expected(again)


def test_it_gets_the_log_probabilities_of_its_prompt():
    w = world(max_num_batched_tokens=5)
    handle = w.submit(PROMPT, max_tokens=0, prompt_logprobs=0)
    w.run()
    assert w.attempts[handle].scores == dict(enumerate(PROMPT[1:], 1))
    assert w.end(handle).finish is Finish.LENGTH


def test_a_prompt_as_long_as_the_context_fits_when_no_token_is_wanted():
    w = world(facts={"num_blocks": 16, "block_size": 4, "max_model_len": 64})
    fits = w.submit(range(64), max_tokens=0)
    too_long = w.submit(range(64), max_tokens=1)
    w.run()
    assert w.end(fits).finish is Finish.LENGTH
    assert w.end(too_long).finish is Finish.REFUSED


def test_it_can_be_cancelled_and_lost():
    w = world(max_num_batched_tokens=4)
    cancelled = w.submit(PROMPT, max_tokens=0)
    w.step()
    w.cancel(cancelled)
    w.run()
    assert w.end(cancelled).finish is Finish.CANCELLED
    lost = w.submit(PROMPT, max_tokens=0)
    w.step()
    w.kill_worker(next(iter(w.workers.values())))
    w.run()
    assert w.end(lost).finish is Finish.LOST


# --- fields that are only carried ---


def test_kind_model_adapter_and_grammar_reach_the_worker():
    w = world()
    (inbox,) = w.tokenizers
    submit = Submit(
        b"r" * 16,
        1,
        5,
        inbox,
        pack("i", PROMPT),
        b"",
        Sampling(seed=0, max_tokens=1),
        kind=RequestKind.GENERATE,
        model="m",
        adapter="a",
        grammar=Grammar(GrammarKind.REGEX, "g"),
    )
    w.scheduler.handle(submit)
    w.scheduler.engine.advance(w._receive, w.now)
    (worker,) = w.workers.values()
    (admission,) = worker.inbox[0].admit
    carried = admission.kind, admission.model, admission.adapter, admission.grammar
    assert carried == (RequestKind.GENERATE, "m", "a", Grammar(GrammarKind.REGEX, "g"))
    assert unpack("i", admission.prompt).tolist() == PROMPT and max(PROMPT) < VOCAB


def test_requests_for_different_adapters_share_no_blocks():
    w = world()

    def cached(adapter):
        handle = w.submit(PROMPT, max_tokens=1, adapter=adapter)
        w.run()
        return w.attempts[handle].placed.cached_tokens

    assert [cached(adapter) for adapter in ("a", "b", "a")] == [0, 0, 12]
