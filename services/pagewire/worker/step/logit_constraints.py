"""What constrains the next token of a slot beyond penalties: allowed ids and biases, bad words,
endings before the least number of tokens, and grammars.

Each kind is a LogitConstraint, a logits processor for all slots at once; grammars come after them
and have the last word. What a request brings goes to the device once, when it is admitted; a step
then runs a few operations over the rows that a constraint touches. Plain torch on any device, and
nothing here waits for the device.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from pagewire_kernels.reference import apply_token_masks
from pagewire_protocol.sampling import MAX_BAD_WORD_TOKENS, Sampling
from torch import Tensor

from .grammar_masks import GrammarMasks
from .logprobs import ToDevice
from .slots import Bools, Ints, Slots

HISTORY: Final = MAX_BAD_WORD_TOKENS - 1
"""Output tokens remembered: those before the last one of the longest bad word."""
ANY_TOKEN: Final = -1
NO_TOKEN: Final = -2
NEGATIVE_INFINITY: Final = float("-inf")
ApplyMasks = Callable[[Tensor, Tensor, Tensor], None]
"""As `pagewire_kernels.token_masks.apply_token_masks`."""


class Exclusions(NamedTuple):
    """N tokens that rows may not sample: token tokens[n] (int64) of row rows[n] (int64) gets
    shifts[n] (float32: minus infinity, or 0 where a condition does not hold) added to its logit."""

    rows: Tensor
    tokens: Tensor
    shifts: Tensor


class LogitConstraint(Protocol):
    """One kind of constraint, for all slots."""

    def admit(self, slot: int, sampling: Sampling | None) -> None:
        """`slot` holds a new request; `sampling` is None where nothing constrains its tokens."""
        ...

    def touches(self, slots: Ints) -> Bools:
        """[R]: which of `slots` [R] it concerns with their next token."""
        ...

    def apply(self, logits: Tensor, slots: Ints) -> Exclusions | None:
        """Change logits [R, V] float32 of the rows `slots` [R] in place where that can never leave
        a row without a token. What might do so is returned instead, and applied together with what
        the other constraints exclude."""
        ...

    def max_excluded(self, slot: int) -> int:
        """An upper bound of how many tokens `apply` ever excludes for `slot`."""
        ...

    def observe(self, slots: Ints, tokens: Tensor) -> None:
        """tokens [R] int32, on the device, were sampled for `slots` [R]."""
        ...


class Constraints:
    """All kinds of constraint of all slots: `apply` before rows are sampled, `observe` after."""

    def __init__(
        self,
        slots: Slots,
        masks: GrammarMasks,
        vocab_size: int,
        eos: tuple[int, ...],
        device: str,
        to_device: ToDevice,
        apply_masks: ApplyMasks = apply_token_masks,
    ) -> None:
        self._slots = slots
        self._grammars = GrammarConstraint(slots, masks, to_device, apply_masks)
        self._vocab_size = vocab_size
        # In vLLM's order: allowed ids, bad words, endings. Biases shift what they do not exclude,
        # so they may come first.
        self._constraints: Sequence[LogitConstraint] = (
            BiasConstraint(slots.count, vocab_size, device, to_device),
            BadWordsConstraint(slots, device, to_device),
            MinTokensConstraint(slots, vocab_size, eos, device, to_device),
        )
        self._may_exclude_all = np.zeros(slots.count, bool)
        """Slots whose exclusions might leave no token."""
        self._negative_infinity = torch.tensor(NEGATIVE_INFINITY, device=device)

    def admit(self, new: Ints) -> None:
        """The slots `new` [N] hold new requests."""
        for slot in new.tolist():
            sampling = self._slots.constrained[slot]
            for constraint in self._constraints:
                constraint.admit(slot, sampling)
            excluded = sum(constraint.max_excluded(slot) for constraint in self._constraints)
            self._may_exclude_all[slot] = sampling is not None and bool(
                sampling.allowed_ids or excluded >= self._vocab_size
            )

    def touches(self, slots: Ints) -> Bools:
        """[R]: which of `slots` [R] any constraint concerns with their next token."""
        touched = np.zeros(len(slots), bool)
        for constraint in self._constraints:
            touched |= constraint.touches(slots)
        return touched | self._grammars.touches(slots)

    def apply(self, logits: Tensor, slots: Ints) -> None:
        """logits [R, V] float32 of the rows `slots` [R], in place. The grammars' masks must be
        ready.

        Where exclusions would leave no token at all, the row is left without them: something must
        be sampled. A grammar is always held: where the others leave none of the tokens that it
        allows, they are not applied."""
        held = self._grammars.held(logits, slots)
        self._exclude(logits, slots)
        if held is not None:
            self._grammars.apply(logits, held)

    def _exclude(self, logits: Tensor, slots: Ints) -> None:
        excluded: list[Exclusions] = []
        for constraint in self._constraints:
            exclusions = constraint.apply(logits, slots)
            if exclusions is not None:
                excluded.append(exclusions)
        if not excluded:
            return
        rows, tokens, shifts = (
            excluded[0] if len(excluded) == 1 else map(torch.cat, zip(*excluded, strict=True))
        )
        before = logits[rows, tokens]
        logits.index_put_((rows, tokens), shifts, accumulate=True)
        if self._may_exclude_all[slots].any():
            empty = logits.amax(-1) == self._negative_infinity
            logits.index_put_(
                (rows, tokens), torch.where(empty[rows], before, logits[rows, tokens])
            )

    def observe(self, slots: Ints, tokens: Tensor) -> None:
        """tokens [R] int32, on the device, were sampled for `slots` [R]."""
        for constraint in self._constraints:
            constraint.observe(slots, tokens)


class _Held(NamedTuple):
    """The G rows of a batch that have grammars: their indices int64 [G] and masks int32 [G, words].
    `mixed` int64 [M] are those among the G that have other constraints too, `logits` [M, V] theirs
    before anything has changed them."""

    rows: Tensor
    words: Tensor
    mixed: Tensor | None
    logits: Tensor | None


class GrammarConstraint:
    """The masks of grammars, which change with each token and come from the matcher process."""

    def __init__(
        self, slots: Slots, masks: GrammarMasks, to_device: ToDevice, apply_masks: ApplyMasks
    ) -> None:
        self._slots = slots
        self._masks = masks
        self._to_device = to_device
        self._apply_masks = apply_masks

    def touches(self, slots: Ints) -> Bools:
        """[R]: which of `slots` [R] have a grammar."""
        return self._masks.concerns(slots)

    def held(self, logits: Tensor, slots: Ints) -> _Held | None:
        """The rows with grammars of logits [R, V] float32, before anything has changed them; None
        where there is none."""
        if not self._masks.any:
            return None
        rows = np.flatnonzero(self._masks.concerns(slots) & ~self._masks.failed(slots))
        if not len(rows):
            return None
        words = self._to_device(self._masks.rows(slots[rows]).view(np.int32))
        index = self._to_device(rows)
        constrained = self._slots.constrained
        mixed = [i for i, slot in enumerate(slots[rows].tolist()) if constrained[slot] is not None]
        if not mixed:
            return _Held(index, words, None, None)
        among = self._to_device(np.array(mixed, np.int64))
        return _Held(index, words, among, logits[index[among]])

    def apply(self, logits: Tensor, held: _Held) -> None:
        """Exclude what is not allowed from logits [R, V] float32, in place."""
        self._apply_masks(logits, held.rows, held.words)
        if held.mixed is None or held.logits is None:
            return
        rows = held.rows[held.mixed]
        none_left = logits[rows].amax(-1, keepdim=True) == NEGATIVE_INFINITY
        logits[rows] = torch.where(none_left, held.logits, logits[rows])
        self._apply_masks(logits, rows, held.words[held.mixed].contiguous())


class BiasConstraint:
    """Biases and allowed ids: one row of shifts, added to the logits of a slot."""

    def __init__(self, count: int, vocab_size: int, device: str, to_device: ToDevice) -> None:
        self._count = count
        self._device = device
        self._to_device = to_device
        self._shifts = torch.zeros((0, vocab_size), device=device)
        """float32 [rows, V]: biases, minus infinity where a token is not allowed. There are as many
        rows as slots ever needed one at the same time, not one a slot."""
        self._row_of = np.full(count, -1, np.int64)
        """By slot: its row of `_shifts`, -1 where it has none."""

    def admit(self, slot: int, sampling: Sampling | None) -> None:
        """See LogitConstraint."""
        if sampling is None or not (sampling.allowed_ids or sampling.bias_ids):
            self._row_of[slot] = -1
            return
        shifts = self._row(slot)
        if sampling.allowed_ids:
            allowed = np.frombuffer(sampling.allowed_ids, np.int32).astype(np.int64)
            shifts.fill_(NEGATIVE_INFINITY)
            shifts.index_fill_(0, self._to_device(allowed), 0.0)
        else:
            shifts.fill_(0.0)
        if sampling.bias_ids:
            ids = np.frombuffer(sampling.bias_ids, np.int32).astype(np.int64)
            values = np.frombuffer(sampling.bias_values, np.float32).copy()
            shifts.index_add_(0, self._to_device(ids), self._to_device(values))

    def _row(self, slot: int) -> Tensor:
        """The slot's row of `_shifts`; there are more rows when needed."""
        if self._row_of[slot] < 0:
            rows, vocab_size = self._shifts.shape
            free = np.setdiff1d(np.arange(rows), self._row_of)
            if not len(free):
                free = np.array([rows])
                more = min(max(4, rows), self._count - rows)
                added = torch.zeros((more, vocab_size), device=self._device)
                self._shifts = torch.cat((self._shifts, added))
            self._row_of[slot] = free[0]
        return self._shifts[int(self._row_of[slot])]

    def touches(self, slots: Ints) -> Bools:
        """See LogitConstraint."""
        return self._row_of[slots] >= 0

    def apply(self, logits: Tensor, slots: Ints) -> None:
        """See LogitConstraint. At least one id is allowed, so a row is never left without one."""
        rows = np.flatnonzero(self._row_of[slots] >= 0)
        if len(rows):
            index = self._to_device(np.stack((rows, self._row_of[slots[rows]])))
            logits.index_add_(0, index[0], self._shifts[index[1]])

    def max_excluded(self, slot: int) -> int:
        """See LogitConstraint."""
        return 0

    def observe(self, slots: Ints, tokens: Tensor) -> None:
        """See LogitConstraint: what was sampled changes nothing."""


