"""The random map of sampling: which scalars a row of logits carries, and which token they give.

`sample` is the oracle, plain torch for any device, slow on purpose. The Triton kernels
(`sampling.py`, `filters.py`) and the CPU's sampler (`cpu_sampling.py`) are held to it. A new scalar
is a name, its neutral value and its index here, read in `filters.py`, in `cpu_sampling.thresholds`
and in `thresholds` below; whatever lies between a request and the kernels carries it unseen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .philox import WORDS, sampling_words

GREEDY_BELOW: Final = 1e-5
"""A temperature under this takes the largest logit."""

PARAMETERS: Final = ("temperature", "top_k", "top_p", "min_p")
"""The scalars that the kernels read, by the names of the fields of a request's `Sampling`. They
travel together as float32, which holds every top_k under 2^24 exactly; a larger one than the
vocabulary restricts nothing."""
NEUTRAL: Final = (1.0, 0.0, 1.0, 0.0)
"""Their values that leave the model's distribution as it is."""
TEMPERATURE, TOP_K, TOP_P, MIN_P = range(len(PARAMETERS))


@dataclass
class SamplingRows:
    """The sampling parameters of B rows of logits. values: float32 [PARAMETERS, B], of which each
    row of the first dimension is contiguous; seeds, positions: int64 [B].

    A position is the index in its sequence (prompt and output) of the token whose logits the row
    holds."""

    values: Tensor
    seeds: Tensor
    positions: Tensor
    filtered: bool = True
    """False when no row restricts the vocabulary: the search for thresholds is not launched."""

    @classmethod
    def named(
        cls,
        seeds: Tensor,
        positions: Tensor,
        *,
        filtered: bool = True,
        **values: Tensor | Sequence[float],
    ) -> "SamplingRows":
        """From values [B] by the names of PARAMETERS; one that is not named is neutral."""
        rows = torch.tensor(NEUTRAL, device=seeds.device)[:, None].repeat(1, len(seeds))
        for name, value in values.items():
            rows[PARAMETERS.index(name)] = torch.as_tensor(value, device=seeds.device)
        return cls(rows, seeds, positions, filtered)

    @property
    def temperature(self) -> Tensor:
        """float32 [B]; under GREEDY_BELOW the row is greedy."""
        return self.values[TEMPERATURE]

    @property
    def top_k(self) -> Tensor:
        """float32 [B] of whole numbers; 0: off."""
        return self.values[TOP_K]

    @property
    def top_p(self) -> Tensor:
        """float32 [B]; 1: off."""
        return self.values[TOP_P]

    @property
    def min_p(self) -> Tensor:
        """float32 [B]; 0: off."""
        return self.values[MIN_P]

    def at(self, index: Tensor) -> "SamplingRows":
        """The rows `index` [N] int64."""
        return SamplingRows(
            self.values[:, index], self.seeds[index], self.positions[index], self.filtered
        )


@dataclass
class Sampled:
    """tokens int64 [B]; logprobs float32 [B] of them under the softmax of the logits as given; bad
    bool [B]: the row holds a NaN."""

    tokens: Tensor
    logprobs: Tensor
    bad: Tensor


def gumbel(words: Tensor) -> Tensor:
    """Gumbel noise float32 of random words (int64 under 2^32), of the same shape:
    -log(-log(1 - u)) with u = (word + 0.5) / 2^32 rounded to float32.

    Every operation is one of float32, as on a GPU. Below u = 0.01 the inner logarithm is a series,
    since 1 - u would round u away; above, 1 - u is held over 2^-25, since u may round to 1.
    """
    u = (words.to(torch.float32) + 0.5) * 2.0**-32
    series = u * (1.0 + u * (0.5 + u * (0.33333333 + u * 0.25)))
    wait = torch.where(u < 0.01, series, -torch.log((1.0 - u).clamp(min=2.98e-8)))
    return -torch.log(wait)


def thresholds(logits: Tensor, rows: SamplingRows) -> Tensor:
    """float32 [B]: the least logit that min-p, top-k and top-p leave to each row of logits [B, V];
    minus infinity where nothing restricts it.

    Min-p and top-k look at the whole distribution, top-p at what they left, renormalised. Tokens
    equal to the last one kept are kept too.
    """
    floors: list[float] = []
    for i, x in enumerate(logits.double()):
        temperature = float(rows.temperature[i])
        k = int(rows.top_k[i])
        top_p = float(rows.top_p[i])
        min_p = float(rows.min_p[i])
        floor = float("-inf")
        if temperature >= GREEDY_BELOW:
            order = x.sort(descending=True).values
            if min_p > 0:
                floor = float(order[0]) + temperature * math.log(min_p)
            if 0 < k < len(x):
                floor = max(floor, float(order[k - 1]))
            if top_p < 1:
                shares = (order[order >= floor] / temperature).softmax(0).cumsum(0)
                floor = float(order[min(int((shares < top_p).sum()), len(shares) - 1)])
        floors.append(floor)
    return torch.tensor(floors, dtype=torch.float32, device=logits.device)


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The next token of each row of logits [B, V], int64 [B]: the random map of sampling.

    Greedy rows take the largest logit. In the others, the tokens at or above the row's threshold
    get noise (`gumbel` of the word of their id, `philox.sampling_words`), and the largest sum of
    logit / temperature and noise wins: that draws from their softmax. Among equals the lowest id
    wins.
    """
    width = logits.shape[1]
    groups = np.arange(-(-width // WORDS))
    floors = thresholds(logits, rows)
    tokens: list[Tensor] = []
    for i, x in enumerate(logits.float()):
        if rows.temperature[i] >= GREEDY_BELOW:
            seeds = np.full_like(groups, int(rows.seeds[i]))
            positions = np.full_like(groups, int(rows.positions[i]))
            words = torch.from_numpy(sampling_words(seeds, positions, groups)).to(x.device)
            noise = gumbel(words).flatten()[:width]
            x = torch.where(x >= floors[i], x * (1.0 / rows.temperature[i]) + noise, float("-inf"))
        tokens.append(x.argmax())
    return torch.stack(tokens)
