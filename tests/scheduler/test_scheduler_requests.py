"""What becomes of requests besides tokens: refusals, cancellation, attempts, placement, peers that
come and go."""

import pytest
from pagewire.scheduler.state import Tick, Unreachable
from pagewire_protocol.messages import (
    Finish,
    Goodbye,
    Heartbeat,
    Hello,
    Peer,
    Role,
    Roster,
    StepResult,
    Submit,
    pack,
)
from pagewire_protocol.sampling import Sampling
from scheduler.scheduler_sim import World, expected_output, world

PROMPT = list(range(50, 63))


def refused(w, status, text, *args, **options):
    h = w.submit(*args, **options)
    w.tick()
    end = w.end(h)
    assert end.finish is Finish.REFUSED and end.status == status and text in end.message, end
    w.run()
    assert len(w.attempts[h].ends) == 1 and w.output(h) == list(options.get("output", ()))
    return end


def test_what_never_fits_is_refused_with_the_arithmetic():
    w = world(facts={"max_model_len": 40, "num_blocks": 32})
    assert (
        refused(
            w,
            400,
            "33 prompt tokens and max_tokens 8 make 41, which is more than the context of 40",
            range(33),
        ).param
        == "max_tokens"
    )
    w = world(facts={"max_model_len": 400, "num_blocks": 10})
    refused(
        w, 400, "make 41, which is more than the KV cache of 10 blocks of 4 = 40 tokens", range(33)
    )
    w.assert_idle()


def test_tokens_outside_the_vocabulary_and_broken_columns_are_refused():
    w = world()
    assert (
        refused(w, 400, "token id 1000 is outside the model's vocabulary of 1000", [1, 1000]).param
        == "prompt"
    )
    refused(w, 400, "token id -1 is outside", [1, -1])
    refused(w, 400, "prompt is empty", [])
    inbox = next(iter(w.tokenizers))
    w.submit([1])
    w._handles += 1
    w.attempts[w._handles] = type(w.attempts[1])(b"x" * 16, 1, [], [], None, inbox)
    w.send(Submit(b"x" * 16, 1, w._handles, inbox, b"abc", b"", Sampling(seed=0, max_tokens=1)))
    w.tick()
    assert "multiple of 4" in w.end(w._handles).message


def test_a_full_queue_answers_429():
    w = world(max_num_seqs=1, max_queued_reqs=2)
    kept = [w.submit([i, 2], max_tokens=4) for i in range(3)]
    assert refused(w, 429, "the queue is full: 2 requests", [9, 9]).retry_after_s >= 1
    w.run()
    for h in kept:
        assert w.output(h) == w.expected(h)
    w = world(max_num_seqs=1, max_queued_tokens=20)
    for i in range(2):
        w.submit([i] * 12, max_tokens=4)
    refused(w, 429, "and this one has 9", [9] * 9)
    later = w.submit([9] * 9, attempt=2)
    w.run()
    assert w.output(later) == w.expected(later)


def test_without_a_worker_requests_wait_while_one_loads_and_else_get_503():
    w = World()
    w.add_tokenizer()
    w.tick(6)
    refused(w, 503, "no worker", [1, 2])
    w.send(Hello(Peer(Role.WORKER, "worker-3", "ipc:///w3", 1003, False, "loading", 0.5)))
    h = w.submit([1, 2])
    w.tick()
    assert not w.attempts[h].ends
    w.add_worker()
    w.run()
    assert w.output(h) == w.expected(h)


def test_a_new_scheduler_waits_for_the_workers_of_its_predecessor():
    w = World()
    w.add_tokenizer()
    first, second = w.submit([1, 2]), w.submit([1, 2, 3], attempt=3)
    w.tick(1.9)
    assert not w.attempts[first].ends
    for _ in range(8):
        for inbox, peer in w.tokenizers.items():
            w.send(Heartbeat(inbox, peer.incarnation, 1, False))
        w.tick(1.5)
    assert not w.attempts[second].ends
    for _ in range(45):
        for inbox, peer in w.tokenizers.items():
            w.send(Heartbeat(inbox, peer.incarnation, 1, False))
        w.tick(1.5)
    assert w.end(first).status == w.end(second).status == 503
    w.assert_idle()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
