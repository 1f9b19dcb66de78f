"""The running requests of one worker as numpy columns, one entry a slot, so that a decode step
costs a few vector operations.

A slot here mirrors the worker's slot of the same number. Steps are formed before the results of
earlier ones have arrived, so some counts run ahead of others:

    num_computed <= num_received <= num_tokens <= max_len      num_scheduled <= num_tokens

    num_tokens     tokens that exist, those included that steps in flight will sample: at most so
                   many, since a row may bring fewer than it could
    num_scheduled  tokens given to a step: at most so many, for the same reason
    num_received   tokens whose values are in `tokens`
    num_computed   tokens whose keys and values are in the cache for certain: their step's result
                   has come back good
    max_len        prompt and `max_tokens` together

Knows neither the states of blocks nor messages.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pagewire_protocol.columns import Slot

from .request import Request

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
Bools = NDArray[np.bool_]
NEVER: Final = 2**62
NO_ROWS: Final = np.zeros(0, np.int32)


def ints(column: NDArray[Any]) -> list[int]:
    """A column as plain integers, for the rows that need Python."""
    return column.tolist()


def slots_of(column: I32) -> list[Slot]:
    """A column of slots as plain numbers."""
    return column.tolist()


class Slots:
    """`count` slots of a worker whose model has `vocab_size` tokens and ends at the tokens `eos`.
    All counts are int64 columns [count]."""

    def __init__(self, count: int, vocab_size: int, eos: tuple[int, ...]) -> None:
        self.count = count
        self.vocab_size = vocab_size
        self.eos = frozenset(eos)
        self.free = [Slot(slot) for slot in range(count - 1, -1, -1)]
        self.requests: list[Request | None] = [None] * count
        self.num_tokens = np.zeros(count, np.int64)
        self.num_scheduled = np.zeros(count, np.int64)
        self.num_computed = np.zeros(count, np.int64)
        self.num_received = np.zeros(count, np.int64)
        self.num_sealed = np.zeros(count, np.int64)
        """Blocks of the slot that are full and in the prefix cache."""
        self.num_allocated = np.zeros(count, np.int64)
        """Tokens that the slot's block table has room for."""
        self.prompt_len = np.zeros(count, np.int64)
        self.max_len = np.zeros(count, np.int64)
        self.reply_route = np.zeros(count, np.int64)
        self.admitted_step = np.full(count, NEVER, np.int64)
        """The step that admits the slot's present request; rows of earlier steps belong to a
        predecessor. NEVER before that step is formed, and while the slot is free."""
        self.handle = np.zeros(count, np.uint32)
        self.attempt = np.zeros(count, np.uint32)
        self.execution = np.zeros(count, np.uint64)
        self.tokens = np.zeros((count, 1024), np.int32)
        """Prompt and output [count, longest]; the first `num_received` of a row are valid."""
        self.stop_token_uses = np.zeros(vocab_size, np.int32)
        """For each token id, how many running requests it may end, and one more for an
        end-of-sequence token: above 0 for the tokens that must be looked at."""
        self._count_stop_tokens(tuple(self.eos), 1)
        self.num_vacated = 0
        """How many requests have left their slots. While it stands still no row is stale."""

    @property
    def used(self) -> int:
        """Slots that hold a request."""
        return self.count - len(self.free)

    def request_in(self, slot: Slot) -> Request:
        """The request in `slot`, which has one."""
        request = self.requests[slot]
        assert request is not None
        return request

    def occupy(self, request: Request, computed: int, allocated: int) -> Slot:
        """Give `request` a slot and return its number. Its block table covers `allocated` tokens,
        of which the first `computed` are in the cache already."""
        slot = self.free.pop()
        size = len(request.tokens)
        self._widen(request.max_len)
        self.tokens[slot, :size] = request.tokens
        self.requests[slot] = request
        self.num_tokens[slot] = size
        self.num_received[slot] = size
        self.num_scheduled[slot] = computed
        self.num_computed[slot] = computed
        self.num_sealed[slot] = 0
        self.num_allocated[slot] = allocated
        self.prompt_len[slot] = len(request.prompt)
        self.max_len[slot] = request.max_len
        self.handle[slot] = request.handle
        self.attempt[slot] = request.attempt
        self.execution[slot] = request.execution
        self.reply_route[slot] = request.reply_route
        self._count_stop_tokens(request.sampling.stop_token_ids, 1)
        return slot

    def vacate(self, slot: Slot) -> None:
        """The slot's request is gone for good. Results still to come for it find its
        `admitted_step` in the future and are dropped."""
        request = self.request_in(slot)
        self._count_stop_tokens(request.sampling.stop_token_ids, -1)
        self.requests[slot] = None
        self.admitted_step[slot] = NEVER
        self.num_vacated += 1
        self.free.append(slot)

    def received_tokens(self, slot: Slot) -> I32:
        """The tokens of a slot whose values are known [num_received], a view."""
        return self.tokens[slot, : self.num_received[slot]]

    def _count_stop_tokens(self, tokens: tuple[int, ...], change: int) -> None:
        inside = [token for token in set(tokens) if token < self.vocab_size]
        self.stop_token_uses[inside] += change

    def _widen(self, tokens: int) -> None:
        """Fresh zeros are not backed by memory until written, so a wide matrix costs only what its
        rows use."""
        width = self.tokens.shape[1]
        if tokens > width:
            wider = np.zeros((self.count, max(tokens, 2 * width)), np.int32)
            wider[:, :width] = self.tokens
            self.tokens = wider
