"""What the scheduler makes of workers that die, are announced dead or cannot be trusted, and of
requests at which they die."""

import pytest
from pagewire.scheduler.kv_cache import KVCacheManager
from pagewire.scheduler.state import Tick
from pagewire_protocol.messages import (
    Death,
    Finish,
    Goodbye,
    Heartbeat,
    Hello,
    Peer,
    Role,
    StepResult,
)
from pagewire_protocol.structs import FAILING, NOT_AWAITED
from scheduler.scheduler_sim import World, ints


def world(workers=1, **config):
    made = World(**config)
    for _ in range(workers):
        made.add_worker(num_blocks=256)
    made.add_tokenizer()
    made.tick()
    return made


def death(worker, failures=1, restart_in_s=0.0):
    peer = worker.peer
    return Death(
        Role.WORKER, peer.name, peer.incarnation, "was killed by SIGKILL", failures, restart_in_s
    )


def next_life(worker, incarnation, ready=True):
    peer = worker.peer
    return Peer(Role.WORKER, peer.name, f"ipc:///next{incarnation}", incarnation, ready)


# --- distrust ---


def distrust(w):
    worker = next(iter(w.workers.values()))
    handle = w.submit([1, 2, 3], max_tokens=20)
    w.tick()
    w.send(StepResult(1, worker.incarnation, 99, b"", b"", b""))
    w.tick()
    return worker, w.end(handle)


def test_a_distrusted_worker_is_told_to_end_at_once_and_again_until_it_has():
    w = world()
    worker, end = distrust(w)
    inbox = worker.peer.inbox
    assert end.finish is Finish.LOST and end.worker_died
    assert [address for address, _ in w.shutdowns] == [inbox]
    assert "answered step 99" in w.shutdowns[0][1]
    assert inbox not in w.forgotten, "the message may still be on its way"
    w.send(Heartbeat(inbox, worker.incarnation, 0, False))
    w.send(Hello(worker.peer, worker.facts))
    w.tick()
    assert len(w.shutdowns) == 3 and not w.scheduler.engine.workers
    w.send(Goodbye(worker.incarnation, failed=True))
    assert inbox in w.forgotten
    w.send(Hello(next_life(worker, 4242), worker.facts))
    assert list(w.scheduler.engine.workers) == [4242]


def fails(*_, **__):
    raise IndexError("list index out of range")


def _since_clear(worker):
    """(step, what it runs) of the steps from the last one on that clears the slots."""
    steps = list(worker.inbox)
    first = max((i for i, step in enumerate(steps) if step.clear), default=len(steps))
    return [(step, worker.shadow.runs[step.n]) for step in steps[first:]]


FAULTS = (
    "results._seal_full",
    "results._take",
    "batch._select_decodes",
    "batch._message",
    "worker_state.WorkerState.place",
    "kv_cache.KVCacheManager.allocate",
)


@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_of_the_scheduler_costs_a_worker_no_more_than_its_requests(where, monkeypatch):
    """No answer would come otherwise. What was known of the worker is forgotten, and it begins
    anew, without being started again."""
    w = World()
    for _ in range(2):
        w.add_worker(num_blocks=256, row_tokens=(1, 2))
    w.add_tokenizer()
    handles = [w.submit(range(i, 14 + i), max_tokens=45) for i in range(4)]
    for _ in range(4):
        w.step()
    known = dict(w.scheduler.engine.workers)
    with monkeypatch.context() as patch:
        patch.setattr(f"pagewire.scheduler.{where}", fails)
        handles.append(w.submit(range(9, 23), max_tokens=45))
        for worker in w.workers.values():
            while worker.inbox and w.scheduler.engine.workers == known:
                worker.execute()
                w.deliver(worker)
        w.send(Tick(w.now + 0.001))
    lost = [handle for handle in handles if w.attempts[handle].ends]
    assert lost and all(w.end(h).finish is Finish.LOST and w.end(h).worker_died for h in lost)
    assert not w.shutdowns and w.scheduler.engine.workers.keys() == known.keys()
    for worker in w.workers.values():
        if w.scheduler.engine.workers[worker.incarnation] is not known[worker.incarnation]:
            # What it was sent before is void, and is executed before the step that clears its slots.
            worker.shadow.runs = {step.n: run for step, run in _since_clear(worker)}
    again = [w.submit(range(i, 14 + i), max_tokens=20) for i in range(4)]
    w.run()
    for handle in [*again, *(h for h in handles if h not in lost)]:
        assert w.output(handle) == w.expected(handle)
    w.assert_idle()


