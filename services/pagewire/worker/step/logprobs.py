"""Log-probabilities of given tokens under the model's logits, beside the most likely ones: of
sampled tokens and of a prompt's own.

From the logits as the model gave them, before any parameter. Plain torch on any device; nothing
waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pagewire_protocol.columns import Slot
from pagewire_protocol.messages import LogprobColumns, PromptLogprobs
from torch import Tensor

from .slots import Bools, Ints, Slots

PROMPT_LOGITS: Final = 1 << 24
"""Logits of prompt tokens that exist at a time."""
ROW_MULTIPLE: Final = 16
"""Rows are padded to a multiple of this: a GPU's kernels are compiled for few shapes."""
ToDevice = Callable[[npt.NDArray[np.generic]], Tensor]
"""Brings an array to the device."""


@dataclass
class LogprobTensors:
    """Of N tokens. own float32 [N]: their log-probabilities; ranks int32 [N], from 1; ids int32,
    values float32 [N, K]: the most likely tokens, falling."""

    own: Tensor
    ranks: Tensor
    ids: Tensor
    values: Tensor

    def first(self, count: int) -> "LogprobTensors":
        """Those of the first `count` tokens."""
        return LogprobTensors(
            self.own[:count], self.ranks[:count], self.ids[:count], self.values[:count]
        )

    def only(self, kept: Bools) -> "LogprobTensors":
        """Those of the tokens for which `kept` [N] holds, from host memory."""
        index = torch.from_numpy(kept)
        return LogprobTensors(
            self.own[index], self.ranks[index], self.ids[index], self.values[index]
        )

    def to_host(self) -> "LogprobTensors":
        """On the host; from a GPU by copies that are queued, not waited for."""
        return LogprobTensors(
            *(_to_host(part) for part in (self.own, self.ranks, self.ids, self.values))
        )

    def columns(
        self, tokens: npt.NDArray[np.int32], num_logprobs: Ints
    ) -> tuple[bytes, bytes, bytes, bytes]:
        """counts, ranks, ids and values for the wire, from host memory: each token with its
        num_logprobs[i] most likely ones."""
        ids = np.concatenate((tokens[:, None], self.ids.numpy()), 1)
        values = np.concatenate((self.own.numpy()[:, None], self.values.numpy()), 1)
        counts = (np.minimum(num_logprobs, self.ids.shape[1]) + 1).astype(np.int32)
        kept = np.arange(ids.shape[1]) < counts[:, None]
        return (
            counts.tobytes(),
            self.ranks.numpy().tobytes(),
            ids[kept].astype(np.int32).tobytes(),
            values[kept].tobytes(),
        )


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def token_logprobs(logits: Tensor, tokens: Tensor, top: int) -> LogprobTensors:
    """Of tokens [N] int64 under logits [N, V] of any float type. top: K, or less in a small
    vocabulary; K is at least 1."""
    x = logits.float()
    norm = torch.logsumexp(x, -1, keepdim=True)
    own = x.gather(1, tokens[:, None])
    ranks = (x > own).sum(-1, dtype=torch.int32) + 1
    best = torch.topk(x, max(1, min(top, x.shape[1])), sorted=True)
    return LogprobTensors((own - norm)[:, 0], ranks, best.indices.int(), best.values - norm)


@dataclass
class SampledLogprobs:
    """rows [N] of a step that ask for log-probabilities: num_logprobs[i] most likely ones beside
    the sampled token of rows[i]."""

    rows: Ints
    num_logprobs: Ints
    logprobs: LogprobTensors

    def of_ready(self, ready: Bools) -> "SampledLogprobs | None":
        """Without the rows of the step that turned out to have no token; `ready` [all rows]: which
        have one. None: nothing is left. From host memory."""
        kept = ready[self.rows]
        if not kept.any():
            return None
        return SampledLogprobs(self.rows[kept], self.num_logprobs[kept], self.logprobs.only(kept))

    def columns(self, tokens: npt.NDArray[np.int32]) -> LogprobColumns:
        """tokens: those of all rows of the step; below 0 where the logits were not finite."""
        own = np.maximum(tokens[self.rows], 0)
        return LogprobColumns(
            self.rows.astype(np.int32).tobytes(), *self.logprobs.columns(own, self.num_logprobs)
        )


class PromptSpan(NamedTuple):
    """Consecutive prompt tokens of `slot` whose log-probabilities a step gives: `tokens`, the first
    of which is at position `first`. The logits for tokens[i] are those of the step's token
    `step_index` + i, which precedes it."""

    slot: int
    step_index: int
    first: int
    tokens: npt.NDArray[np.int32]
    num_logprobs: int


def prompt_spans(slots: Slots, run: Ints, first: Ints, end: Ints) -> list[PromptSpan]:
    """Those of a step that computes the positions first[i] to end[i] of slot run[i], in this order.
    Empty where nobody asked for log-probabilities of these."""
    prompt_len = slots.num_prompt_tokens[run]
    asked = np.flatnonzero((slots.prompt_logprobs[run] >= 0) & (first < prompt_len - 1))
    starts = np.cumsum(end - first) - (end - first)
    spans: list[PromptSpan] = []
    for row in asked.tolist():
        slot = int(run[row])
        # Position p gives the logits of token p + 1; behind the prompt there are none to report.
        begin = int(first[row]) + 1
        stop = min(int(end[row]) + 1, int(prompt_len[row]))
        tokens = slots.tokens[slot, begin:stop].copy()
        num_logprobs = int(slots.prompt_logprobs[slot])
        spans.append(PromptSpan(slot, int(starts[row]), begin, tokens, num_logprobs))
    return spans


@dataclass
class SpanLogprobs:
    """A span's log-probabilities in pieces, on their way to the host."""

    span: PromptSpan
    pieces: list[LogprobTensors]

    def message(self) -> PromptLogprobs:
        """For the scheduler; the pieces must have arrived."""
        span = self.span
        whole = LogprobTensors(
            *(
                torch.cat([getattr(piece, name) for piece in self.pieces])
                for name in ("own", "ranks", "ids", "values")
            )
        )
        num_logprobs = np.full(len(span.tokens), span.num_logprobs, np.int64)
        return PromptLogprobs(
            Slot(span.slot), span.first, *whole.columns(span.tokens, num_logprobs)
        )


def prompt_logprobs(
    spans: list[PromptSpan],
    logits_of: Callable[[Tensor], Tensor],
    vocab_size: int,
    to_device: ToDevice,
) -> list[SpanLogprobs]:
    """logits_of(indices of the step's tokens [N] int64) -> [N, V], called for few tokens at a time.
    The results are on their way to the host."""
    piece_len = max(ROW_MULTIPLE, PROMPT_LOGITS // vocab_size // ROW_MULTIPLE * ROW_MULTIPLE)
    results: list[SpanLogprobs] = []
    for span in spans:
        pieces: list[LogprobTensors] = []
        for start in range(0, len(span.tokens), piece_len):
            tokens = span.tokens[start : start + piece_len].astype(np.int64)
            indices = np.arange(len(tokens)) + span.step_index + start
            padding = -len(tokens) % ROW_MULTIPLE
            both = to_device(np.pad(np.stack((indices, tokens)), ((0, 0), (0, padding)), "edge"))
            logprobs = token_logprobs(logits_of(both[0]), both[1], span.num_logprobs)
            pieces.append(logprobs.first(len(tokens)).to_host())
        results.append(SpanLogprobs(span, pieces))
    return results
