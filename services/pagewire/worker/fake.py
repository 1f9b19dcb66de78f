"""A stand-in for the model, for tests without torch: the next token is a hash of all tokens before
it.

A client that knows `next_token` can check every token it gets, so a lost, doubled, swapped or
foreign token is seen at once. The runner keeps slots as the real one does; it has no KV tensors and
no opinion of block tables. Only numpy is needed.
"""

import time
from typing import Final

import numpy as np
import numpy.typing as npt
from pagewire_protocol.columns import FIRST_INCARNATION, Incarnation, Slot, pack
from pagewire_protocol.messages import Step, StepResult
from pagewire_protocol.splitmix import GOLDEN_GAMMA, MASK64, MULTIPLIERS, finalize
from pagewire_protocol.structs import (
    Admission,
    LogprobColumns,
    PromptLogprobs,
    StepCost,
    WorkerFacts,
)

from ..config import ModelConfig, SchedulerConfig, WorkerConfig

FACTOR: Final = GOLDEN_GAMMA
"""Odd, so that no token's share of the hash is ever lost. The hash of t[0..n) is the sum of (t[i] +
1) * FACTOR^(n-1-i) modulo 2^64."""
DEFAULT_BLOCKS: Final = 65_536
DEFAULT_MODEL_LEN: Final = 32_768

Columns = npt.NDArray[np.uint64]


def extend(state: int, token: int) -> int:
    """The hash of a sequence with one more token; the empty sequence has 0."""
    return (state * FACTOR + token + 1) & MASK64


def draw(state: int, vocab_size: int) -> int:
    """The token that follows a sequence with this hash: splitmix64's finalizer, then modulo."""
    return finalize(state) % vocab_size


def next_token(tokens: list[int], vocab_size: int) -> int:
    """What the fake model says after `tokens`: the reference that clients check against."""
    state = 0
    for token in tokens:
        state = extend(state, token)
    return draw(state, vocab_size)


def chain(tokens: list[int], count: int, vocab_size: int) -> list[int]:
    """The `count` tokens that the fake model says after `tokens`, in time linear in both."""
    state = 0
    for token in tokens:
        state = extend(state, token)
    drawn: list[int] = []
    for _ in range(count):
        drawn.append(draw(state, vocab_size))
        state = extend(state, drawn[-1])
    return drawn


def score(slot: Slot, tokens: list[int], count: int, vocab_size: int) -> PromptLogprobs:
    """What the fake model makes of a prompt of two tokens or more, beside each its `count`
    likeliest tokens: the one that it says itself has probability 1 (log 0), any other -100."""
    ids, values, ranks = list[int](), list[float](), list[int]()
    state = extend(0, tokens[0])
    for token in tokens[1:]:
        drawn = draw(state, vocab_size)
        ids += [token, *((drawn + j) % vocab_size for j in range(count))]
        values += [
            0.0 if token == drawn else -100.0,
            *(0.0 if j == 0 else -100.0 for j in range(count)),
        ]
        ranks.append(1 if token == drawn else 2)
        state = extend(state, token)
    counts = [count + 1] * len(ranks)
    return PromptLogprobs(
        slot, 1, pack("i", counts), pack("i", ranks), pack("i", ids), pack("f", values)
    )


def hash_all(tokens: npt.NDArray[np.int32]) -> int:
    """`extend` over a whole sequence at once. tokens: [n] int32."""
    powers = np.full(len(tokens), FACTOR, np.uint64)
    powers[:1] = 1
    return int(
        (np.cumprod(powers)[::-1] * (tokens.astype(np.uint64) + np.uint64(1))).sum(dtype=np.uint64)
    )