def test_a_request_that_cannot_be_taken_in_has_an_end(monkeypatch):
    w = world()
    for name in ("engine.Engine._find_twin", "placement.Queue.push"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pagewire.scheduler.{name}", fails)
            handle = w.submit([1, 2, 3], max_tokens=20)
            w.tick()
        end = w.end(handle)
        assert (end.finish, end.status) == (Finish.FAILED, 500) and "log" in end.message
        assert not w.scheduler.engine.live
    w.run()
    w.assert_idle()


@pytest.mark.parametrize("before", ["cached_blocks", "is_being_computed"])
def test_a_request_for_which_no_worker_can_be_chosen_has_an_end(before, monkeypatch):
    """Others are placed, those behind it too. The scheduler would end with it otherwise, and so
    would the one after it."""
    w = world(workers=2)
    others = [w.submit(range(i, 14 + i), max_tokens=20) for i in range(3)]
    real = getattr(KVCacheManager, before)

    def fault(self, request, *rest):
        if len(request.prompt) == 5:
            raise IndexError("list index out of range")
        return real(self, request, *rest)

    monkeypatch.setattr(KVCacheManager, before, fault)
    handle = w.submit(range(5), max_tokens=20)
    others.append(w.submit(range(40, 54), max_tokens=20))
    w.run()
    end = w.end(handle)
    assert (end.finish, end.status) == (Finish.FAILED, 500) and "log" in end.message
    for other in others:
        assert w.output(other) == w.expected(other)
    w.assert_idle()


# --- announced deaths ---


def test_an_announced_death_is_acted_upon_at_once_and_the_next_life_is_listed():
    w = world(workers=2)
    victim, other = w.workers.values()
    w.workers.pop(victim.peer.inbox)
    w.send(death(victim))
    w.tick()
    assert list(w.scheduler.engine.workers) == [other.incarnation]
    listed = {peer.name: peer for peer in w.rosters[other.peer.inbox].peers}[victim.peer.name]
    assert (listed.ready, listed.failures) == (False, 1)
    assert "was killed by SIGKILL" in listed.stage and listed.incarnation != victim.incarnation
    w.send(Hello(next_life(victim, 4242, ready=False), None))
    w.tick()
    listed = {peer.incarnation: peer for peer in w.rosters[other.peer.inbox].peers}
    assert listed[4242].failures == 1 and len(listed) == 3
    w.send(Hello(next_life(victim, 4242), victim.facts))
    w.tick()
    listed = {peer.incarnation: peer for peer in w.rosters[other.peer.inbox].peers}
    assert listed[4242].failures == 0 and 4242 in w.scheduler.engine.workers


def test_a_death_that_is_heard_of_after_the_next_life_changes_nothing():
    w = world()
    (worker,) = w.workers.values()
    w.send(Hello(next_life(worker, 4242), worker.facts))
    w.workers.clear()
    w.send(death(worker))
    w.tick()
    assert list(w.scheduler.engine.workers) == [4242]
    assert len(w.scheduler.peers.roster(1, {}).peers) == 2


def test_what_a_process_sent_before_its_end_was_announced_does_not_bring_it_back():
    """A Hello of a killed process may be read after the news of its end."""
    w = world()
    (worker,) = w.workers.values()
    inbox = worker.peer.inbox
    for failures in range(1, FAILING + 1):
        w.workers.clear()
        w.send(death(worker, failures=failures, restart_in_s=4.0))
        w.send(Hello(worker.peer, worker.facts))
        w.send(Heartbeat(inbox, worker.incarnation, 0, False))
        w.rosters.clear()
        w.tick()
        assert inbox not in w.rosters and not w.scheduler.engine.workers
        (listed,) = [p for p in w.scheduler.peers.roster(1, {}).peers if p.role is Role.WORKER]
        assert (listed.ready, listed.inbox, listed.failures) == (False, "", failures)
    assert w.scheduler.stats()["services_failing"] == 1


def test_requests_wait_for_the_only_worker_s_next_life_and_get_503_where_it_keeps_failing():
    w = world()
    w.tick(30)
    (worker,) = w.workers.values()
    w.workers.clear()
    w.send(death(worker))
    w.tick()
    waiting = w.submit([1, 2, 3])
    w.tick()
    assert not w.attempts[waiting].ends
    w.send(death(worker, failures=NOT_AWAITED, restart_in_s=4.0))
    refused = w.submit([1, 2, 3])
    w.tick()
    assert w.end(refused).status == 503
    (listed,) = [p for p in w.scheduler.peers.roster(1, {}).peers if p.role is Role.WORKER]
    assert "in 4 s after 5 failures" in listed.stage
    assert w.scheduler.stats()["services_failing"] == 1
    assert w.scheduler.stats()["service_deaths"] == 2


def test_a_life_that_never_comes_is_given_up():
    w = world()
    (worker,) = w.workers.values()
    w.workers.clear()
    w.send(death(worker, restart_in_s=5.0))
    for _ in range(60):
        for peer in w.tokenizers.values():
            w.send(Heartbeat(peer.inbox, peer.incarnation, 1, False))
        w.tick(1.5)
    assert [p.role for p in w.scheduler.peers.roster(1, {}).peers] == [Role.TOKENIZER]


# --- a new life among busy ones ---


def seconds(w, count):
    """Of work, with heartbeats."""
    for _ in range(count):
        for peer in [*w.tokenizers.values(), *(one.peer for one in w.workers.values())]:
            w.send(Heartbeat(peer.inbox, peer.incarnation, 1, False))
        w.step()
        w.tick(1.0)


def test_a_worker_that_was_given_up_clears_its_slots_when_it_is_back():
    """Which of its last steps it will take is not known: a slot that one of them retires may be in
    use for it, or free though one of them admits to it."""
    w = world()
    (worker,) = w.workers.values()
    handle = w.submit([1, 2, 3], max_tokens=40)
    w.step()
    w.cancel(handle)
    w.tick()
    for _ in range(12):
        w.tick(1.0)
    assert not w.scheduler.engine.workers
    last = max(step.n for step in [*worker.steps, *worker.inbox])
    worker.inbox.clear()
    w.send(Hello(worker.peer, worker.facts))
    w.submit([4, 5, 6], max_tokens=8)
    w.tick()
    first, *others = worker.inbox
    assert first.n == last + 1 and first.clear and not first.retire and first.admit
    assert others and not any(step.clear for step in others)


def test_a_worker_that_comes_back_takes_its_steps_however_many_were_given_up_meanwhile():
    """A worker ignores a step whose number is no higher than that of an earlier one."""
    w = world()
    (worker,) = w.workers.values()
    w.submit([1, 2, 3], max_tokens=40)
    for _ in range(10):
        w.step()
    newest = max(step.n for step in [*worker.steps, *worker.inbox])
    w.kill_worker(worker)
    for _ in range(100):
        w.kill_worker(w.add_worker())
    w.workers[worker.peer.inbox] = worker
    worker.inbox.clear()
    worker.shadow.runs.clear()
    w.send(Hello(worker.peer, worker.facts))
    handle = w.submit([4, 5, 6], max_tokens=8)
    w.tick()
    assert worker.inbox[0].n > newest and worker.inbox[0].clear
    w.run()
    assert w.output(handle) == w.expected(handle)


@pytest.mark.parametrize("caching", [True, False])
def test_requests_are_spread_again_when_a_worker_is_back(caching):
    w = world(enable_prefix_caching=caching)
    handles = [w.submit([i, 2, 3, 4, 5, 6], max_tokens=50) for i in range(8)]
    for _ in range(4):
        w.step()
    w.add_worker(num_blocks=256)
    seconds(w, 4)
    loads = sorted(state.load for state in w.scheduler.engine.workers.values())
    assert loads[0] >= 3 and sum(loads) == 8
    w.run()
    for handle in handles:
        assert w.output(handle) == w.expected(handle)
    w.assert_idle()
    assert w.scheduler.engine.counters.num_preemptions == 0


def test_nothing_is_moved_to_a_worker_that_has_enough_or_none_to_spare():
    w = world(workers=2)
    handles = [w.submit([i, 2, 3], max_tokens=40) for i in range(4)]
    w.step()
    before = [state.requests() for state in w.scheduler.engine.workers.values()]
    seconds(w, 3)
    assert [state.requests() for state in w.scheduler.engine.workers.values()] == before
    w.run()
    assert all(w.output(handle) == w.expected(handle) for handle in handles)


# --- requests at which workers die ---


def test_only_what_was_being_computed_is_suspected():
    w = world(max_num_seqs=2)
    (worker,) = w.workers.values()
    running = [w.submit([i, 2, 3], max_tokens=40) for i in range(2)]
    w.step()
    waits = w.submit([9, 2, 3], max_tokens=40)
    w.tick()
    w.kill_worker(worker, failed=True)
    w.tick()
    assert [(w.end(h).finish, w.end(h).worker_died) for h in running] == [(Finish.LOST, True)] * 2
    assert not w.attempts[waits].ends


@pytest.mark.parametrize("how", ["goodbye", "idle"])
def test_nobody_is_suspected_where_nothing_was_computed(how):
    w = world()
    (worker,) = w.workers.values()
    h = w.submit([1, 2, 3], max_tokens=40)
    w.step()
    if how == "idle":
        w.scheduler.engine.workers[worker.incarnation].in_flight.steps.clear()
    w.kill_worker(worker, failed=how == "idle")
    w.tick()
    assert w.end(h).finish is Finish.LOST and not w.end(h).worker_died


def test_a_suspect_is_computed_alone_until_its_next_token_is_there():
    """A request whose two last workers died: steps with others are waited for, its prompt is
    computed in steps of its own, and then all go on together."""
    w = world(max_num_batched_tokens=16)
    (worker,) = w.workers.values()
    others = [w.submit([i, 2, 3], max_tokens=30) for i in range(3)]
    for _ in range(3):
        w.step()
    suspect = w.submit(range(42), max_tokens=10, attempt=3, worker_deaths=2)
    w.run()
    for handle in [*others, suspect]:
        assert w.output(handle) == w.expected(handle)
    # What each step ran, and when the suspect's steps were sent.
    slots, runs = {}, []
    for step in worker.steps:
        for admission in step.admit:
            slots[admission.slot] = len(ints(admission.prompt))
        last = runs[-1] if step.repeat else [slots[slot] for slot in ints(step.run_slots)]
        runs.append(last)
    with_suspect = [run for run in runs if 42 in run]
    assert with_suspect[:3] == [[42], [42], [42]], "its 42 tokens take three steps alone"
    assert any(len(run) == 4 for run in with_suspect[3:]), "afterwards it runs with the others"
    w.assert_idle()


def test_suspects_take_turns_and_do_not_hold_each_other_up():
    w = world(workers=2)
    handles = [w.submit(range(10 + i), max_tokens=10, attempt=3, worker_deaths=2) for i in range(6)]
    w.submit([1, 2], max_tokens=10)
    w.run()
    for handle in handles:
        assert w.output(handle) == w.expected(handle)
    w.assert_idle()


def test_a_suspect_can_be_cancelled_and_scored():
    w = world()
    cancelled = w.submit(range(10), max_tokens=10, attempt=3, worker_deaths=2)
    scored = w.submit(range(12), max_tokens=0, prompt_logprobs=0, attempt=3, worker_deaths=2)
    w.tick()
    w.cancel(cancelled)
    w.run()
    assert w.end(cancelled).finish is Finish.CANCELLED and w.end(scored).finish is Finish.LENGTH
    w.assert_idle()
