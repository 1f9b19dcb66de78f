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

from .slots import Ints, Slots

PROMPT_LOGITS: Final = 1 << 24
"""Logits of prompt tokens that exist at a time."""
PIECE: Final = 16
"""Rows are padded to a multiple of this: a GPU's kernels are compiled for few shapes."""
Up = Callable[[npt.NDArray[np.generic]], Tensor]
"""Brings an array to the device."""


@dataclass
class Scores:
    """N tokens. own float32 [N]; ranks int32 [N] from 1; ids int32, values float32 [N, K]: the most
    likely ones, falling."""

    own: Tensor
    ranks: Tensor
    ids: Tensor
    values: Tensor

    def first(self, count: int) -> "Scores":
        return Scores(self.own[:count], self.ranks[:count], self.ids[:count], self.values[:count])

    def down(self) -> "Scores":
        """On the host; from a GPU by copies that are queued, not waited for."""
        return Scores(*(_down(part) for part in (self.own, self.ranks, self.ids, self.values)))

    def columns(
        self, tokens: npt.NDArray[np.int32], wanted: Ints
    ) -> tuple[bytes, bytes, bytes, bytes]:
        """counts, ranks, ids and values for the wire, from host memory: each token with its
        wanted[i] most likely ones."""
        ids = np.concatenate((tokens[:, None], self.ids.numpy()), 1)
        values = np.concatenate((self.own.numpy()[:, None], self.values.numpy()), 1)
        counts = (np.minimum(wanted, self.ids.shape[1]) + 1).astype(np.int32)
        kept = np.arange(ids.shape[1]) < counts[:, None]
        return (
            counts.tobytes(),
            self.ranks.numpy().tobytes(),
            ids[kept].astype(np.int32).tobytes(),
            values[kept].tobytes(),
        )


def _down(tensor: Tensor) -> Tensor:
    return (
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
            tensor, non_blocking=True
        )
        if tensor.is_cuda
        else tensor
    )


def score(logits: Tensor, tokens: Tensor, top: int) -> Scores:
    """logits [N, V] of any float type; tokens [N] int64; top: K, or less in a small vocabulary. K
    is at least 1."""
    x = logits.float()
    norm = torch.logsumexp(x, -1, keepdim=True)
    mine = x.gather(1, tokens[:, None])
    ranks = (x > mine).sum(-1, dtype=torch.int32) + 1
    best = torch.topk(x, max(1, min(top, x.shape[1])), sorted=True)
    return Scores((mine - norm)[:, 0], ranks, best.indices.int(), best.values - norm)


@dataclass
class SampledScores:
    """rows [N] of a step whose log-probabilities are wanted: wanted[i] most likely ones beside the
    sampled token of rows[i]."""

    rows: Ints
    wanted: Ints
    scores: Scores

    def columns(self, tokens: npt.NDArray[np.int32]) -> LogprobColumns:
        """tokens: those of all rows of the step; below 0 where the logits were not finite."""
        own = np.maximum(tokens[self.rows], 0)
        return LogprobColumns(
            self.rows.astype(np.int32).tobytes(), *self.scores.columns(own, self.wanted)
        )


class PromptRun(NamedTuple):
    """A step's tokens whose logits tell of the prompt of `slot`: token i of the step's tokens from
    `at` on precedes `tokens[i]`, which is prompt token `first` + i."""

    slot: int
    at: int
    first: int
    tokens: npt.NDArray[np.int32]
    wanted: int


def prompt_runs(slots: Slots, run: Ints, first: Ints, end: Ints) -> list[PromptRun]:
    """For the step that computes the positions first[i]..end[i] of slot run[i], in this order."""
    asked = np.flatnonzero((slots.prompt_logprobs[run] >= 0) & (first < slots.prompt[run] - 1))
    starts = np.cumsum(end - first) - (end - first)
    found: list[PromptRun] = []
    for i in asked.tolist():
        slot = int(run[i])
        begin, stop = int(first[i]) + 1, min(int(end[i]) + 1, int(slots.prompt[slot]))
        found.append(
            PromptRun(
                slot,
                int(starts[i]),
                begin,
                slots.tokens[slot, begin:stop].copy(),
                int(slots.prompt_logprobs[slot]),
            )
        )
    return found


@dataclass
class PromptScores:
    run: PromptRun
    scores: list[Scores]

    def message(self) -> PromptLogprobs:
        run = self.run
        parts = [
            torch.cat([getattr(scores, name) for scores in self.scores])
            for name in ("own", "ranks", "ids", "values")
        ]
        return PromptLogprobs(
            Slot(run.slot),
            run.first,
            *Scores(*parts).columns(run.tokens, np.full(len(run.tokens), run.wanted, np.int64)),
        )


def score_prompts(
    runs: list[PromptRun], logits_of: Callable[[Tensor], Tensor], vocab_size: int, up: Up
) -> list[PromptScores]:
    """logits_of(rows [N] int64) -> [N, V], called for few rows at a time. The scores are on their
    way to the host."""
    size = max(PIECE, PROMPT_LOGITS // vocab_size // PIECE * PIECE)
    scored: list[PromptScores] = []
    for run in runs:
        parts: list[Scores] = []
        for start in range(0, len(run.tokens), size):
            tokens = run.tokens[start : start + size].astype(np.int64)
            rows = np.stack((np.arange(len(tokens)) + run.at + start, tokens))
            picked = up(np.pad(rows, ((0, 0), (0, -len(tokens) % PIECE)), "edge"))
            parts.append(
                score(logits_of(picked[0]), picked[1], run.wanted).first(len(tokens)).down()
            )
        scored.append(PromptScores(run, parts))
    return scored