class BadWordsConstraint:
    """Sequences of tokens whose last one may not follow the others.

    They are compared with the last output tokens of a slot, which are remembered on the device: the
    host may not know them yet."""

    def __init__(self, slots: Slots, device: str, to_device: ToDevice) -> None:
        self._slots = slots
        self._device = device
        self._to_device = to_device
        self._has_words = np.zeros(slots.count, bool)
        self._words: dict[int, tuple[Tensor, Tensor]] = {}
        """By slot: the tokens that must precede, int32 [W, HISTORY], aligned to the end, ANY_TOKEN
        before a word's beginning; and the last token of each word, int64 [W]."""
        self._recent: Tensor | None = None
        """int32 [slots, HISTORY]: the last output tokens, the newest at the end; NO_TOKEN where
        there was none. Allocated with the first bad word."""
        self._admissions = 0
        self._gathered: tuple[int, bytes, _Gathered] | None = None
        """The number of admissions and the rows for which the third holds."""
        self._negative_infinity = torch.tensor(NEGATIVE_INFINITY, device=device)

    def admit(self, slot: int, sampling: Sampling | None) -> None:
        """See LogitConstraint."""
        self._admissions += 1
        self._words.pop(slot, None)
        words = sampling.bad_words if sampling is not None else ()
        self._has_words[slot] = bool(words)
        if not words:
            return
        tokens = [np.frombuffer(word, np.int32) for word in words]
        before = np.full((len(tokens), HISTORY), ANY_TOKEN, np.int32)
        for i, word in enumerate(tokens):
            before[i, HISTORY - len(word) + 1 :] = word[:-1]
        last = np.array([word[-1] for word in tokens], np.int64)
        self._words[slot] = (self._to_device(before), self._to_device(last))
        self._remember_output(slot)

    def _remember_output(self, slot: int) -> None:
        """A resumed request brings output tokens with it."""
        if self._recent is None:
            shape = (self._slots.count, HISTORY)
            self._recent = torch.full(shape, NO_TOKEN, dtype=torch.int32, device=self._device)
        end = int(self._slots.num_tokens[slot])
        start = max(int(self._slots.num_prompt_tokens[slot]), end - HISTORY)
        recent = np.full(HISTORY, NO_TOKEN, np.int32)
        recent[HISTORY - (end - start) :] = self._slots.tokens[slot, start:end]
        self._recent[slot].copy_(self._to_device(recent))

    def touches(self, slots: Ints) -> Bools:
        """See LogitConstraint."""
        return self._has_words[slots]

    def apply(self, logits: Tensor, slots: Ints) -> Exclusions | None:
        """See LogitConstraint. Each word's last token is named, whether or not the word matches so
        far: that is known on the device only."""
        rows = np.flatnonzero(self._has_words[slots])
        if not len(rows) or self._recent is None:
            return None
        words = self._gather(rows, slots[rows])
        matches = (words.before == ANY_TOKEN) | (words.before == self._recent[words.slots])
        shifts = torch.where(matches.all(-1), self._negative_infinity, 0.0)
        return Exclusions(words.rows, words.last, shifts)

    def _gather(self, rows: Ints, slots: Ints) -> "_Gathered":
        """The bad words of `slots` [N], which are `rows` [N] of the batch. Steps repeat, so the
        last answer is kept until the rows change or a request is admitted."""
        key = rows.tobytes() + slots.tobytes()
        if self._gathered is None or self._gathered[:2] != (self._admissions, key):
            words = [self._words[int(slot)] for slot in slots]
            counts = [len(last) for _, last in words]
            index = self._to_device(np.stack((np.repeat(rows, counts), np.repeat(slots, counts))))
            before = torch.cat([before for before, _ in words])
            last = torch.cat([last for _, last in words])
            gathered = _Gathered(index[0], index[1], before, last)
            self._gathered = (self._admissions, key, gathered)
        return self._gathered[2]

    def max_excluded(self, slot: int) -> int:
        """See LogitConstraint."""
        return len(self._words[slot][1]) if self._has_words[slot] else 0

    def observe(self, slots: Ints, tokens: Tensor) -> None:
        """See LogitConstraint."""
        rows = np.flatnonzero(self._has_words[slots])
        if len(rows) and self._recent is not None:
            index = self._to_device(np.stack((rows, slots[rows])))
            kept = self._recent[index[1], 1:]
            self._recent[index[1]] = torch.cat((kept, tokens[index[0], None].int()), 1)


