"""What every sampler is given and gives back, whichever device it runs on."""

from dataclasses import dataclass

from torch import Tensor

GREEDY_BELOW = 1e-5
"""A temperature under this takes the largest logit."""


@dataclass
class SamplingRows:
    """The sampling parameters of B rows of logits, one entry a row: temperature (0: greedy), top_p
    (1: off), min_p (0: off) float32; top_k (0: off) int32; seeds, positions int64.

    A position is the index in its sequence (prompt and output) of the token whose logits the row
    holds."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    filtered: bool = True
    """False when no row restricts the vocabulary: the search for thresholds is not launched."""

    def at(self, index: Tensor) -> "SamplingRows":
        """The rows `index` [N] int64."""
        return SamplingRows(
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            self.min_p[index],
            self.seeds[index],
            self.positions[index],
            self.filtered,
        )


@dataclass
class Sampled:
    """tokens int64 [B]; logprobs float32 [B] of them under the softmax of the logits as given; bad
    bool [B]: the row holds a NaN."""

    tokens: Tensor
    logprobs: Tensor
    bad: Tensor
