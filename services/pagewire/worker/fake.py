"""A stand-in for the model, for tests without torch: the next token is a hash of all tokens before
it.

A client that knows `next_token` can check every token it gets, so a lost, doubled, swapped or
foreign token is seen at once. The runner keeps slots as the real one does, refuses the steps that
it would refuse, and scores the part of a prompt that a step computes; it has no KV tensors, and
knows of block tables only how long they are. Only numpy is needed.
"""

import time
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from pagewire_protocol.agreed import GRAMMAR_FAILED
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
from .runners import BadStep
from .step.forced_runs import MAX_RUN, brought, moved
from .step.grammar_masks import GrammarMasks
from .step.rank_masks import MakeMasks

FACTOR: Final = GOLDEN_GAMMA
"""Odd, so that no token's share of the hash is ever lost. The hash of t[0..n) is the sum of (t[i] +
1) * FACTOR^(n-1-i) modulo 2^64."""
DEFAULT_BLOCKS: Final = 65_536
DEFAULT_MODEL_LEN: Final = 32_768
FIRST_ALLOWED: Final = 32
"""Of the tokens that a grammar allows: those that are drawn more often than others."""

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


class PromptScorer:
    """Log-probabilities of one prompt, chunk by chunk: beside each token the `count` likeliest
    ones. The token that the fake model says itself has probability 1 (log 0), any other -100."""

    def __init__(self, tokens: list[int], count: int, vocab_size: int) -> None:
        self._tokens = tokens
        self._count = count
        self._vocab_size = vocab_size
        self._state = 0
        self._position = 0
        """Tokens that `_state` is the hash of."""

    def score(self, slot: Slot, first: int, count: int) -> PromptLogprobs | None:
        """What follows the positions `first` to `first + count`, which a step computes; None when
        no token of the prompt does. Chunks come in order."""
        own = self._tokens[first + 1 : first + count + 1]
        if not own:
            return None
        ids = list[int]()
        values = list[float]()
        ranks = list[int]()
        for token in self._tokens[self._position : first + 1]:
            self._state = extend(self._state, token)
        for token in own:
            drawn = draw(self._state, self._vocab_size)
            ids += [token, *((drawn + j) % self._vocab_size for j in range(self._count))]
            values += [
                0.0 if token == drawn else -100.0,
                *(0.0 if j == 0 else -100.0 for j in range(self._count)),
            ]
            ranks.append(1 if token == drawn else 2)
            self._state = extend(self._state, token)
        self._position = first + 1 + len(own)
        counts = [self._count + 1] * len(ranks)
        return PromptLogprobs(
            slot, first + 1, pack("i", counts), pack("i", ranks), pack("i", ids), pack("f", values)
        )


def hash_all(tokens: npt.NDArray[np.int32]) -> int:
    """`extend` over a whole sequence at once. tokens: [n] int32."""
    powers = np.full(len(tokens), FACTOR, np.uint64)
    powers[:1] = 1
    return int(
        (np.cumprod(powers)[::-1] * (tokens.astype(np.uint64) + np.uint64(1))).sum(dtype=np.uint64)
    )


class MaskedRows(NamedTuple):
    """Of the rows of a step that sample, where some slot has a grammar: the forced run of each,
    which have their masks, their flags, and whether some row does not bring one token."""

    runs: list[list[int]]
    ready: npt.NDArray[np.bool_]
    flags: bytes
    is_uneven: bool