def test_cancel_in_every_phase(steps):
    w = world(max_num_batched_tokens=4, facts={"max_num_seqs": 2})
    others = [w.submit([i, 2, 3], max_tokens=9) for i in range(2)]
    h = w.submit(PROMPT, max_tokens=20)
    for _ in range(steps):
        w.step()
    w.cancel(h)
    w.cancel(h)
    w.run()
    assert w.end(h).finish is Finish.CANCELLED
    assert w.output(h) == w.expected(h)[: len(w.output(h))]
    for other in others:
        assert w.output(other) == w.expected(other)
    w.assert_idle()


def test_cancel_of_a_preempted_request():
    w = world(facts={"num_blocks": 16, "block_size": 4})
    handles = [w.submit([i, 2, 3, 4, 5], max_tokens=40) for i in range(4)]
    while not w.scheduler.engine.counters.num_preemptions:
        w.step()
    (worker,) = w.scheduler.engine.workers.values()
    draining = [p.request for p in worker.kv_cache.deferred if p.request]
    assert draining
    w.cancel(draining[0].handle)
    w.run()
    assert w.end(draining[0].handle).finish is Finish.CANCELLED
    for h in handles:
        if h != draining[0].handle:
            assert w.output(h) == w.expected(h)
    w.assert_idle()


def test_cancel_of_the_unknown_and_of_a_newer_attempt_is_ignored():
    w = world()
    old = w.submit([1, 2], rid=b"r" * 16, attempt=1, max_tokens=9)
    w.step()
    new = w.submit([1, 2], rid=b"r" * 16, attempt=2, output=w.expected(old)[:1], max_tokens=9)
    w.cancel(old)
    w.run()
    assert w.end(old).finish is Finish.CANCELLED and w.end(new).finish is Finish.LENGTH
    assert w.output(new) == w.expected(new)
    assert w.attempts[new].execution != w.attempts[old].execution
    w.assert_idle()


def test_an_older_or_equal_attempt_does_not_replace():
    w = world()
    new = w.submit([1, 2], rid=b"r" * 16, attempt=2)
    old = w.submit([1, 2], rid=b"r" * 16, attempt=1)
    twin = w.submit([1, 2], rid=b"r" * 16, attempt=2)
    w.run()
    assert w.end(old).finish is w.end(twin).finish is Finish.CANCELLED
    assert w.output(new) == w.expected(new) and not w.output(old) and not w.output(twin)


def test_resubmission_goes_on_where_the_output_ends():
    w = world()
    full = expected_output(PROMPT, Sampling(seed=0, max_tokens=10))
    for size in range(10):
        h = w.submit(PROMPT, attempt=2, output=full[:size], max_tokens=10)
        w.run()
        assert w.output(h) == full and w.end(h).finish is Finish.LENGTH
    done = w.submit(PROMPT, attempt=2, output=full, max_tokens=10)
    stopped = w.submit(PROMPT, attempt=2, output=full[:4], max_tokens=10, stop_token_ids=(full[3],))
    w.tick()
    assert w.end(done).finish is Finish.LENGTH and w.end(stopped).stop_reason == full[3]
    w.assert_idle()


def test_placement_follows_the_prefix_then_the_load():
    w = world(workers=2, facts={"num_blocks": 64})
    a, b = w.workers
    first = w.submit(PROMPT)
    w.run()
    home = a if w.workers[a].steps else b
    other = b if home == a else a
    busy = [w.submit([9, i], max_tokens=50) for i in range(4)]
    w.tick()
    loads = {r.inbox: r.load for r in w.scheduler.engine.workers.values()}
    assert loads == {home: 2, other: 2}
    extra = w.submit([7, 7], max_tokens=50)
    w.tick()
    again = w.submit(PROMPT)
    w.step()
    assert w.attempts[again].placed.cached_tokens == 12
    engine = w.scheduler.engine
    assert engine.workers[engine.live[w.attempts[again].rid].worker].inbox == home
    w.run()
    for h in [first, *busy, extra, again]:
        assert w.output(h) == w.expected(h)
    w.assert_idle()


def test_two_tokenizers_get_their_own_rows_only():
    w = world()
    other = w.add_tokenizer()
    handles = [
        w.submit([i, 2, 3], tokenizer=t, max_tokens=9) for i in range(3) for t in list(w.tokenizers)
    ]
    assert len({w.attempts[h].tokenizer for h in handles}) == 2
    w.step()
    w.kill_tokenizer(other)
    w.run()
    for h in handles:
        if w.attempts[h].tokenizer != other:
            assert w.output(h) == w.expected(h)
    assert other in w.forgotten
    w.assert_idle()