class FakeRunner:
    """A SyncRunner (runners.py)."""

    def __init__(
        self,
        model: ModelConfig,
        scheduler: SchedulerConfig,
        config: WorkerConfig,
        incarnation: Incarnation = FIRST_INCARNATION,
    ) -> None:
        self._incarnation = incarnation
        self._vocab = np.uint64(config.fake_vocab_size)
        self._step_s = config.fake_step_ms / 1000
        self._max_num_seqs, self._block_size = scheduler.num_seqs(), config.block_size
        self._num_blocks = config.num_kv_blocks or DEFAULT_BLOCKS
        held = self._num_blocks * self._block_size
        if model.max_model_len > held:
            raise ValueError(
                f"max_model_len {model.max_model_len} does not fit: {self._num_blocks} blocks of {self._block_size} hold {held} tokens"
            )
        self._max_model_len = model.max_model_len or min(DEFAULT_MODEL_LEN, held)
        self._state = np.zeros(0, np.uint64)
        self._known = np.zeros(0, np.int64)
        self._computed = np.zeros(0, np.int64)
        self._logprobs = np.zeros(0, np.int32)
        self._prefill_only = np.zeros(0, np.bool_)
        self._last = np.zeros(0, np.int32)
        self._scores: list[PromptLogprobs] = []
        """Of the prompts that were admitted with this step."""
        self._grow_to(scheduler.num_seqs())

    def facts(self) -> WorkerFacts:
        return WorkerFacts(
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            max_num_seqs=self._max_num_seqs,
            max_model_len=self._max_model_len,
            vocab_size=int(self._vocab),
            eos_token_ids=(),
            device="fake",
            cost=StepCost(1000 * self._step_s, 0.0, 0.0),
        )

    def clear(self) -> None:
        self._known[:] = 0
        self._computed[:] = 0
        self._last = self._last[:0]

    def execute(self, step: Step) -> StepResult:
        began = time.monotonic()
        self._scores.clear()
        for admission in step.admit:
            self._admit(admission)
        if not step.repeat:
            self._last = np.frombuffer(step.run_slots, np.int32)
        slots = self._last
        self._computed[slots] += 1 if step.repeat else np.frombuffer(step.run_counts, np.int32)
        slots = slots[(self._computed[slots] == self._known[slots]) & ~self._prefill_only[slots]]
        tokens = self._sample(slots)
        if self._step_s:
            time.sleep(max(0.0, self._step_s - (time.monotonic() - began)))
        return StepResult(
            epoch=step.epoch,
            incarnation=self._incarnation,
            n=step.n,
            slots=slots.tobytes(),
            tokens=tokens.tobytes(),
            flags=bytes(len(slots)),
            logprobs=self._logprob_columns(slots, tokens),
            prompt_logprobs=tuple(self._scores),
        )

    def _sample(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """`draw` and `extend` for whole columns; unsigned arithmetic wraps as they do."""
        state = self._state[slots]
        mixed = (state ^ (state >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
        tokens = (mixed ^ (mixed >> np.uint64(31))) % self._vocab
        self._state[slots] = state * np.uint64(FACTOR) + tokens + np.uint64(1)
        self._known[slots] += 1
        return tokens.astype(np.int32)

    def _admit(self, admission: Admission) -> None:
        slot = admission.slot
        if slot >= len(self._known):
            self._grow_to(slot + 1)
        tokens = np.frombuffer(admission.prompt + admission.output, np.int32)
        self._state[slot] = hash_all(tokens)
        self._known[slot] = len(tokens)
        self._computed[slot] = admission.computed
        self._logprobs[slot] = admission.sampling.logprobs
        self._prefill_only[slot] = admission.sampling.max_tokens == 0
        prompt, asked = len(admission.prompt) // 4, admission.sampling.prompt_logprobs
        if asked >= 0 and prompt > 1:
            self._scores.append(
                score(Slot(slot), tokens[:prompt].tolist(), asked, int(self._vocab))
            )

    def _grow_to(self, count: int) -> None:
        for name in ("_state", "_known", "_computed", "_logprobs", "_prefill_only"):
            old: npt.NDArray[np.generic] = getattr(self, name)
            new = np.zeros(count, old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)

    def _logprob_columns(
        self, slots: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]
    ) -> LogprobColumns | None:
        """The chosen token has probability 1 (log 0); as other candidates serve its successors in
        the vocabulary, at -100."""
        wanted = self._logprobs[slots]
        rows = np.flatnonzero(wanted >= 0).astype(np.int32)
        if not len(rows):
            return None
        counts = wanted[rows] + 1
        ids = [
            (int(tokens[row]) + max(0, j - 1)) % int(self._vocab)
            for row, n in zip(rows, counts, strict=True)
            for j in range(n)
        ]
        values = [0.0 if j < 2 else -100.0 for n in counts for j in range(n)]
        ranks = np.ones(len(rows), np.int32)
        return LogprobColumns(
            rows.tobytes(),
            counts.astype(np.int32).tobytes(),
            ranks.tobytes(),
            np.array(ids, np.int32).tobytes(),
            np.array(values, np.float32).tobytes(),
        )
