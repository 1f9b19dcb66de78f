"""Rows that ask for more than the captured step does: penalties, forbidden endings, log-probabilities. They are sampled once more, eagerly,
from the step's logits, and the result replaces what the graph wrote. Batches without such rows pay one comparison of columns.

Output tokens are counted on the device, since the host learns them too late for the next step.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pagewire_kernels import cuda as ops
from pagewire_kernels.penalties import apply_penalties, count_tokens
from pagewire_kernels.slot_state import SlotState
from pagewire_protocol.messages import LogprobColumns
from torch import Tensor

from .setup import Loaded
from .slots import Ints, Slots
from .staging import Uploads


@dataclass
class Extra:
    """Log-probabilities on their way to pinned memory: rows [N] of the step; chosen [N], ranks [N], ids and values [N, K]; wanted [N]."""

    rows: npt.NDArray[np.int32]
    wanted: npt.NDArray[np.int64]
    chosen: Tensor
    ranks: Tensor
    ids: Tensor
    values: Tensor

    def columns(self, tokens: npt.NDArray[np.int32]) -> LogprobColumns:
        counts = (self.wanted + 1).astype(np.int32)
        ids, values = self.ids.numpy(), self.values.numpy()
        own = np.maximum(tokens[self.rows], 0)
        flat_ids = np.concatenate([np.append(own[i], ids[i, : counts[i] - 1]) for i in range(len(counts))]).astype(np.int32)
        flat = np.concatenate([np.append(self.chosen[i], values[i, : counts[i] - 1]) for i in range(len(counts))]).astype(np.float32)
        ranks = self.ranks.numpy().astype(np.int32)
        return LogprobColumns(self.rows.tobytes(), counts.tobytes(), ranks.tobytes(), flat_ids.tobytes(), flat.tobytes())


class SpecialRows:
    def __init__(self, loaded: Loaded, slots: Slots, state: SlotState, uploads: Uploads) -> None:
        self._loaded, self._slots, self._state, self._up = loaded, slots, state, uploads.up
        self.told = np.zeros(slots.count, np.int64)
        """Tokens of each slot that the host knows: those it was admitted with."""
        self._counts: Tensor | None = None
        self._prompted: Tensor | None = None

    def admit(self, new: Ints) -> None:
        self.told[new] = self._slots.known[new]
        penalized = new[self._penalized(new)]
        if len(penalized):
            self._count_history(penalized)

    def _penalized(self, slots: Ints) -> npt.NDArray[np.bool_]:
        columns = self._slots
        return (columns.presence[slots] != 0) | (columns.frequency[slots] != 0) | (columns.repetition[slots] != 1)

    def _count_history(self, new: Ints) -> None:
        if self._counts is None or self._prompted is None:
            shape = (self._slots.count, self._loaded.decoder.arch.vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device="cuda")
            self._prompted = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        for slot in new.tolist():
            prompt, known = int(self._slots.prompt[slot]), int(self._slots.known[slot])
            tokens = self._up(self._slots.tokens[slot, :known].astype(np.int64))
            self._counts[slot].copy_(torch.bincount(tokens[prompt:], minlength=self._counts.shape[1]))
            self._prompted[slot].zero_()
            self._prompted[slot, tokens[:prompt]] = 1

    def resample(self, logits: Tensor, slots: Ints, report: Tensor) -> Extra | None:
        """logits [R, V] and report [R] belong to the rows `slots`; the report and the slots' last tokens are overwritten where rows are
        special."""
        columns = self._slots
        penalized = self._penalized(slots)
        early = columns.known[slots] - columns.prompt[slots] < columns.min_tokens[slots]
        again = np.flatnonzero(penalized | early)
        if len(again):
            self._sample_again(logits, slots, again, report)
        if penalized.any() and self._counts is not None:
            counted = np.flatnonzero(penalized)
            count_tokens(self._counts, self._up(slots[counted].astype(np.int32)), report[self._up(counted)])
        wanted = np.flatnonzero(columns.logprobs[slots] >= 0)
        return self._logprobs(logits, report, wanted, columns.logprobs[slots[wanted]]) if len(wanted) else None

    def _sample_again(self, logits: Tensor, slots: Ints, again: Ints, report: Tensor) -> None:
        columns, up, mine = self._slots, self._up, slots[again]
        index, places = up(again), up(mine)
        x = logits[index].float()
        if self._counts is not None and self._prompted is not None:
            penalties = up(np.stack((columns.presence[mine], columns.frequency[mine], columns.repetition[mine])).astype(np.float32))
            apply_penalties(x, self._counts, self._prompted, places, penalties[0], penalties[1], penalties[2])
        for i, slot in enumerate(mine.tolist()):
            if columns.known[slot] - columns.prompt[slot] < columns.min_tokens[slot]:
                x[i, up(np.array(self._endings(slot), np.int64))] = float("-inf")
        odds = up(np.stack((columns.temperature[mine], columns.top_p[mine], columns.min_p[mine])).astype(np.float32))
        rows = ops.SamplingRows(
            odds[0], up(columns.top_k[mine].astype(np.int32)), odds[1], odds[2], up(columns.seed[mine]), up(columns.known[mine] - 1)
        )
        sampled = ops.sample(x, rows)
        tokens = sampled.tokens.int()
        report[index] = torch.where(sampled.bad, -1, tokens)
        self._state.last_token[places] = tokens

    def _endings(self, slot: int) -> list[int]:
        size = self._loaded.decoder.arch.vocab_size
        return [token for token in (*self._loaded.eos_token_ids, *self._slots.stop_ids[slot]) if token < size]

    def _logprobs(self, logits: Tensor, report: Tensor, rows: Ints, wanted: Ints) -> Extra:
        index = self._up(rows)
        values = torch.log_softmax(logits[index].float(), -1)
        own = report[index].long().clamp(min=0)
        chosen = values.gather(1, own[:, None])
        ranks = (values > chosen).sum(-1) + 1
        best = torch.topk(values, max(1, int(wanted.max())), sorted=True)

        def down(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

        return Extra(rows.astype(np.int32), wanted, down(chosen[:, 0]), down(ranks), down(best.indices), down(best.values))
