"""One worker as the scheduler sees it: its blocks, its slots, the steps in flight, and what must
wait for their return.

Knows how a request takes and leaves its place; the choice of requests is made in `placement.py`,
the content of a step in `batch.py`.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from pagewire_protocol.messages import Shared, WorkerFacts

from pagewire.config import SchedulerConfig

from .blocks import BlockPool
from .prefix_groups import Prefixes
from .request import Phase, Request
from .slots import I32, NEVER, Slots
from .step_estimator import Pace

WORTH_WAITING: Final = 16
"""Blocks in common with a prefill under way for which a request waits, rather than compute them
beside it."""
NO_ROWS: Final = np.zeros(0, np.int32)


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


@dataclass(slots=True, eq=False)
class Flight:
    """A step whose result is not there yet: `counts[i]` tokens of slot `run[i]` (one each when
    None); `sampled` slots return a token."""

    n: int
    run: I32
    counts: I32 | None
    sampled: I32
    sampled_bytes: bytes
    releases: int


@dataclass(slots=True, eq=False)
class Pending:
    """Blocks to give back once step `n` has returned, and the preempted request, if any, that then
    waits again."""

    n: int
    blocks: list[int]
    request: Request | None


class WorkerState:
    def __init__(
        self, inbox: str, facts: WorkerFacts, config: SchedulerConfig, counters: Counters
    ) -> None:
        self.inbox, self.facts, self.counters = inbox, facts, counters
        self.caching = config.enable_prefix_caching
        self.block_size = facts.block_size
        self.pool = BlockPool(facts.num_blocks)
        self.slots = Slots(
            min(config.num_seqs(), facts.max_num_seqs), facts.vocab_size, facts.eos_token_ids
        )
        cascade = self.caching and config.enable_cascade and facts.cascade
        self.prefixes = Prefixes(self.slots.count, self.block_size) if cascade else None
        self.pace = Pace(facts.cost, config, facts.max_num_batched_tokens)
        self.accepting = True
        self.sent = self.returned = 0
        self.flights: deque[Flight] = deque()
        self.pending: list[Pending] = []
        self.prefill: list[Request] = []
        self.unsent: int | None = 0
        """The backlog; None where it is to be counted anew."""
        self.admit: list[Request] = []
        self.retire: list[int] = []
        self.requeued: list[Request] = []
        self.computing: set[bytes] = set()
        """Hashes of blocks that placed requests will seal."""
        self.last_run: I32 = NO_ROWS
        self.grouped: I32 = NO_ROWS
        self.groups: Shared | None = None
        self.groups_save = 0
        """The rows of the newest step; the same array as long as the same ones run, for which then
        hold"""
        self.last_bytes = b""
        self.last_reads = 0
        """the tokens that they attend to together, and"""
        self.last_room = 0
        """the tokens that the one nearest to its end may still grow."""

    @property
    def capacity(self) -> int:
        """The longest request it could ever hold alone, in tokens."""
        return self.facts.num_blocks * self.block_size

    @property
    def load(self) -> int:
        return self.slots.used

    def requests(self) -> list[Request]:
        return [request for request in self.slots.requests if request is not None]

    def backlog(self) -> int:
        """Known tokens that no step has been given yet, but for the next one of each decoding
        request."""
        if self.unsent is None:
            self.unsent = sum(
                int(self.slots.known[r.slot] - self.slots.sent[r.slot]) for r in self.prefill
            )
        return self.unsent

    # --- taking a place
    #   -----------------------------------------------------------------------------------------------

    def cached_blocks(self, request: Request) -> list[int]:
        """Blocks that hold the beginning of `request`. Its last token is always computed again,
        since its logits are wanted."""
        if not self.caching or request.scores_prompt:
            return []
        return self.pool.match(
            request.chained(self.block_size, request.tokens),
            (len(request.tokens) - 1) // self.block_size,
        )

    def is_computing(self, request: Request, cached: list[int]) -> bool:
        """Whether the blocks that follow `cached` in `request` are on their way for another
        request, and enough of them to wait for."""
        if request.scores_prompt:
            return False
        chain, first = request.chain, len(cached)
        last = first + WORTH_WAITING - 1
        return (
            last < len(chain) and chain[first] in self.computing and chain[last] in self.computing
        )

    def has_room(self, request: Request, cached: list[int]) -> bool:
        """A free slot, and blocks for all its tokens with some left for others to grow, so that it
        does not cause a preemption at once."""
        if not self.slots.free:
            return False
        needed = self._blocks_for(len(request.tokens)) - len(cached) + self.pool.idle(cached)
        return needed + self.slots.used <= self.pool.available

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def place(self, request: Request, cached: list[int]) -> int:
        """Take slot and blocks for `request`, whose Admission goes out with the next step. Returns
        the tokens the cache saves."""
        if self.caching:
            self.computing.update(request.chained(self.block_size, request.tokens)[len(cached) :])
        self.pool.hold(cached)
        request.blocks = cached + self.pool.take(
            self._blocks_for(len(request.tokens)) - len(cached)
        )
        computed = len(cached) * self.block_size
        request.slot = self.slots.occupy(request, computed, len(request.blocks) * self.block_size)
        self.slots.sealed[request.slot] = len(cached)
        if self.prefixes is not None:
            self.prefixes.placed(request.slot, request.blocks)
        request.phase, request.replica = Phase.RUNNING, self
        self.admit.append(request)
        self.unsent = self.backlog() + len(request.tokens) - computed
        insort(self.prefill, request, key=lambda r: r.order)
        if self.caching and not request.scores_prompt:
            self.counters.prefix_cache_queries += len(request.tokens)
            self.counters.prefix_cache_hits += computed
        return computed

    # --- leaving it
    #   ---------------------------------------------------------------------------------------------------

    def release(self, request: Request) -> None:
        """The request is over. Its slot is free for the next step; its blocks once no step in
        flight can write them."""
        if request.phase is Phase.DRAINING:
            entry = next(p for p in self.pending if p.request is request)
            entry.request = None
        else:
            self._withdraw(request)
            self._give_back(request.blocks, self._last_step(request.slot), None)
        self.slots.vacate(request.slot)
        request.slot, request.replica, request.blocks = -1, None, []

    def preempt(self, request: Request) -> None:
        """Take the request's place away; it waits again, with all its tokens, once the steps in
        flight have returned theirs."""
        self.counters.num_preemptions += 1
        self._withdraw(request)
        self.slots.stop(request.slot)
        request.phase = Phase.DRAINING
        self._give_back(request.blocks, self._last_step(request.slot), request)

    def _withdraw(self, request: Request) -> None:
        """No further step names the request but the one that retires its slot."""
        self.computing.difference_update(request.chain[int(self.slots.sealed[request.slot]) :])
        if request in self.prefill:
            self.prefill.remove(request)
            self.unsent = None
        if self.slots.born[request.slot] == NEVER:
            self.admit.remove(request)
        else:
            self.retire.append(request.slot)

    def _last_step(self, slot: int) -> int:
        """The newest step in flight that runs `slot`; 0 when none does."""
        return next((f.n for f in reversed(self.flights) if bool((f.run == slot).any())), 0)

    def _give_back(self, blocks: list[int], n: int, request: Request | None) -> None:
        self.pending.append(Pending(n, blocks, request))
        self.settle()

    def settle(self) -> None:
        """Give back the blocks whose last step has returned."""
        due = [entry for entry in self.pending if entry.n <= self.returned]
        if not due:
            return
        self.pending = [entry for entry in self.pending if entry.n > self.returned]
        for entry in due:
            self.pool.release(entry.blocks)
            if entry.request is not None:
                self._requeue(entry.request)

    def _requeue(self, request: Request) -> None:
        request.know(self.slots.held_tokens(request.slot).copy())
        self.slots.vacate(request.slot)
        request.slot, request.replica, request.blocks, request.phase = -1, None, [], Phase.WAITING
        self.requeued.append(request)

    def returning(self) -> int:
        """Blocks that become available when the steps in flight have returned."""
        return sum(self.pool.freeable(entry.blocks) for entry in self.pending)