class FakeRunner:
    """A SyncRunner (runners.py)."""

    def __init__(
        self,
        model: ModelConfig,
        scheduler: SchedulerConfig,
        config: WorkerConfig,
        incarnation: Incarnation = FIRST_INCARNATION,
        make_masks: MakeMasks = GrammarMasks,
    ) -> None:
        self._incarnation = incarnation
        self._vocab = np.uint64(config.fake_vocab_size)
        self._step_s = config.fake_step_ms / 1000
        self._stages = config.pipeline_parallel_size
        self._max_num_seqs = scheduler.num_seqs()
        self._block_size = config.block_size
        self._num_blocks = config.num_kv_blocks or DEFAULT_BLOCKS
        held = self._num_blocks * self._block_size
        if model.max_model_len > held:
            raise ValueError(
                f"max_model_len {model.max_model_len} does not fit: {self._num_blocks} blocks of {self._block_size} hold {held} tokens"
            )
        self._max_model_len = model.max_model_len or min(DEFAULT_MODEL_LEN, held)
        self._state = np.zeros(0, np.uint64)
        self._known = np.zeros(0, np.int64)
        self._prompt = np.zeros(0, np.int64)
        self._computed = np.zeros(0, np.int64)
        self._allocated = np.zeros(0, np.int64)
        """Tokens that the slots' blocks have room for."""
        self._logprobs = np.zeros(0, np.int32)
        self._prefill_only = np.zeros(0, np.bool_)
        self._last = np.zeros(0, np.int32)
        self._active = np.zeros(0, np.bool_)
        self._scorers: dict[int, PromptScorer] = {}
        """Of the slots whose prompts are to be scored."""
        self._grow_to(scheduler.num_seqs())
        self._one_each = np.ones(scheduler.num_seqs(), np.int32)
        self._eos = (config.fake_eos_token_id,) if config.fake_eos_token_id >= 0 else ()
        self._masks = make_masks(scheduler.num_seqs(), model, config.fake_vocab_size, self._eos)
        self._max_run = self._masks.allow_runs(MAX_RUN)

    def facts(self) -> WorkerFacts:
        return WorkerFacts(
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            max_num_seqs=self._max_num_seqs,
            max_model_len=self._max_model_len,
            vocab_size=int(self._vocab),
            eos_token_ids=self._eos,
            device="fake",
            cost=StepCost(1000 * self._step_s, 0.0, 0.0),
            max_forced_tokens=self._max_run,
            pipeline_parallel_size=self._stages,
        )

    def clear(self) -> None:
        self._known[:] = 0
        self._computed[:] = 0
        self._active[:] = False
        self._scorers.clear()
        self._last = self._last[:0]
        self._masks.clear()

    def execute(self, step: Step) -> StepResult:
        began = time.monotonic()
        if step.retire or step.admit:
            self._admit_and_retire(step)
        if step.grow_slots:
            grown = np.frombuffer(step.grow_slots, np.int32)
            np.add.at(self._allocated, grown, self._block_size)
        slots, counts = self._rows(step)
        scores = self._score(slots, counts)
        self._computed[slots] += counts
        slots = slots[(self._computed[slots] == self._known[slots]) & ~self._prefill_only[slots]]
        masked = self._with_masks(slots) if self._masks.any else None
        sampled = slots if masked is None else slots[masked.ready]
        tokens = self._sample(sampled)
        logprobs = self._logprob_columns(sampled, tokens)
        counts_sampled = b""
        if masked is not None and masked.is_uneven:
            tokens, lengths = brought(masked.runs, masked.ready, tokens)
            logprobs = moved(logprobs, lengths, masked.ready)
            counts_sampled = lengths.tobytes()
        if self._step_s:
            time.sleep(max(0.0, self._step_s - (time.monotonic() - began)))
        return StepResult(
            incarnation=self._incarnation,
            epoch=step.epoch,
            n=step.n,
            slots=slots.tobytes(),
            tokens=tokens.tobytes(),
            flags=bytes(len(slots)) if masked is None else masked.flags,
            logprobs=logprobs,
            prompt_logprobs=scores,
            counts=counts_sampled,
        )

    def _admit_and_retire(self, step: Step) -> None:
        for slot in np.frombuffer(step.retire, np.int32).tolist():
            self._retire(slot)
        for admission in step.admit:
            self._admit(admission)
        self._masks.follow(step)

    def _with_masks(self, slots: npt.NDArray[np.int32]) -> MaskedRows:
        """What grammars say of `slots`, which sample. Those whose masks are not there compute their
        last token again, and so do those whose forced runs have left no room for another token."""
        room = self._allocated[slots] - self._computed[slots]
        ready = (room >= 0) | ~self._masks.concerns(slots.astype(np.int64))
        held = slots[ready]
        runs = self._take_runs(slots, room)
        positions = self._known[held] - self._prompt[held]
        ready[ready] = self._masks.ready(held.astype(np.int64), positions)
        self._computed[slots[~ready]] -= 1
        flags = np.zeros(len(slots), np.uint8)
        flags[self._masks.failed(slots)] = GRAMMAR_FAILED
        return MaskedRows(runs, ready, flags.tobytes(), any(runs) or not bool(ready.all()))

    def _take_runs(
        self, slots: npt.NDArray[np.int32], room: npt.NDArray[np.int64]
    ) -> list[list[int]]:
        """The forced runs of `slots`, whose blocks have `room` for so many tokens behind those of
        this step: they are computed with it."""
        runs: list[list[int]] = [[] for _ in slots]
        concerned = self._masks.concerns(slots.astype(np.int64)) & (self._logprobs[slots] < 0)
        rows = np.flatnonzero(concerned & (room >= 0))
        if not len(rows) or not self._max_run:
            return runs
        taking = slots[rows].astype(np.int64)
        most = np.minimum(room[rows], self._max_model_len - self._known[taking]).clip(0, MAX_RUN)
        for row, run in zip(rows.tolist(), self._masks.take_runs(taking, most), strict=True):
            runs[row] = run
            slot = slots[row]
            for token in run:
                self._state[slot] = extend(int(self._state[slot]), token)
            self._known[slot] += len(run)
            self._computed[slot] += len(run)
        return runs

    def _rows(self, step: Step) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The slots that it runs, and how many tokens of each."""
        if step.repeat:
            return self._last, self._one_each[: len(self._last)]
        slots = np.frombuffer(step.run_slots, np.int32)
        counts = np.frombuffer(step.run_counts, np.int32)
        if len(slots) != len(counts):
            raise BadStep(f"{len(slots)} slots to run but {len(counts)} counts")
        if (slots < 0).any() or (slots >= len(self._active)).any() or not self._active[slots].all():
            raise BadStep(f"a step runs slots {slots.tolist()}, of which some hold no request")
        if (counts < 1).any() or (self._computed[slots] + counts > self._known[slots]).any():
            raise BadStep(f"a step computes {counts.tolist()} tokens, more than slots have")
        self._last = slots
        return slots, counts

    def _score(
        self, slots: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]
    ) -> tuple[PromptLogprobs, ...]:
        """Of the chunks of prompts that this step computes, before `_computed` moves on."""
        if not self._scorers:
            return ()
        scores: list[PromptLogprobs] = []
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            scorer = self._scorers.get(slot)
            if scorer is not None:
                entry = scorer.score(Slot(slot), int(self._computed[slot]), count)
                scores += [entry] if entry else []
        return tuple(scores)

    def _retire(self, slot: int) -> None:
        if not 0 <= slot < len(self._active) or not self._active[slot]:
            raise BadStep(f"slot {slot} is retired, and holds no request")
        self._active[slot] = False
        self._scorers.pop(slot, None)

    def _sample(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """`draw` and `extend` for whole columns; unsigned arithmetic wraps as they do."""
        state = self._state[slots]
        mixed = (state ^ (state >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
        drawn = mixed ^ (mixed >> np.uint64(31))
        tokens = drawn % self._vocab
        if self._masks.any:
            self._draw_allowed(slots, drawn, tokens)
        self._state[slots] = state * np.uint64(FACTOR) + tokens + np.uint64(1)
        self._known[slots] += 1
        return tokens.astype(np.int32)

    def _draw_allowed(self, slots: npt.NDArray[np.int32], drawn: Columns, tokens: Columns) -> None:
        """The `tokens` of rows with grammars: of those allowed, the one with the number that the
        hash says, counted in rising order. Three of four are among the first: of a byte-level
        vocabulary these are single characters, `"` among them, so that strings come to their
        end."""
        concerned = self._masks.concerns(slots.astype(np.int64))
        for row in np.flatnonzero(concerned & ~self._masks.failed(slots)).tolist():
            words = self._masks.rows(slots[row : row + 1].astype(np.int64))
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            number, is_any = divmod(int(drawn[row]), 4)
            count = len(allowed) if is_any == 0 else min(FIRST_ALLOWED, len(allowed))
            tokens[row] = allowed[number % count]
        self._masks.append(self._masks.keys(slots.astype(np.int64)), tokens.astype(np.int32))

    def _admit(self, admission: Admission) -> None:
        slot = admission.slot
        if slot >= len(self._active):
            raise BadStep(f"slot {slot} admitted, but there are {len(self._active)}")
        if self._active[slot]:
            raise BadStep(f"slot {slot} admitted while in use")
        tokens = np.frombuffer(admission.prompt + admission.output, np.int32)
        if not 0 < len(tokens) <= self._max_model_len or admission.computed >= len(tokens):
            raise BadStep(
                f"slot {slot} admitted with {len(tokens)} tokens, {admission.computed} computed; "
                f"room for {self._max_model_len}"
            )
        self._active[slot] = True
        self._state[slot] = hash_all(tokens)
        self._known[slot] = len(tokens)
        self._prompt[slot] = len(admission.prompt) // 4
        self._computed[slot] = admission.computed
        self._allocated[slot] = len(admission.blocks) // 4 * self._block_size
        self._logprobs[slot] = admission.sampling.logprobs
        self._prefill_only[slot] = admission.sampling.max_tokens == 0
        prompt = len(admission.prompt) // 4
        asked = admission.sampling.prompt_logprobs
        if asked >= 0 and prompt > 1:
            self._scorers[slot] = PromptScorer(tokens[:prompt].tolist(), asked, int(self._vocab))

    def _grow_to(self, count: int) -> None:
        columns = ("_active", "_state", "_known", "_prompt", "_computed", "_allocated")
        for name in (*columns, "_logprobs", "_prefill_only"):
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
