"""One worker as the scheduler sees it: what it can hold, which requests it runs, and the steps it
has been sent.

Knows how a request enters and leaves its slot. Which request does is decided in `placement.py`,
what a step holds in `batch.py`, what a result means in `results.py`.
"""

import logging
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import numpy as np
from pagewire_protocol.columns import BlockId, Incarnation, Slot
from pagewire_protocol.messages import WorkerFacts
from pagewire_protocol.stats import (
    ITERATION_TOKENS_BOUNDS,
    REQUEST_PREEMPTIONS_BOUNDS,
    flattened,
)

from pagewire.config import SchedulerConfig
from pagewire.requests.counters import Histogram

from .decode_set import DecodeSet
from .in_flight import InFlightSteps
from .kv_cache import KVCacheManager
from .prefix_groups import PrefixFinder
from .request import NO_SLOT, Phase, Request
from .slots import I32, NEVER, Slots, slots_of
from .step_estimator import StepEstimator

log = logging.getLogger("pagewire.scheduler")


@dataclass(slots=True)
class Counters:
    """What the scheduler has done since it started, over all workers, by the names shown in
    /metrics."""

    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    starved_steps: int = 0
    iteration_tokens: Histogram = field(default_factory=lambda: Histogram(ITERATION_TOKENS_BOUNDS))
    """Tokens of each step."""
    request_preemptions: Histogram = field(
        default_factory=lambda: Histogram(REQUEST_PREEMPTIONS_BOUNDS)
    )
    """How often each request was preempted, of those that ended."""

    def stats(self) -> Iterator[tuple[str, float]]:
        """All of it as plain numbers, by the names of pagewire_protocol.stats."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Histogram):
                yield from flattened(entry.name, value.counts, value.sum)
            else:
                yield entry.name, float(value)


class WorkerState:
    """The worker `incarnation` at `inbox`, which is as `facts` says."""

    def __init__(
        self,
        incarnation: Incarnation,
        inbox: str,
        facts: WorkerFacts,
        config: SchedulerConfig,
        counters: Counters,
    ) -> None:
        self.incarnation = incarnation
        self.inbox = inbox
        self.facts = facts
        self.counters = counters
        self.accepting = True
        """Whether it takes new requests."""
        num_slots = min(config.num_seqs(), facts.max_num_seqs)
        self.slots = Slots(num_slots, facts.vocab_size, facts.eos_token_ids)
        self.kv_cache = KVCacheManager(facts, config.enable_prefix_caching)
        self.in_flight = InFlightSteps()
        cascade = config.enable_prefix_caching and config.enable_cascade and facts.cascade
        self._prefixes = PrefixFinder(num_slots, facts.block_size) if cascade else None
        self.decode_set = DecodeSet(self.slots, facts.max_tokens_per_row, self._prefixes)
        self.estimator = StepEstimator(
            facts.cost, config, facts.max_num_batched_tokens, facts.pipeline_parallel_size
        )
        self.prefill: list[Request] = []
        """Requests of which no step has been given all known tokens yet, in order of arrival."""
        self.to_admit: list[Request] = []
        """Requests whose Admission goes out with the next step."""
        self.to_retire: list[Slot] = []
        """Slots that the next step retires."""
        self.must_clear = True
        """The next step has the worker forget what it holds. The first one has: the worker may have
        been given up before, and which of its earlier steps it has taken is not known."""
        self.requeued: list[Request] = []
        """Preempted requests that wait again, to be fetched by the engine."""
        self.suspects: list[Request] = []
        """Requests in slots that may be what ends workers: the first one's next token is computed
        before anything else is, and alone."""
        self._pending_prefill: int | None = 0

    @property
    def load(self) -> int:
        """Requests that it runs."""
        return self.slots.used

    def requests(self) -> list[Request]:
        """The requests in its slots."""
        return [request for request in self.slots.requests if request is not None]

    def computing(self) -> set[Slot]:
        """The slots that the steps in flight run, or admit a request to."""
        steps = self.in_flight.steps
        if not steps:
            return set()
        slots = {slot for step in steps for slot in slots_of(step.run)}
        admitted = self.slots.admitted_step
        entering = np.flatnonzero((admitted >= steps[0].n) & (admitted < NEVER))
        return slots | set(slots_of(entering.astype(np.int32)))

    def clear_suspects(self) -> None:
        """Those whose next token has come are like all others."""
        for request in self.suspects:
            if self.slots.num_received[request.slot] > len(request.tokens):
                request.worker_deaths = 0
                self.suspects = [other for other in self.suspects if other is not request]

    def movable(self) -> list[Request]:
        """The requests that decode, the youngest first."""
        prefilled = [
            request
            for request in self.requests()
            if request.phase is Phase.RUNNING
            and not request.wants_prompt_logprobs
            and request not in self.prefill
            and self.slots.admitted_step[request.slot] < NEVER
        ]
        return sorted(prefilled, key=lambda request: request.order, reverse=True)

    @property
    def is_putting_back(self) -> bool:
        """It has requests that wait for steps in flight, to leave their slots."""
        return any(request.phase is Phase.DRAINING for request in self.requests())

    def holds(self, request: Request) -> bool:
        """Whether it could run `request` to its end, were it alone."""
        return request.max_len <= min(self.kv_cache.max_tokens, self.facts.max_model_len)

    def pending_prefill_tokens(self) -> int:
        """Tokens of running requests that no step has been given yet, but for the next one of each
        decoding request."""
        if self._pending_prefill is None:
            slots = self.slots
            self._pending_prefill = sum(
                int(slots.num_tokens[r.slot] - slots.num_scheduled[r.slot]) for r in self.prefill
            )
        return self._pending_prefill

    def prefill_changed(self) -> None:
        """Requests in `prefill` were given to a step, or left it."""
        self._pending_prefill = None

    # --- entering a slot ---

    def has_room(self, request: Request, cached: list[BlockId]) -> bool:
        """A free slot, and blocks for `request` beside the `cached` ones."""
        return bool(self.slots.free) and self.kv_cache.has_room(request, cached, self.load)

    def place(self, request: Request, cached: list[BlockId]) -> int:
        """Take slot and blocks for `request`, whose Admission goes out with the next step. Returns
        the tokens that the cache saves."""
        block_size = self.kv_cache.block_size
        computed = len(cached) * block_size
        self.kv_cache.allocate(request, cached)
        slot = self.slots.occupy(request, computed, len(request.blocks) * block_size)
        self.slots.num_sealed[slot] = len(cached)
        if self._prefixes is not None:
            self._prefixes.placed(slot, request.blocks)
        request.slot = slot
        request.phase = Phase.RUNNING
        request.worker = self.incarnation
        self.to_admit.append(request)
        if request.is_suspect:
            self.suspects.append(request)
        self._pending_prefill = self.pending_prefill_tokens() + len(request.tokens) - computed
        insort(self.prefill, request, key=lambda r: r.order)
        if self.kv_cache.prefix_caching and not request.wants_prompt_logprobs:
            self.counters.prefix_cache_queries += len(request.tokens)
            self.counters.prefix_cache_hits += computed
        return computed

    # --- leaving it ---

    def release(self, request: Request) -> None:
        """The request is over. Its slot is free for the next step; its blocks once no step in
        flight can write them."""
        if request.phase is Phase.DRAINING:
            self.kv_cache.forget_preempted(request)
        else:
            self._stop_running(request)
            last_step = self.in_flight.last_step_of(request.slot)
            self.kv_cache.release_after(last_step, request.blocks)
        self._leave_slot(request)
        self.release_due()

    def preempt(self, request: Request) -> None:
        """Take slot and blocks from `request`, since others need them."""
        self.counters.num_preemptions += 1
        request.num_preemptions += 1
        log.debug("execution %x is preempted: blocks ran out", request.execution)
        self._put_back(request)

    def park(self, request: Request) -> None:
        """Take slot and blocks from `request`, whose client reads nothing."""
        self._put_back(request)

    def send_away(self, request: Request) -> None:
        """Take slot and blocks from `request`, which another worker has more room for."""
        request.leaves = self.incarnation
        log.debug("execution %x leaves worker %x", request.execution, self.incarnation)
        self._put_back(request)

    def _put_back(self, request: Request) -> None:
        """It waits again, with all its tokens, once the steps in flight have returned theirs."""
        self._stop_running(request)
        request.phase = Phase.DRAINING
        last_step = self.in_flight.last_step_of(request.slot)
        self.kv_cache.release_after(last_step, request.blocks, request)
        self.release_due()

    def release_due(self) -> None:
        """Give back what waited for the steps that have returned by now."""
        for request in self.kv_cache.release_due(self.in_flight.num_returned):
            request.set_tokens(self.slots.received_tokens(request.slot).copy())
            self._leave_slot(request)
            request.phase = Phase.WAITING
            self.requeued.append(request)

    def _stop_running(self, request: Request) -> None:
        """No further step names the request but the one that retires its slot."""
        slot = request.slot
        if request in self.suspects:
            self.suspects.remove(request)
        self.decode_set.discard_slot(slot)
        self.kv_cache.stop_computing(request, int(self.slots.num_sealed[slot]))
        if request in self.prefill:
            self.prefill.remove(request)
            self.prefill_changed()
        if self.slots.admitted_step[slot] == NEVER:
            self.to_admit.remove(request)
        else:
            self.to_retire.append(slot)

    def _leave_slot(self, request: Request) -> None:
        self.slots.vacate(request.slot)
        request.slot = NO_SLOT
        request.worker = None
        request.blocks = []

    # --- lengths that were assumed too long ---

    def correct_lengths(self, rows: I32) -> None:
        """A step brought the slots `rows` fewer tokens than their rows might have: bound their
        lengths anew, by what is there and what the steps in flight may still bring. A slot that was
        thought to have reached its end decodes again."""
        slots = self.slots
        there = np.array([slots.requests[slot] is not None for slot in slots_of(rows)], np.bool_)
        rows = rows[there]
        longest = slots.num_received[rows]
        for step in self.in_flight.steps:
            samples = np.isin(rows, step.sampled) & (step.n >= slots.admitted_step[rows])
            longest = longest + samples * self.facts.max_tokens_per_row
        longest = np.minimum(longest, slots.max_len[rows])
        self.decode_set.shorten(rows, slots.num_tokens[rows] - longest)
        slots.num_tokens[rows] = longest
        slots.num_scheduled[rows] = longest - 1
        again = [
            slot
            for slot in slots_of(rows[longest < slots.max_len[rows]])
            if slots.request_in(slot).phase is Phase.RUNNING
        ]
        self.decode_set.add_missing(np.array(again, np.int32))