class _Gathered(NamedTuple):
    """For each of W bad words: its row in the batch, its slot, what must precede [W, HISTORY] and
    its last token."""

    rows: Tensor
    slots: Tensor
    before: Tensor
    last: Tensor


class MinTokensConstraint:
    """No end-of-sequence and no stop token before the least number of output tokens."""

    def __init__(
        self, slots: Slots, vocab_size: int, eos: tuple[int, ...], device: str, to_device: ToDevice
    ) -> None:
        self._slots = slots
        self._vocab_size = vocab_size
        self._eos = eos
        self._to_device = to_device
        self._ending_ids: dict[int, Tensor] = {}
        """By slot, int64 [E]; none where there is no minimum or nothing to exclude."""
        self._negative_infinity = torch.tensor(NEGATIVE_INFINITY, device=device)

    def admit(self, slot: int, sampling: Sampling | None) -> None:
        """See LogitConstraint."""
        self._ending_ids.pop(slot, None)
        if sampling is None or not sampling.min_tokens:
            return
        endings = (*self._eos, *sampling.stop_token_ids)
        ids = [token for token in endings if token < self._vocab_size]
        if ids:
            self._ending_ids[slot] = self._to_device(np.array(ids, np.int64))

    def touches(self, slots: Ints) -> Bools:
        """See LogitConstraint. From the columns alone, since every step asks."""
        return self._slots.num_output_tokens(slots) < self._slots.min_tokens[slots]

    def apply(self, logits: Tensor, slots: Ints) -> Exclusions | None:
        """See LogitConstraint."""
        early = np.flatnonzero(self.touches(slots)).tolist()
        rows = [row for row in early if int(slots[row]) in self._ending_ids]
        if not rows:
            return None
        ids = [self._ending_ids[int(slots[row])] for row in rows]
        counts = [len(part) for part in ids]
        index = self._to_device(np.repeat(np.array(rows, np.int64), counts))
        return Exclusions(index, torch.cat(ids), self._negative_infinity.expand(len(index)))

    def max_excluded(self, slot: int) -> int:
        """See LogitConstraint."""
        return len(self._ending_ids.get(slot, ()))

    def observe(self, slots: Ints, tokens: Tensor) -> None:
        """See LogitConstraint: the slots' columns count the tokens."""
