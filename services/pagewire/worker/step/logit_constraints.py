"""What restricts the tokens of a slot, beyond penalties: allowed ids, biases, bad words, endings
before the least number of tokens.

Each slot's lists are brought to the device once, when it is admitted; a step then runs a few
operations over the rows that have any. The last output tokens are remembered on the device as well,
since bad words must be compared with tokens that the host does not know yet. Plain torch on any
device, and nothing here waits for the device.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from pagewire_protocol.sampling import MAX_BAD_WORD_TOKENS
from torch import Tensor

from .logprobs import Up
from .slots import Ints, Slots

BEFORE: Final = MAX_BAD_WORD_TOKENS - 1
"""Output tokens remembered: those before the last one of the longest bad word."""
ANY: Final = -1
NONE: Final = -2
Bools = npt.NDArray[np.bool_]


class Limits:
    """`apply` each time before rows are sampled, `said` with what was sampled."""

    def __init__(
        self, slots: Slots, vocab_size: int, eos: tuple[int, ...], device: str, up: Up
    ) -> None:
        self._slots, self._vocab, self._eos, self._device, self._up = (
            slots,
            vocab_size,
            eos,
            device,
            up,
        )
        self._shift = torch.zeros((0, vocab_size), device=device)
        """Added to the logits of a slot: biases, -inf where a token is not allowed. Row
        `_place[slot]`."""
        self._place = np.full(slots.count, -1, np.int64)
        self._worded, self._tight = np.zeros(slots.count, bool), np.zeros(slots.count, bool)
        """Slots with bad words; slots whose bans might leave nothing."""
        self._words: dict[int, tuple[Tensor, Tensor]] = {}
        """By slot: what must precede [W, BEFORE], aligned to the end, ANY before its beginning; the
        last tokens [W] int64."""
        self._endings: dict[int, Tensor] = {}
        self._recent: Tensor | None = None
        """The last output tokens of each slot [slots, BEFORE], the newest at the end; NONE where
        there was none."""
        self._minus_inf = torch.tensor(float("-inf"), device=device)
        self._gathered: tuple[bytes, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None

    def admit(self, new: Ints) -> None:
        """The slots `new` hold new requests."""
        self._gathered = None
        for slot in new.tolist():
            self._words.pop(slot, None)
            self._endings.pop(slot, None)
            given = self._slots.limits[slot]
            banned = 0
            if given is not None and given.min_tokens:
                ids = [
                    token for token in (*self._eos, *given.stop_token_ids) if token < self._vocab
                ]
                self._endings[slot], banned = self._up(np.array(ids, np.int64)), len(ids)
            words = given.bad_words if given is not None else ()
            self._worded[slot] = bool(words)
            if words:
                self._add_words(slot, words)
            allowed = (
                np.frombuffer(given.allowed_ids, np.int32)
                if given is not None
                else np.zeros(0, np.int32)
            )
            self._tight[slot] = len(allowed) or banned + len(words) >= self._vocab
            self._set_shift(slot, allowed)

    def _set_shift(self, slot: int, allowed: npt.NDArray[np.int32]) -> None:
        given = self._slots.limits[slot]
        if given is None or not (len(allowed) or given.bias_ids):
            self._place[slot] = -1
            return
        row = self._row(slot)
        row.fill_(float("-inf") if len(allowed) else 0.0)
        if len(allowed):
            row.index_fill_(0, self._up(allowed.astype(np.int64)), 0.0)
        if given.bias_ids:
            ids, values = (
                np.frombuffer(given.bias_ids, np.int32).astype(np.int64),
                np.frombuffer(given.bias_values, np.float32),
            )
            row.index_add_(0, self._up(ids), self._up(values.copy()))

    def _row(self, slot: int) -> Tensor:
        """A row of `_shift` for the slot; there are more when needed."""
        if self._place[slot] < 0:
            free = np.setdiff1d(np.arange(len(self._shift)), self._place)
            if not len(free):
                free = np.array([len(self._shift)])
                more = min(max(4, len(self._shift)), self._slots.count - len(self._shift))
                self._shift = torch.cat(
                    (self._shift, torch.zeros((more, self._vocab), device=self._device))
                )
            self._place[slot] = free[0]
        return self._shift[int(self._place[slot])]

    def _add_words(self, slot: int, words: tuple[bytes, ...]) -> None:
        tokens = [np.frombuffer(word, np.int32) for word in words]
        before = np.full((len(tokens), BEFORE), ANY, np.int32)
        for i, word in enumerate(tokens):
            before[i, BEFORE - len(word) + 1 :] = word[:-1]
        self._words[slot] = (
            self._up(before),
            self._up(np.array([word[-1] for word in tokens], np.int64)),
        )
        if self._recent is None:
            self._recent = torch.full(
                (self._slots.count, BEFORE), NONE, dtype=torch.int32, device=self._device
            )
        known, prompt = int(self._slots.known[slot]), int(self._slots.prompt[slot])
        said = self._slots.tokens[slot, max(prompt, known - BEFORE) : known]
        recent = np.full(BEFORE, NONE, np.int32)
        recent[BEFORE - len(said) :] = said
        self._recent[slot].copy_(self._up(recent))

    def any(self, slots: Ints) -> Bools:
        """Which of the slots are under a limit with the next token."""
        return self._early(slots) | self._worded[slots] | (self._place[slots] >= 0)

    def _early(self, slots: Ints) -> Bools:
        columns = self._slots
        return columns.known[slots] - columns.prompt[slots] < columns.min_tokens[slots]

    def apply(self, x: Tensor, slots: Ints) -> None:
        """x [R, V] float32, in place; the rows belong to `slots`. In vLLM's order: allowed ids, bad
        words, endings, biases.

        Where bad words and endings would leave no token at all, the row is left without them:
        something must be sampled."""
        moved = np.flatnonzero(self._place[slots] >= 0)
        if len(moved):
            at = self._up(np.stack((moved, self._place[slots[moved]])))
            x.index_add_(0, at[0], self._shift[at[1]])
        banned = self._banned(slots)
        if banned is None:
            return
        row, token, weight = banned
        before = x[row, token]
        x.index_put_((row, token), weight, accumulate=True)
        if (self._tight[slots] & (self._early(slots) | self._worded[slots])).any():
            nothing = x.amax(-1) == self._minus_inf
            x.index_put_((row, token), torch.where(nothing[row], before, x[row, token]))

    def _banned(self, slots: Ints) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows [N] and tokens [N] that bad words and endings concern, and what is to be added to
        their logits [N]: -inf or 0."""
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        rows = np.flatnonzero(self._worded[slots])
        if len(rows) and self._recent is not None:
            place, owner, before, last = self._gather(rows, slots[rows])
            met = ((before == ANY) | (before == self._recent[owner])).all(-1)
            parts.append((place, last, torch.where(met, self._minus_inf, 0.0)))
        rows = np.array(
            [
                row
                for row in np.flatnonzero(self._early(slots)).tolist()
                if len(self._endings[int(slots[row])])
            ],
            np.int64,
        )
        if len(rows):
            ids = [self._endings[int(slot)] for slot in slots[rows]]
            place = self._up(np.repeat(rows, [len(part) for part in ids]))
            parts.append((place, torch.cat(ids), self._minus_inf.expand(len(place))))
        if len(parts) < 2:
            return parts[0] if parts else None
        place, token, weight = (torch.cat(part) for part in zip(*parts, strict=True))
        return place, token, weight

    def _gather(self, rows: Ints, slots: Ints) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each bad word of the slots: its row in the batch, its slot, what must precede and its
        last token. Steps repeat, so the last answer is kept."""
        key = rows.tobytes() + slots.tobytes()
        if self._gathered is None or self._gathered[0] != key:
            words = [self._words[int(slot)] for slot in slots]
            counts = [len(last) for _, last in words]
            index = self._up(np.stack((np.repeat(rows, counts), np.repeat(slots, counts))))
            self._gathered = (
                key,
                (
                    index[0],
                    index[1],
                    torch.cat([w[0] for w in words]),
                    torch.cat([w[1] for w in words]),
                ),
            )
        return self._gathered[1]

    def said(self, slots: Ints, tokens: Tensor) -> None:
        """tokens [R] int32 were sampled for `slots`."""
        rows = np.flatnonzero(self._worded[slots])
        if len(rows) and self._recent is not None:
            at = self._up(np.stack((rows, slots[rows])))
            self._recent[at[1]] = torch.cat((self._recent[at[1], 1:], tokens[at[0], None].int()), 1)
