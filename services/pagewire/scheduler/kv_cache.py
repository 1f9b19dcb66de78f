"""The KV cache of one worker: which blocks a request gets, which of them are shared by prefix, and
when they are given back.

Blocks that a step in flight may still write are not given back before its result is there. Knows
requests' tokens and block tables, and steps by number; knows neither slots nor messages.
"""

from dataclasses import dataclass
from typing import Final

from pagewire_protocol.columns import BlockId
from pagewire_protocol.messages import WorkerFacts

from .blocks import BlockPool
from .request import Request

WORTH_WAITING: Final = 16
"""Blocks in common with a prefill under way for which a request waits, rather than compute them
beside it."""


@dataclass(slots=True, eq=False)
class DeferredRelease:
    """Blocks to give back once step `n` has returned, and the preempted request, if any, that then
    waits again."""

    n: int
    blocks: list[BlockId]
    request: Request | None


class KVCacheManager:
    """The cache of a worker with these `facts`. Without `prefix_caching` no block is ever
    shared."""

    def __init__(self, facts: WorkerFacts, prefix_caching: bool) -> None:
        self.block_size = facts.block_size
        self.max_tokens = facts.num_blocks * facts.block_size
        """The longest request that it could ever hold alone."""
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(facts.num_blocks)
        self.deferred: list[DeferredRelease] = []
        self.computing: set[bytes] = set()
        """Hashes of blocks that running requests are about to seal."""

    # --- a request takes its blocks ---

    def cached_blocks(self, request: Request) -> list[BlockId]:
        """Blocks that hold the beginning of `request`. Its last token is always computed again,
        since its logits are wanted."""
        if not self.prefix_caching or request.wants_prompt_logprobs:
            return []
        chain = request.extend_chain(self.block_size, request.tokens)
        return self.pool.match(chain, (len(request.tokens) - 1) // self.block_size)

    def is_being_computed(self, request: Request, cached: list[BlockId]) -> bool:
        """Whether the blocks that follow `cached` in `request` are being computed for another
        request, and enough of them to wait for."""
        if request.wants_prompt_logprobs:
            return False
        chain = request.chain
        first = len(cached)
        last = first + WORTH_WAITING - 1
        if last >= len(chain):
            return False
        return chain[first] in self.computing and chain[last] in self.computing

    def has_room(self, request: Request, cached: list[BlockId], running: int) -> bool:
        """Whether there are blocks for all tokens of `request` and one more for each of the
        `running` requests, so that it does not cause a preemption at once."""
        # Cached blocks without a holder count as available until this request holds them.
        needed = self._blocks_for(request) - len(cached) + self.pool.idle(cached)
        return needed + running <= self.pool.available

    def allocate(self, request: Request, cached: list[BlockId]) -> None:
        """Give `request` the blocks `cached` and fresh ones for the rest of its tokens."""
        if self.prefix_caching:
            chain = request.extend_chain(self.block_size, request.tokens)
            self.computing.update(chain[len(cached) :])
        self.pool.hold(cached)
        request.blocks = cached + self.pool.take(self._blocks_for(request) - len(cached))

    def _blocks_for(self, request: Request) -> int:
        return -(-len(request.tokens) // self.block_size)

    # --- its blocks fill ---

    def seal(self, request: Request, first: int, last: int) -> None:
        """The blocks `first` to `last` - 1 of `request` are full, and the steps that filled them
        have come back good: others may share them. Its chain reaches so far."""
        chain = request.chain
        for i in range(first, last):
            self.pool.seal(request.blocks[i], chain[i])
            self.computing.discard(chain[i])

    def disown(self, request: Request) -> None:
        """What `request` computed is suspect: nobody new may share its blocks."""
        self.pool.disown(request.blocks)

    # --- it gives them back ---

    def stop_computing(self, request: Request, num_sealed: int) -> None:
        """`request` computes no further; `num_sealed` of its blocks are sealed. Nobody must wait
        for the others."""
        self.computing.difference_update(request.chain[num_sealed:])

    def release_after(
        self, n: int, blocks: list[BlockId], preempted: Request | None = None
    ) -> None:
        """Give `blocks` back at the next `release_due` for step `n` or a later one."""
        self.deferred.append(DeferredRelease(n, blocks, preempted))

    def release_due(self, returned: int) -> list[Request]:
        """Give back the blocks whose last step is among those up to `returned`. Returns the
        preempted requests that held them."""
        due = [entry for entry in self.deferred if entry.n <= returned]
        if not due:
            return []
        self.deferred = [entry for entry in self.deferred if entry.n > returned]
        for entry in due:
            self.pool.release(entry.blocks)
        return [entry.request for entry in due if entry.request is not None]

    def forget_preempted(self, request: Request) -> None:
        """A preempted request has ended before its blocks were given back."""
        entry = next(entry for entry in self.deferred if entry.request is request)
        entry.request = None

    def returning(self) -> int:
        """Blocks that become available when the steps in flight have returned."""
        return sum(self.pool.freeable(entry.blocks) for entry in self.deferred)
