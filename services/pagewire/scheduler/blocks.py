"""The KV blocks of one worker as the scheduler counts them, and the prefix cache they form.

A block is FREE, WRITABLE (held by one execution) or SEALED (full, hashed, shared by `refs`
holders). Sealed blocks without holders stay reusable, least recently used first, until their place
is needed. Knows nothing of requests, slots or steps: when a block may be sealed or given back is
the caller's decision.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pagewire_protocol.columns import BlockId

FREE: Final = 0
WRITABLE: Final = 1
SEALED: Final = 2
HASH_BYTES: Final = 16


class BlockError(AssertionError):
    """The conservation law of the blocks is broken: a bug of the scheduler, never of a request."""


def root_hash(salt: str, adapter: str = "") -> bytes:
    """Where a hash chain starts: requests share blocks only under the same salt and adapter."""
    return blake2b(
        b"%d:" % len(salt.encode()) + salt.encode() + adapter.encode(), digest_size=HASH_BYTES
    ).digest()


def extend_chain(
    chain: list[bytes], root: bytes, tokens: NDArray[np.int32], block_size: int
) -> None:
    """Append to `chain` the hashes of the full blocks of `tokens` [known, int32] that it lacks.
    Entry i covers all tokens up to the end of block i, since each hash takes its parent's in."""
    first = len(chain)
    width = 4 * block_size
    data = tokens[first * block_size :].tobytes()
    parent = chain[-1] if chain else root
    for start in range(0, len(data) - width + 1, width):
        parent = blake2b(parent + data[start : start + width], digest_size=HASH_BYTES).digest()
        chain.append(parent)


class BlockPool:
    """`total` blocks, numbered from 0, all FREE at first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._state = bytearray(total)
        self._refs = [0] * total
        self._hash: list[bytes | None] = [None] * total
        self._free = [BlockId(block) for block in range(total - 1, -1, -1)]
        self._idle: OrderedDict[BlockId, None] = OrderedDict()
        self._index: dict[bytes, BlockId] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` could give out now."""
        return len(self._free) + len(self._idle)

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Sealed blocks that nobody holds."""
        return len(self._idle)

    def is_sealed(self, block: BlockId) -> bool:
        """Whether it is full and may be shared."""
        return self._state[block] == SEALED

    def hash_of(self, block: BlockId) -> bytes | None:
        """What it was sealed under; None when it is not sealed."""
        return self._hash[block]

    def take(self, count: int) -> list[BlockId]:
        """`count` WRITABLE blocks, the free ones first, then the least recently used of the cache.
        Raises BlockError when there are fewer: callers look at `available` before."""
        if count > self.available:
            raise BlockError(f"{count} blocks wanted, {self.available} of {self.total} available")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._state[block] = WRITABLE
        return blocks

    def _evict(self) -> BlockId:
        block, _ = self._idle.popitem(last=False)
        self._unindex(block)
        self._hash[block] = None
        return block

    def _unindex(self, block: BlockId) -> None:
        key = self._hash[block]
        if key is not None and self._index.get(key) == block:
            del self._index[key]

    def match(self, chain: Sequence[bytes], limit: int) -> list[BlockId]:
        """The cached blocks of the longest prefix of `chain`, at most `limit`. They are not held
        yet."""
        found: list[BlockId] = []
        for key in chain[:limit]:
            block = self._index.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[BlockId]) -> int:
        """How many of these sealed blocks nobody holds: holding them lowers `available` by as
        many."""
        return sum(1 for block in blocks if self._refs[block] == 0)

    def hold(self, blocks: Iterable[BlockId]) -> None:
        """One more holder for each of these sealed blocks."""
        for block in blocks:
            if self._state[block] != SEALED:
                raise BlockError(f"block {block} is held but not sealed")
            self._refs[block] += 1
            self._idle.pop(block, None)

    def seal(self, block: BlockId, key: bytes) -> None:
        """A WRITABLE block is full and its content final. Of two blocks with the same content the
        first stays the shared one."""
        if self._state[block] != WRITABLE:
            raise BlockError(f"block {block} is sealed in state {self._state[block]}, not writable")
        self._state[block] = SEALED
        self._refs[block] = 1
        self._hash[block] = key
        self._index.setdefault(key, block)

    def disown(self, blocks: Iterable[BlockId]) -> None:
        """Nobody new may share these blocks: their content is suspect."""
        for block in blocks:
            if self._state[block] == SEALED:
                self._unindex(block)

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Their holder is done with them. The end of a chain is released first, so that it is
        evicted before its beginning."""
        for block in reversed(blocks):
            state = self._state[block]
            if state == WRITABLE:
                self._to_free(block)
            elif state == SEALED and self._refs[block] > 0:
                self._release_sealed(block)
            else:
                raise BlockError(
                    f"block {block} is released twice (state {state}, {self._refs[block]} holders)"
                )

    def _release_sealed(self, block: BlockId) -> None:
        self._refs[block] -= 1
        if self._refs[block] == 0:
            key = self._hash[block]
            if key is not None and self._index.get(key) == block:
                self._idle[block] = None
            else:
                self._to_free(block)

    def _to_free(self, block: BlockId) -> None:
        self._state[block] = FREE
        self._hash[block] = None
        self._free.append(block)

    def freeable(self, blocks: Iterable[BlockId]) -> int:
        """How many of a holder's blocks become available when it releases them."""
        return sum(1 for block in blocks if self._refs[block] <= 1)

    def check(self) -> None:
        """The law: free + writable + sealed = total, and the lists agree with the states. Raises
        BlockError."""
        free, writable, sealed = (self._state.count(state) for state in (FREE, WRITABLE, SEALED))
        if (
            free + writable + sealed != self.total
            or free != len(self._free)
            or len(self._idle) > sealed
            or len(self._index) > sealed
        ):
            raise BlockError(
                f"of {self.total} blocks {free} are free ({len(self._free)} listed), {writable} writable, {sealed} sealed "
                f"({len(self._idle)} idle, {len(self._index)} indexed)"
            )
