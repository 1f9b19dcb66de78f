"""The permanent slots: what the worker remembers of each request between steps, as columns. Knows
neither tensors nor the model.

A slot holds known tokens (prompt and output, in one row of `tokens`), of which the first `computed`
have their keys and values in the slot's blocks. Sampling parameters are columns too, so that a
decode step touches arrays, not requests.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from pagewire_protocol.messages import Admission
from pagewire_protocol.sampling import Sampling

SPARE: Final = 16
"""Places beyond the longest context: steps sent ahead may run a request past its end, and their
tokens are dropped later."""
Ints = npt.NDArray[np.int64]


class BadStep(ValueError):
    """The scheduler asked for something impossible; the message has the numbers."""


class Slots:
    def __init__(self, count: int, max_model_len: int, block_size: int) -> None:
        room = max_model_len + SPARE
        self.count, self.block_size = count, block_size
        self.active = np.zeros(count, bool)
        self.known = np.zeros(count, np.int64)
        self.computed = np.zeros(count, np.int64)
        self.prompt = np.zeros(count, np.int64)
        self.tokens = np.zeros((count, room), np.int32)
        self.tables = np.zeros((count, -(-room // block_size)), np.int32)
        self.blocks = np.zeros(count, np.int64)
        self.temperature = np.zeros(count, np.float32)
        self.top_p = np.ones(count, np.float32)
        self.min_p = np.zeros(count, np.float32)
        self.presence = np.zeros(count, np.float32)
        self.frequency = np.zeros(count, np.float32)
        self.repetition = np.ones(count, np.float32)
        self.top_k = np.zeros(count, np.int64)
        self.seed = np.zeros(count, np.int64)
        self.logprobs = np.full(count, -1, np.int64)
        self.prompt_logprobs = np.full(count, -1, np.int64)
        self.min_tokens = np.zeros(count, np.int64)
        self.prefill_only = np.zeros(count, bool)
        """The request wants no token: it is over when its prompt is computed."""
        self.special = np.zeros(count, bool)
        """Sampling needs more than temperature and filters: penalties, limits,
        log-probabilities."""
        self.plain = np.zeros(count, bool)
        """Greedy and not special."""
        self.limits: list[Sampling | None] = [None] * count
        """What the request asks for, where that restricts its tokens: allowed ids, biases, bad
        words, a minimum."""

    def clear(self) -> None:
        self.active[:] = False

    def retire(self, slots: npt.NDArray[np.int32]) -> None:
        self._check(slots)
        self.active[slots] = False

    def admit(self, admission: Admission) -> None:
        slot = admission.slot
        if slot >= self.count:
            raise BadStep(f"slot {slot} admitted, but there are {self.count}")
        if self.active[slot]:
            raise BadStep(f"slot {slot} admitted while in use")
        prompt, output = (
            np.frombuffer(admission.prompt, np.int32),
            np.frombuffer(admission.output, np.int32),
        )
        known = len(prompt) + len(output)
        if not 0 < known <= self.tokens.shape[1] - SPARE or admission.computed >= known:
            raise BadStep(
                f"slot {slot} admitted with {known} tokens, {admission.computed} computed; room for {self.tokens.shape[1] - SPARE}"
            )
        self.tokens[slot, : len(prompt)] = prompt
        self.tokens[slot, len(prompt) : known] = output
        self.prompt[slot], self.known[slot], self.computed[slot] = (
            len(prompt),
            known,
            admission.computed,
        )
        self.blocks[slot] = 0
        self._append(slot, np.frombuffer(admission.blocks, np.int32))
        self._set_sampling(slot, admission.sampling)
        self.active[slot] = True

    def _set_sampling(self, slot: int, given: Sampling) -> None:
        self.temperature[slot] = 0.0 if given.greedy else given.temperature
        self.top_p[slot], self.min_p[slot], self.top_k[slot] = given.top_p, given.min_p, given.top_k
        self.presence[slot], self.frequency[slot] = given.presence_penalty, given.frequency_penalty
        self.repetition[slot] = given.repetition_penalty
        self.seed[slot], self.logprobs[slot], self.min_tokens[slot] = (
            given.seed,
            given.logprobs,
            given.min_tokens,
        )
        self.prompt_logprobs[slot] = given.prompt_logprobs
        self.prefill_only[slot] = given.max_tokens == 0
        limited = bool(given.min_tokens or given.allowed_ids or given.bias_ids or given.bad_words)
        self.limits[slot] = given if limited else None
        neutral = (given.presence_penalty, given.frequency_penalty, given.repetition_penalty) == (
            0.0,
            0.0,
            1.0,
        )
        self.special[slot] = limited or not neutral or given.logprobs >= 0
        self.plain[slot] = given.greedy and not self.special[slot]

    def grow(self, slots: npt.NDArray[np.int32], blocks: npt.NDArray[np.int32]) -> None:
        """Append blocks[i] to the table of slots[i]; a slot may come several times."""
        if len(slots) != len(blocks):
            raise BadStep(f"{len(slots)} slots to grow but {len(blocks)} blocks")
        self._check(slots)
        if len(np.unique(slots)) != len(slots):
            for slot in np.unique(slots):
                self._append(int(slot), blocks[slots == slot])
            return
        at = self.blocks[slots]
        if (at >= self.tables.shape[1]).any():
            raise BadStep(f"a block table grows past its {self.tables.shape[1]} blocks")
        self.tables[slots, at] = blocks
        self.blocks[slots] += 1

    def _append(self, slot: int, blocks: npt.NDArray[np.int32]) -> None:
        first, last = int(self.blocks[slot]), int(self.blocks[slot]) + len(blocks)
        if last > self.tables.shape[1]:
            raise BadStep(
                f"the block table of slot {slot} grows to {last} blocks, {self.tables.shape[1]} is most"
            )
        self.tables[slot, first:last] = blocks
        self.blocks[slot] = last

    def take(self, slots: Ints, counts: Ints) -> tuple[Ints, Ints]:
        """(first, end) of the positions that each slot computes next; `computed` moves there.
        Raises BadStep when tokens or blocks lack."""
        self._check(slots)
        first = self.computed[slots]
        end = first + counts
        if (
            (counts < 1).any()
            or (end > self.known[slots]).any()
            or (end > self.blocks[slots] * self.block_size).any()
        ):
            bad = int(
                np.argmax(
                    (counts < 1)
                    | (end > self.known[slots])
                    | (end > self.blocks[slots] * self.block_size)
                )
            )
            slot = int(slots[bad])
            raise BadStep(
                f"slot {slot} is to compute {counts[bad]} tokens from {first[bad]} on, but knows {self.known[slot]} "
                f"and has {self.blocks[slot]} blocks of {self.block_size}"
            )
        self.computed[slots] = end
        return first, end

    def samples(self, slots: Ints, end: Ints) -> npt.NDArray[np.bool_]:
        """Which of `slots` sample in a step that computes them up to `end`: those whose last token
        it computes, unless they want none."""
        return (end == self.known[slots]) & ~self.prefill_only[slots]

    def append_tokens(self, slots: Ints, tokens: npt.NDArray[np.int32]) -> None:
        self.tokens[slots, self.known[slots]] = tokens
        self.known[slots] += 1

    def _check(self, slots: npt.NDArray[np.integer]) -> None:
        if len(slots) and (
            slots.min() < 0 or slots.max() >= self.count or not self.active[slots].all()
        ):
            wrong = [
                int(slot) for slot in slots if not 0 <= slot < self.count or not self.active[slot]
            ]
            raise BadStep(f"slots {wrong[:8]} are named, but hold no request")