def test_a_lost_worker_ends_its_requests_and_the_others_go_on():
    w = world(workers=2)
    handles = [w.submit([i, 2, 3], max_tokens=20) for i in range(6)]
    w.step()
    victim = next(iter(w.workers.values()))
    w.kill_worker(victim)
    w.run()
    finishes = [w.end(h).finish for h in handles]
    assert sorted(finishes) == [Finish.LENGTH] * 3 + [Finish.LOST] * 3
    again = [
        w.submit(a.prompt, rid=a.rid, attempt=2, output=a.output, max_tokens=20)
        for a in [w.attempts[h] for h in handles if w.end(h).finish is Finish.LOST]
    ]
    w.run()
    for h in again:
        assert w.output(h) == w.expected(h)
    w.assert_idle()


def test_a_worker_given_up_may_come_back_and_is_emptied_first():
    w = world()
    worker = next(iter(w.workers.values()))
    h = w.submit([1, 2, 3], max_tokens=20)
    w.step()
    w.send(Unreachable(worker.peer.inbox))
    worker.shadow.runs.clear()
    w.tick()
    assert w.end(h).finish is Finish.LOST
    w.send(Hello(worker.peer, worker.facts))
    again = w.submit([1, 2, 3], attempt=2, max_tokens=20)
    w.run()
    assert w.output(again) == w.expected(again)
    assert not worker.slots or set(worker.slots) == {0}


