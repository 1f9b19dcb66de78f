"""Choosing the next token of every row of a step on the CPU. Knows logits and sampling parameters,
no slots and no messages.

The order of operations and the meaning of each parameter are those of vLLM's V1 engine:
log-probabilities are of the logits as the model gave them; then, on float32 logits, the logits
processors (step/logit_constraints.py) and the repetition, frequency and presence penalties; the
largest for greedy rows; for the others temperature, min-p, top-k, top-p and the draw, which is
`pagewire_kernels.cpu_sampling`'s and the same as on a GPU. A row's outcome is a function of its own
logits, parameters and tokens: nothing here depends on what else is in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pagewire_kernels import cpu_sampling
from pagewire_kernels.sampling_map import SamplingRows
from torch import Tensor

from ..step.logprobs import SampledLogprobs, token_logprobs


@dataclass
class Rows:
    """Sampling parameters of R rows. presence, frequency, repetition: float32 [R]. logprobs [R]:
    how many of the most likely tokens are reported beside the sampled one; -1: not even that.
    history: (prompt, output) int64 ids of each row that has penalties. constrain: changes float32
    logits [R, V] in place."""

    sampling: SamplingRows
    presence: Tensor
    frequency: Tensor
    repetition: Tensor
    logprobs: npt.NDArray[np.int64]
    history: dict[int, tuple[Tensor, Tensor]]
    constrain: Callable[[Tensor], None] | None = None


@dataclass
class Sampled:
    """tokens [R] int32; bad [R] uint8, 1 where a row's logits were not all finite: its token means
    nothing."""

    tokens: npt.NDArray[np.int32]
    bad: npt.NDArray[np.uint8]
    logprobs: SampledLogprobs | None = None


def greedy(logits: Tensor) -> Sampled:
    """The fast path: logits [R, V] of any float type, the largest of each row and nothing else."""
    tokens = logits.max(-1).indices
    return Sampled(tokens.numpy(force=True).astype(np.int32), not_finite(logits))


def not_finite(logits: Tensor) -> npt.NDArray[np.uint8]:
    """[R], 1 for each row of logits [R, V] with an entry that is infinite or NaN.

    A sum is finite only if its terms are; one pass, where isfinite takes two and a temporary."""
    return (~torch.isfinite(logits.sum(-1, dtype=torch.float32))).numpy(force=True).astype(np.uint8)


def sample(logits: Tensor, rows: Rows) -> Sampled:
    """The next token of each row of logits [R, V] of any float type."""
    bad = not_finite(logits)
    raw = logits.float()
    if bad.any():
        raw = torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0)
    x = raw.clone()
    if rows.constrain is not None:
        rows.constrain(x)
    penalize(x, rows)
    tokens = cpu_sampling.sample(x, rows.sampling)
    return Sampled(
        tokens.numpy(force=True).astype(np.int32), bad, _logprobs(raw, tokens, rows.logprobs)
    )


def penalize(x: Tensor, rows: Rows) -> None:
    """x [R, V] float32, in place. Repetition divides positive and multiplies negative logits of
    tokens in prompt or output; presence and frequency subtract for tokens of the output alone."""
    size = x.shape[1]
    for row, (prompt, output) in rows.history.items():
        counts = torch.bincount(output, minlength=size)
        seen = (counts > 0) | (torch.bincount(prompt, minlength=size) > 0)
        scaled = torch.where(
            x[row] > 0, x[row] / rows.repetition[row], x[row] * rows.repetition[row]
        )
        x[row] = (
            torch.where(seen, scaled, x[row])
            - rows.frequency[row] * counts
            - rows.presence[row] * (counts > 0)
        )


def _logprobs(raw: Tensor, tokens: Tensor, wanted: npt.NDArray[np.int64]) -> SampledLogprobs | None:
    rows = np.flatnonzero(wanted >= 0)
    if not len(rows):
        return None
    index = torch.from_numpy(rows).to(raw.device)
    logprobs = token_logprobs(raw[index], tokens[index], int(wanted[rows].max()))
    return SampledLogprobs(rows, wanted[rows], logprobs.to_host())
