"""The scheduler under random clients, workers and deaths; and the proof that this harness sees the
bugs it is there for."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from msgspec.structs import replace
from pagewire.scheduler import prefix_groups, results
from pagewire.scheduler.blocks import BlockPool
from pagewire.scheduler.in_flight import InFlightSteps
from pagewire.scheduler.kv_cache import DeferredRelease, KVCacheManager
from pagewire.scheduler.worker_state import WorkerState
from scheduler.scheduler_machine import ParkingMachine, PipelineMachine, SchedulerMachine

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """The machine's prompts are short and its requests few."""
    monkeypatch.setattr(prefix_groups, "LEAST_ROWS", 2)
    monkeypatch.setattr(prefix_groups, "LEAST_TOKENS", 4)


def run_machine(
    examples, steps, phases=(Phase.generate, Phase.shrink), seed=True, machine=SchedulerMachine
):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=seed,
            database=None,
            suppress_health_check=QUIET,
            phases=phases,
            print_blob=False,
        ),
    )


def test_clients_that_read_nothing_for_a_while():
    run_machine(150, 50, machine=ParkingMachine)


def test_random_lives():
    run_machine(400, 60)


def test_random_lives_of_pipelines():
    run_machine(25, 60, machine=PipelineMachine)


def seal_before_the_result(patch):
    """Blocks are sealed when the step is sent, not when it returns."""
    original = WorkerState.place

    def place(self, request, cached):
        saved = original(self, request, cached)
        cache = self.kv_cache
        full = len(request.prompt) // cache.block_size
        if cache.prefix_caching:
            cache.seal(request, len(cached), full)
            self.slots.num_sealed[request.slot] = max(full, len(cached))
        return saved

    patch.setattr(WorkerState, "place", place)


def free_before_the_step_returns(patch):
    patch.setattr(InFlightSteps, "last_step_of", lambda self, slot: 0)


def double_free(patch):
    original = BlockPool._to_free

    def twice(self, block):
        original(self, block)
        if block == 5:
            self._free.append(block)

    patch.setattr(BlockPool, "_to_free", twice)


def release_twice(patch):
    original = KVCacheManager.release_after

    def release_after(self, n, blocks, preempted=None):
        original(self, n, blocks, preempted)
        if preempted is None and len(blocks) > 3:
            self.deferred.append(DeferredRelease(n + 1, blocks[-1:], None))

    patch.setattr(KVCacheManager, "release_after", release_after)


def rows_by_slot_alone(patch):
    """Stale rows are taken for the slot's present request."""
    original = WorkerState.place

    def place(self, request, cached):
        saved = original(self, request, cached)
        self.slots.admitted_step[request.slot] = 0
        return saved

    def stop_running(self, request):
        self.decode_set.discard_slot(request.slot)
        if request in self.prefill:
            self.prefill.remove(request)
        if request in self.to_admit:
            self.to_admit.remove(request)
        else:
            self.to_retire.append(request.slot)

    patch.setattr(WorkerState, "place", place)
    patch.setattr(WorkerState, "_stop_running", stop_running)


def parents_are_forgotten(patch):
    """A block's hash covers its own tokens only."""
    from pagewire.scheduler import request as module

    original = module.extend_chain

    def extend(chain, root, tokens, size):
        while len(chain) < len(tokens) // size:
            one = []
            original(one, b"", tokens[len(chain) * size : (len(chain) + 1) * size], size)
            chain.extend(one)

    patch.setattr(module, "extend_chain", extend)


def tokens_after_a_preemption_are_lost(patch):
    """What the steps in flight sampled for a preempted request is counted by nobody."""
    original = WorkerState.preempt

    def preempt(self, request):
        original(self, request)
        if request.slot >= 0:
            self.slots.num_received[request.slot] -= 1

    patch.setattr(WorkerState, "preempt", preempt)


def all_of_a_cached_prompt_is_skipped(patch):
    patch.setattr(
        KVCacheManager,
        "cached_blocks",
        lambda self, r: self.pool.match(r.extend_chain(self.block_size, r.tokens), len(r.tokens)),
    )


def scored_prompts_read_the_cache(patch):
    original = KVCacheManager.cached_blocks

    def cached(self, request):
        asked, request.sampling = request.sampling, replace(request.sampling, prompt_logprobs=-1)
        try:
            return original(self, request)
        finally:
            request.sampling = asked

    patch.setattr(KVCacheManager, "cached_blocks", cached)


def lengths_stay_too_long(patch):
    """A row that brings fewer tokens than it might have is counted as if it had brought all."""
    patch.setattr(WorkerState, "correct_lengths", lambda self, slots: None)


def computed_tokens_are_sealed_before_a_row_is_known_to_move(patch):
    """The last token of a row that brings none counts as computed, so its block is shared while the
    next step writes it again."""
    original = results._count_computed

    def count_computed(worker, step):
        run = original(worker, step)
        results._seal_full(worker, run)
        return run

    patch.setattr(results, "_count_computed", count_computed)


BUGS = [
    seal_before_the_result,
    free_before_the_step_returns,
    double_free,
    release_twice,
    rows_by_slot_alone,
    parents_are_forgotten,
    tokens_after_a_preemption_are_lost,
    all_of_a_cached_prompt_is_skipped,
]


@pytest.mark.parametrize(
    "bug",
    [
        seal_before_the_result,
        free_before_the_step_returns,
        double_free,
        release_twice,
        rows_by_slot_alone,
        parents_are_forgotten,
        scored_prompts_read_the_cache,
        lengths_stay_too_long,
        computed_tokens_are_sealed_before_a_row_is_known_to_move,
    ],
)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises((AssertionError, ExceptionGroup, LookupError, ValueError)):
        run_machine(400, 60, phases=(Phase.generate,))