def test_answers_that_do_not_fit_cost_the_worker_its_place():
    for spoil in ("rows", "slot", "token", "gap"):
        w = world()
        worker = next(iter(w.workers.values()))
        h = w.submit([1, 2, 3], max_tokens=20)
        w.tick()
        worker.execute()
        result = worker.results.popleft()
        slots, tokens, n = result.slots, result.tokens, result.n
        if spoil == "rows":
            slots = tokens = b""
        elif spoil == "slot":
            slots = pack("i", [3])
        elif spoil == "token":
            tokens = pack("i", [-5])
        else:
            n += 1
        w.send(StepResult(1, worker.incarnation, n, slots, tokens, bytes(len(slots) // 4)))
        w.tick()
        assert w.end(h).finish is Finish.LOST and not w.scheduler.engine.workers
        w.send(Hello(worker.peer, worker.facts))
        assert not w.scheduler.engine.workers


def test_stale_results_change_nothing():
    w = world()
    worker = next(iter(w.workers.values()))
    h = w.submit([1, 2, 3], max_tokens=6)
    w.tick()
    worker.execute()
    result = worker.results[0]
    w.deliver(worker)
    w.send(result)
    w.send(StepResult(7, worker.incarnation, 2, b"", b"", b""))
    w.send(StepResult(1, 12345, 2, b"", b"", b""))
    w.run()
    assert w.output(h) == w.expected(h)


def test_the_roster_tells_what_the_stack_can_do():
    w = World(epoch=9)
    tokenizer = w.add_tokenizer()
    w.tick()
    assert w.rosters[tokenizer].max_model_len == 0 and w.rosters[tokenizer].epoch == 9
    a, b = w.add_worker(max_model_len=64, eos=(3,)), w.add_worker(max_model_len=48, eos=(3,))
    w.tick()
    roster = w.rosters[tokenizer]
    assert roster.max_model_len == 48 and roster.vocab_size == 1000 and roster.eos_token_ids == (3,)
    assert roster.has_text and roster.has_chat_template and len(roster.peers) == 3
    refused(w, 400, "context of 48", [1], max_tokens=48)
    w.kill_worker(b)
    w.tick()
    assert (
        w.rosters[tokenizer].max_model_len == 64 and w.rosters[a.peer.inbox] == w.rosters[tokenizer]
    )
    h = w.submit([1], max_tokens=48)
    w.run()
    assert w.output(h) == w.expected(h)


def test_frontends_get_statistics_every_second_and_others_do_not():
    w = World()
    w.send(Heartbeat("ipc:///early", 4711, 0, False))
    w.tick()
    assert w.rosters["ipc:///early"].peers == ()
    w = world()
    w.send(Hello(Peer(Role.FRONTEND, "f", "ipc:///f", 77, True)))
    w.submit([1, 2, 3], max_tokens=8)
    w.run()
    w.rosters.clear()
    w.tick(1.1)
    assert set(w.rosters) == {"ipc:///f"}
    stats = w.rosters["ipc:///f"].stats
    assert stats["prompt_tokens"] == 3 and stats["generation_tokens"] == 8
    assert (
        stats["kv_blocks_total"] == stats["kv_blocks_free"] == 32
        and stats["kv_cache_usage_perc"] == 0
    )
    assert {
        "num_requests_running",
        "num_requests_waiting",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
    } <= set(stats)


def test_peers_are_dropped_for_silence_replaced_by_name_and_greeted_when_unknown():
    w = world()
    worker = next(iter(w.workers.values()))
    h = w.submit([1, 2, 3], max_tokens=20)
    w.tick()
    w.send(Heartbeat("ipc:///new", 4711, 0, False))
    w.tick()
    assert w.rosters["ipc:///new"].epoch == 1
    for _ in range(8):
        w.send(Heartbeat(worker.peer.inbox, worker.incarnation, 0, False))
        w.tick(1.5)
    assert not w.tokenizers.keys() - set(w.forgotten) and w.scheduler.engine.workers
    assert not w.scheduler.engine.live and not w.attempts[h].ends
    twin = Peer(Role.WORKER, worker.peer.name, "ipc:///w2", 4242, True)
    w.send(Hello(twin, worker.facts))
    assert list(w.scheduler.engine.workers) == [4242]
    w.send(Goodbye(4242))
    assert not w.scheduler.engine.workers


def test_a_pause_of_the_scheduler_is_not_its_peers_silence():
    w = world()
    w.scheduler.handle(Tick(w.now + 60))
    w.scheduler.handle(Tick(w.now + 61))
    assert w.scheduler.engine.workers and not w.forgotten


def test_results_for_a_process_that_never_says_hello_are_given_up():
    w = world()
    handle = w.submit([1, 2, 3], tokenizer="ipc:///stranger", max_tokens=40)
    del w.attempts[handle]
    w._tokens = lambda *_: None
    w.tick()
    assert len(w.scheduler.engine.live) == 1
    for _ in range(8):
        for peer in [*w.tokenizers.values(), *(one.peer for one in w.workers.values())]:
            w.send(Heartbeat(peer.inbox, peer.incarnation, 1, False))
        w.tick(1.5)
    assert not w.scheduler.engine.live and "ipc:///stranger" in w.forgotten


def test_the_wait_of_a_refused_request_is_what_the_queue_was_measured_to_take():
    w = world(max_num_seqs=1, max_queued_reqs=20)
    for i in range(20):
        w.submit([i, 2], max_tokens=1)
    w.tick()
    for _ in range(16):
        w.tick(0.5)
        w.step()
    rate = w.scheduler.stats()["queue_requests_per_second"]
    assert 0.5 < rate < 4
    while w.scheduler.engine.queue.count < 20:
        w.submit([9, 9], max_tokens=1)
    end = refused(w, 429, "the queue is full", [9, 9])
    assert end.retry_after_s == pytest.approx(20 / rate, abs=2)


def test_frontends_hear_at_once_that_the_queue_is_full():
    w = world(max_num_seqs=1, max_queued_reqs=2)
    w.send(Hello(Peer(Role.FRONTEND, "f", "ipc:///f.sock", 99, True)))
    w.tick()
    rosters = []
    w.scheduler._send = lambda inbox, message: (
        rosters.append(message) if isinstance(message, Roster) else w._receive(inbox, message)
    )
    for i in range(3):
        w.submit([i, 2], max_tokens=40)
    w.tick()
    assert not rosters
    handles = [w.submit([9, 9]) for _ in range(2)]
    w.tick()
    assert [w.end(h).status for h in handles] == [429, 429]
    (roster,) = rosters
    assert roster.stats["num_requests_waiting"] == roster.stats["max_queued_reqs"] == 2


def test_a_request_whose_time_is_over_ends_wherever_it_is():
    w = world(max_num_seqs=1)
    running = w.submit([1, 2], max_tokens=40, timeout_ms=3000)
    waiting = w.submit([3, 4], max_tokens=40, timeout_ms=1500)
    patient = w.submit([5, 6], max_tokens=1)
    w.tick()
    w.step()
    w.tick(2.0)
    assert not w.attempts[running].ends and not w.attempts[waiting].ends
    w.tick(1.0)
    assert w.end(waiting).status == 504 and not w.attempts[running].ends
    w.tick(1.5)
    assert (w.end(running).finish, w.end(running).status) == (Finish.REFUSED, 504)
    w.run()
    assert w.end(patient).finish is Finish.LENGTH
    assert not w.scheduler.engine.live
