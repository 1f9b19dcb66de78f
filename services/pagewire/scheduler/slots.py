"""The running requests of one worker as numpy columns, one entry a slot, so that a decode step
costs a few vector operations.

A slot here mirrors the worker's permanent slot. Token counts: `known` tokens exist (the last ones
perhaps only on the worker), `sent` of them were given to a step, `done` of those came back good,
and `held` values are in `tokens`. Knows neither blocks' states nor messages.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .request import Request

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
NEVER: Final = 2**62


def ints(column: NDArray[Any]) -> list[int]:
    """A column as plain integers, for the rows that need Python."""
    return column.tolist()


class Slots:
    def __init__(self, count: int, vocab_size: int, eos: tuple[int, ...]) -> None:
        self.count, self.vocab_size, self.eos = count, vocab_size, frozenset(eos)
        self.free = list(range(count - 1, -1, -1))
        self.requests: list[Request | None] = [None] * count
        self.known, self.sent, self.done, self.held, self.sealed = (
            np.zeros(count, np.int64) for _ in range(5)
        )
        self.prompt_len, self.final, self.capacity, self.owner = (
            np.zeros(count, np.int64) for _ in range(4)
        )
        self.born = np.full(count, NEVER, np.int64)
        """The step that admits the slot's present request; rows of earlier steps belong to a
        predecessor."""
        self.handle, self.attempt = np.zeros(count, np.uint32), np.zeros(count, np.uint32)
        self.execution = np.zeros(count, np.uint64)
        self.tokens = np.zeros((count, 1024), np.int32)
        self.watched = np.zeros(vocab_size, np.int32)
        """Above 0 for tokens that may end some running request: end-of-sequence and stop tokens."""
        self._watch(tuple(self.eos), 1)
        self.decoding = np.zeros(count, np.bool_)
        self.releases = 0
        self._decode: I32 | None = None

    @property
    def used(self) -> int:
        return self.count - len(self.free)

    def _watch(self, tokens: tuple[int, ...], change: int) -> None:
        inside = [token for token in set(tokens) if token < self.vocab_size]
        self.watched[inside] += change

    def tenant(self, slot: int) -> Request:
        """The request in `slot`, which has one."""
        request = self.requests[slot]
        assert request is not None
        return request

    def decode_rows(self) -> I32:
        """Slots whose one missing token is the next one [rows], int32. The same array object as
        long as the set is the same.

        The longest come first, and stay so, since all grow alike: a worker that began with the
        short ones would end waiting for the few multiprocessors that are busy with the long ones.
        """
        if self._decode is None:
            rows = np.flatnonzero(self.decoding).astype(np.int32)
            self._decode = rows[np.argsort(-self.known[rows], kind="stable")]
        return self._decode

    def set_decoding(self, slots: I32 | int, value: bool) -> None:
        self.decoding[slots] = value
        self._decode = None

    def occupy(self, request: Request, computed: int, capacity: int) -> int:
        """Give `request` a slot; its block table covers `capacity` tokens, of which the first
        `computed` are in the cache."""
        slot = self.free.pop()
        size = len(request.tokens)
        self._widen(request.longest)
        self.tokens[slot, :size] = request.tokens
        self.requests[slot] = request
        self.known[slot] = self.held[slot] = size
        self.sent[slot] = self.done[slot] = computed
        self.sealed[slot], self.capacity[slot] = 0, capacity
        self.prompt_len[slot], self.final[slot] = len(request.prompt), request.longest
        self.handle[slot], self.attempt[slot], self.execution[slot] = (
            request.handle,
            request.attempt,
            request.execution,
        )
        self.owner[slot] = request.owner
        self._watch(request.sampling.stop_token_ids, 1)
        return slot

    def _widen(self, tokens: int) -> None:
        """Fresh zeros are not backed by memory until written, so a wide matrix costs only what its
        rows use."""
        width = self.tokens.shape[1]
        if tokens > width:
            wider = np.zeros((self.count, max(tokens, 2 * width)), np.int32)
            wider[:, :width] = self.tokens
            self.tokens = wider

    def vacate(self, slot: int) -> None:
        """The slot's request is gone for good; results still to come for it find `born` in the
        future and are dropped."""
        request = self.tenant(slot)
        self._watch(request.sampling.stop_token_ids, -1)
        self.stop(slot)
        self.requests[slot] = None
        self.born[slot] = NEVER
        self.releases += 1
        self.free.append(slot)

    def stop(self, slot: int) -> None:
        """No step runs this slot any more."""
        if self.decoding[slot]:
            self.set_decoding(slot, False)

    def held_tokens(self, slot: int) -> I32:
        """The tokens of a slot whose values are known [held], int32, a view."""
        return self.tokens[slot, : self.held[slot]]
