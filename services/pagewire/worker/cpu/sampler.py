"""Choosing the next token of every row of a step. Knows logits and sampling parameters, no slots
and no messages.

The order of operations and the meaning of each parameter are those of vLLM's V1 engine:
log-probabilities are of the logits as the model gave them; then, on float32 logits, allowed ids,
bad words, endings before min_tokens, biases (these four are `limits.py`'s), repetition, frequency
and presence penalties; the largest for greedy rows; for the others temperature, min-p, top-k, top-p
and the draw. A row's outcome is a function of its own logits, parameters and tokens: nothing here
depends on what else is in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..step.logprobs import SampledScores, score
from ..step.philox import uniform

CANDIDATES: Final = 1024
"""How many of the most likely tokens are looked at before a whole row is sorted."""
TILE: Final = 256
"""Probabilities are summed by tiles first; the draw then looks into one tile."""


@dataclass
class Rows:
    """Sampling parameters, a row each: float32 or int64 tensors [R]. temperature 0 is greedy, top_k
    0 is off. positions: output tokens so far. history: (prompt, output) int64 ids of each row that
    has penalties. restrict: changes float32 logits [R, V] in place."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor
    seeds: Tensor
    positions: Tensor
    logprobs: npt.NDArray[np.int64]
    history: dict[int, tuple[Tensor, Tensor]]
    restrict: Callable[[Tensor], None] | None = None


@dataclass
class Sampled:
    """tokens [R] int32; bad [R] uint8, 1 where a row's logits were not all finite: its token means
    nothing."""

    tokens: npt.NDArray[np.int32]
    bad: npt.NDArray[np.uint8]
    logprobs: SampledScores | None = None


def greedy(logits: Tensor) -> Sampled:
    """The fast path: logits [R, V] of any float type, the largest of each row and nothing else."""
    tokens = logits.max(-1).indices
    return Sampled(tokens.numpy(force=True).astype(np.int32), not_finite(logits))


def not_finite(logits: Tensor) -> npt.NDArray[np.uint8]:
    """A sum is finite only if its terms are; one pass, where isfinite takes two and a temporary."""
    return (~torch.isfinite(logits.sum(-1, dtype=torch.float32))).numpy(force=True).astype(np.uint8)


def sample(logits: Tensor, rows: Rows) -> Sampled:
    """logits [R, V] of any float type."""
    bad = not_finite(logits)
    raw = logits.float()
    if bad.any():
        raw = torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0)
    x = raw.clone()
    if rows.restrict is not None:
        rows.restrict(x)
    penalize(x, rows)
    tokens = x.argmax(-1)
    drawn = torch.nonzero(rows.temperature > 0).flatten()
    if len(drawn):
        tokens[drawn] = _draw(x[drawn], rows, drawn)
    return Sampled(
        tokens.numpy(force=True).astype(np.int32), bad, _logprobs(raw, tokens, rows.logprobs)
    )


def penalize(x: Tensor, rows: Rows) -> None:
    """In place. Repetition divides positive and multiplies negative logits of tokens in prompt or
    output; presence and frequency subtract for tokens of the output alone."""
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


def _draw(x: Tensor, rows: Rows, index: Tensor) -> Tensor:
    """One token for each row of x [R, V], which are the rows `index` of `rows`."""
    x = x / rows.temperature[index, None]
    peak = x.amax(-1, keepdim=True)
    x = filtered(x, peak, rows.top_k[index], rows.top_p[index], rows.min_p[index])
    weights = torch.exp(x - peak)
    return invert(weights, uniform(rows.seeds[index], rows.positions[index]))


def filtered(x: Tensor, peak: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """x [R, V] with -inf where min-p, then top-k, then top-p exclude a token. Filters are
    thresholds: tokens that tie with the last one kept are kept too, so that no order of equal
    logits matters."""
    size = x.shape[1]
    floor = torch.full_like(peak, float("-inf"))
    if (min_p > 0).any():
        floor = torch.where(min_p[:, None] > 0, peak + torch.log(min_p)[:, None], floor)
    limited = torch.nonzero((top_k > 0) & (top_k < size)).flatten()
    if len(limited):
        k = top_k[limited]
        best = torch.topk(x[limited], int(k.max()), sorted=True).values
        floor[limited] = torch.maximum(floor[limited], best.gather(1, k[:, None] - 1))
    if (min_p > 0).any() or len(limited):
        x = torch.where(x < floor, float("-inf"), x)
    nucleus = torch.nonzero(top_p < 1).flatten()
    if not len(nucleus):
        return x
    floor = torch.full_like(peak, float("-inf"))
    floor[nucleus] = _nucleus_floor(x[nucleus], peak[nucleus], top_p[nucleus])
    return torch.where(x < floor, float("-inf"), x)


def _nucleus_floor(x: Tensor, peak: Tensor, top_p: Tensor) -> Tensor:
    """[R, 1]: the smallest logit of the fewest most likely tokens that have `top_p` of the
    probability."""
    wanted = top_p.double()[:, None] * _total(torch.exp(x - peak))
    floor, found = _reach(
        torch.topk(x, min(CANDIDATES, x.shape[1]), sorted=True).values, peak, wanted
    )
    rest = torch.nonzero(~found).flatten()
    if len(rest):
        floor[rest], _ = _reach(
            torch.sort(x[rest], descending=True).values, peak[rest], wanted[rest]
        )
    return floor


def _reach(best: Tensor, peak: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """best [R, K] falling: (the logit [R, 1] at which the running sum reaches `wanted`, or the
    last; whether it does [R])."""
    running = torch.exp(best - peak).double().cumsum(-1)
    below = (running < wanted).sum(-1, keepdim=True)
    return best.gather(1, below.clamp(max=best.shape[1] - 1)), below[:, 0] < best.shape[1]


def _tiles(weights: Tensor) -> Tensor:
    """[R, V] -> [R, tiles, TILE], zeros at the end."""
    missing = -weights.shape[1] % TILE
    padded = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    return padded.view(len(weights), -1, TILE)


def _total(weights: Tensor) -> Tensor:
    return _tiles(weights).sum(-1, dtype=torch.float64).sum(-1, keepdim=True)


def invert(weights: Tensor, draws: Tensor) -> Tensor:
    """The inverse of the cumulative distribution in the order of token ids: weights [R, V] float32,
    not negative, need not sum to one; draws [R] float64 in [0, 1). Sums are float64. A token of
    weight 0 is never drawn."""
    tiles = _tiles(weights)
    sums = tiles.sum(-1, dtype=torch.float64)
    running = sums.cumsum(-1)
    target = draws[:, None] * running[:, -1:]
    tile = _first_above(running, target)
    before = (running - sums).gather(1, tile)
    inside = tiles.gather(1, tile[:, :, None].expand(-1, 1, TILE))[:, 0].double().cumsum(-1)
    return (tile * TILE + _first_above(inside, target - before)).flatten()


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """The first index whose running sum exceeds `target` [R, 1], or the last that adds anything."""
    last = (running < running[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum((running <= target).sum(-1, keepdim=True), last)


def _logprobs(raw: Tensor, tokens: Tensor, wanted: npt.NDArray[np.int64]) -> SampledScores | None:
    rows = np.flatnonzero(wanted >= 0)
    if not len(rows):
        return None
    index = torch.from_numpy(rows).to(raw.device)
    return SampledScores(
        rows, wanted[rows], score(raw[index], tokens[index], int(wanted[rows].max())).down()
    )
