"""The permanent slots: what the worker remembers of each request between steps, as columns. Knows
neither tensors nor the model.

A slot holds `num_tokens` tokens (prompt and output, in one row of `tokens`), of which the first
`num_computed` have their keys and values in the slot's blocks. Sampling parameters are columns too,
so that a decode step touches arrays, not requests.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from pagewire_kernels.sampling_map import NEUTRAL, PARAMETERS, TEMPERATURE
from pagewire_protocol.agreed import SPARE_POSITIONS
from pagewire_protocol.messages import Admission
from pagewire_protocol.sampling import Sampling

from ..runners import BadStep

NO_LOGPROBS: Final = -1
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Slots:
    """`count` slots. Every column has one entry a slot.

    Methods raise BadStep for slots that hold no request, and for whatever else contradicts the
    columns.
    """

    def __init__(self, count: int, max_model_len: int, block_size: int) -> None:
        row_len = max_model_len + SPARE_POSITIONS
        self.count = count
        self.block_size = block_size
        self.active = np.zeros(count, bool)
        """The slot holds a request."""

        # Tokens and their blocks. num_prompt_tokens <= num_tokens, num_computed <= num_tokens.
        self.num_prompt_tokens = np.zeros(count, np.int64)
        self.num_tokens = np.zeros(count, np.int64)
        self.num_computed = np.zeros(count, np.int64)
        self.tokens = np.zeros((count, row_len), np.int32)
        self.num_blocks = np.zeros(count, np.int64)
        self.tables = np.zeros((count, -(-row_len // block_size)), np.int32)
        """Block ids, of which the first `num_blocks` count."""

        # Sampling parameters; their neutral values leave the model's distribution as it is.
        self.sampling_params = np.tile(np.array(NEUTRAL, np.float32), (count, 1))
        """[slots, PARAMETERS]: the scalars that the sampling kernels read; temperature 0 where the
        request is greedy."""
        self.seed = np.zeros(count, np.int64)
        self.presence = np.zeros(count, np.float32)
        self.frequency = np.zeros(count, np.float32)
        self.repetition = np.ones(count, np.float32)
        self.min_tokens = np.zeros(count, np.int64)
        self.logprobs = np.full(count, NO_LOGPROBS, np.int64)
        self.prompt_logprobs = np.full(count, NO_LOGPROBS, np.int64)
        self.constrained: list[Sampling | None] = [None] * count
        """What the request asks for, where that constrains its tokens: allowed ids, biases, bad
        words, a minimum of tokens."""

        # What follows from the parameters, so that a step looks at one column.
        self.prefill_only = np.zeros(count, bool)
        """The request wants no token: it is over when its prompt is computed."""
        self.needs_extra = np.zeros(count, bool)
        """Sampling takes more than temperature and filters: penalties, constraints or
        log-probabilities."""
        self.grammar_only = np.zeros(count, bool)
        """A grammar is all that constrains the tokens; log-probabilities may be asked for."""
        self.filtered = np.zeros(count, bool)
        """Tokens are drawn, from what filters like top-p leave of the vocabulary."""
        self.draws = np.zeros(count, bool)
        """Tokens are drawn at random."""
        self.plain_greedy = np.zeros(count, bool)
        """The largest logit is all that is asked for."""

    def clear(self) -> None:
        """Forget every request."""
        self.active[:] = False

    def retire(self, slots: npt.NDArray[np.int32]) -> None:
        """The requests of `slots` [N] are over."""
        self._check(slots)
        self.active[slots] = False

    def admit(self, admission: Admission) -> None:
        """A request gets the free slot that `admission` names."""
        slot = admission.slot
        if slot >= self.count:
            raise BadStep(f"slot {slot} admitted, but there are {self.count}")
        if self.active[slot]:
            raise BadStep(f"slot {slot} admitted while in use")
        prompt = np.frombuffer(admission.prompt, np.int32)
        output = np.frombuffer(admission.output, np.int32)
        num_tokens = len(prompt) + len(output)
        longest = self.tokens.shape[1] - SPARE_POSITIONS
        if not 0 < num_tokens <= longest or admission.computed >= num_tokens:
            raise BadStep(
                f"slot {slot} admitted with {num_tokens} tokens, {admission.computed} computed; "
                f"room for {longest}"
            )
        self.tokens[slot, : len(prompt)] = prompt
        self.tokens[slot, len(prompt) : num_tokens] = output
        self.num_prompt_tokens[slot] = len(prompt)
        self.num_tokens[slot] = num_tokens
        self.num_computed[slot] = admission.computed
        self.num_blocks[slot] = 0
        self._append_blocks(slot, np.frombuffer(admission.blocks, np.int32))
        self._set_sampling(slot, admission.sampling, has_grammar=admission.grammar is not None)
        self.active[slot] = True

    def _set_sampling(self, slot: int, sampling: Sampling, has_grammar: bool) -> None:
        values = np.array([getattr(sampling, name) for name in PARAMETERS], np.float32)
        neutral = values == np.array(NEUTRAL, np.float32)
        neutral[TEMPERATURE] = True
        if sampling.greedy:
            values[TEMPERATURE] = 0.0
        self.sampling_params[slot] = values
        self.filtered[slot] = not sampling.greedy and not neutral.all()
        self.draws[slot] = not sampling.greedy
        self.seed[slot] = sampling.seed
        self.presence[slot] = sampling.presence_penalty
        self.frequency[slot] = sampling.frequency_penalty
        self.repetition[slot] = sampling.repetition_penalty
        self.min_tokens[slot] = sampling.min_tokens
        self.logprobs[slot] = sampling.logprobs
        self.prompt_logprobs[slot] = sampling.prompt_logprobs
        constrained = bool(
            sampling.min_tokens or sampling.allowed_ids or sampling.bias_ids or sampling.bad_words
        )
        self.constrained[slot] = sampling if constrained else None
        self.prefill_only[slot] = sampling.max_tokens == 0
        penalized = (
            sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or sampling.repetition_penalty != 1
        )
        self.needs_extra[slot] = (
            constrained or penalized or has_grammar or sampling.logprobs > NO_LOGPROBS
        )
        self.grammar_only[slot] = has_grammar and not constrained and not penalized
        self.plain_greedy[slot] = sampling.greedy and not self.needs_extra[slot]

    def penalized(self, slots: Ints) -> Bools:
        """Which of `slots` [N] have a penalty that is not neutral."""
        return (
            (self.presence[slots] != 0)
            | (self.frequency[slots] != 0)
            | (self.repetition[slots] != 1)
        )

    def num_output_tokens(self, slots: Ints) -> Ints:
        """[N], for `slots` [N]."""
        return self.num_tokens[slots] - self.num_prompt_tokens[slots]

    def grow(self, slots: npt.NDArray[np.int32], blocks: npt.NDArray[np.int32]) -> None:
        """Append blocks[i] to the table of slots[i]; a slot may come several times."""
        if len(slots) != len(blocks):
            raise BadStep(f"{len(slots)} slots to grow but {len(blocks)} blocks")
        self._check(slots)
        if len(np.unique(slots)) != len(slots):
            for slot in np.unique(slots):
                self._append_blocks(int(slot), blocks[slots == slot])
            return
        column = self.num_blocks[slots]
        if (column >= self.tables.shape[1]).any():
            raise BadStep(f"a block table grows past its {self.tables.shape[1]} blocks")
        self.tables[slots, column] = blocks
        self.num_blocks[slots] += 1

    def _append_blocks(self, slot: int, blocks: npt.NDArray[np.int32]) -> None:
        first = int(self.num_blocks[slot])
        last = first + len(blocks)
        if last > self.tables.shape[1]:
            raise BadStep(
                f"the block table of slot {slot} grows to {last} blocks, "
                f"{self.tables.shape[1]} is most"
            )
        self.tables[slot, first:last] = blocks
        self.num_blocks[slot] = last

    def take(self, slots: Ints, counts: Ints) -> tuple[Ints, Ints]:
        """(first, end) [N] of the positions that each of `slots` [N] computes next, counts[i] of
        them; `num_computed` moves to the end. Raises BadStep when tokens or blocks lack."""
        self._check(slots)
        first = self.num_computed[slots]
        end = first + counts
        impossible = (
            (counts < 1)
            | (end > self.num_tokens[slots])
            | (end > self.num_blocks[slots] * self.block_size)
        )
        if impossible.any():
            row = int(np.argmax(impossible))
            slot = int(slots[row])
            raise BadStep(
                f"slot {slot} is to compute {counts[row]} tokens from {first[row]} on, but has "
                f"{self.num_tokens[slot]} tokens and {self.num_blocks[slot]} blocks of "
                f"{self.block_size}"
            )
        self.num_computed[slots] = end
        return first, end

    def samples(self, slots: Ints, end: Ints) -> Bools:
        """Which of `slots` [N] sample in a step that computes them up to position end[i]: those
        whose last token it computes, unless they want none."""
        return (end == self.num_tokens[slots]) & ~self.prefill_only[slots]

    def append_tokens(self, slots: Ints, tokens: npt.NDArray[np.int32]) -> None:
        """One sampled token more for each of `slots` [N], which differ."""
        self.tokens[slots, self.num_tokens[slots]] = tokens
        self.num_tokens[slots] += 1

    def append_run(self, slot: int, tokens: list[int]) -> None:
        """Tokens that `slot` has without having sampled them."""
        end = int(self.num_tokens[slot])
        self.tokens[slot, end : end + len(tokens)] = tokens
        self.num_tokens[slot] = end + len(tokens)

    def room(self, slots: Ints) -> Ints:
        """[N]: how many tokens `slots` [N] may still get up to the longest context."""
        return self.tokens.shape[1] - SPARE_POSITIONS - self.num_tokens[slots]

    def hold_back(self, slots: Ints) -> None:
        """`slots` [N], whose last tokens were computed, have sampled none: they compute these
        again."""
        self.num_computed[slots] -= 1

    def _check(self, slots: npt.NDArray[np.integer]) -> None:
        if len(slots) and (
            slots.min() < 0 or slots.max() >= self.count or not self.active[slots].all()
        ):
            wrong = [
                int(slot) for slot in slots if not 0 <= slot < self.count or not self.active[slot]
            ]
            raise BadStep(f"slots {wrong[:8]} are named, but hold no request")
