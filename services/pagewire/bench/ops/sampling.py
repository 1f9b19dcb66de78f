"""Drawing a token from each row of logits, greedily, at random, and from the most probable ones."""

from typing import Any

import torch
from pagewire_kernels.sampling import SamplingRows, sample, thresholds

from . import inputs
from .case import Case, Job
from .inputs import rand

KINDS = ("greedy", "random", "top-p", "top-k+top-p")
TOP_K, TOP_P, TEMPERATURE = 50, 0.9, 0.7


class Sample(Case):
    def __init__(self, rows: int, kind: str, width: int) -> None:
        self._kind = kind
        self._logits = rand(rows, width) * 3
        self._temperature = 0.0 if kind == "greedy" else TEMPERATURE
        self._k = TOP_K if kind == "top-k+top-p" else 0
        self._p = TOP_P if kind.startswith("top") else 1.0
        self._args = SamplingRows.named(
            seeds=torch.full((rows,), 3, device=inputs.DEVICE),
            positions=torch.arange(rows, device=inputs.DEVICE),
            filtered=kind.startswith("top"),
            temperature=[self._temperature] * rows,
            top_k=[self._k] * rows,
            top_p=[self._p] * rows,
        )

    def launch(self, i: int, config: Any = None) -> Any:
        return sample(self._logits, self._args)

    def check(self, config: Any = None) -> float:
        logits = self._logits
        sampled = self.launch(0)
        logp = torch.log_softmax(logits.float(), -1)
        worst = (
            (sampled.logprobs - logp.gather(1, sampled.tokens[:, None])[:, 0]).abs().max().item()
        )
        if self._kind == "greedy" and not torch.equal(
            logits.gather(1, sampled.tokens[:, None])[:, 0], logits.max(-1).values
        ):
            return float("nan")
        return (
            worst
            if not self._kind.startswith("top") or self._cuts_where_it_should()
            else float("nan")
        )

    def _cuts_where_it_should(self) -> bool:
        """None of the most probable is left out, and nothing is let in beyond what bf16
        cannot tell from them."""
        order = self._logits.float().sort(-1, descending=True).values
        if self._k:
            order = order.masked_fill(order < order[:, self._k - 1 : self._k], float("-inf"))
        probs = (order / self._temperature).softmax(-1)
        cut = ((probs.cumsum(-1) - probs) < self._p).sum(-1) - 1
        exact = order.gather(1, cut[:, None])
        found = thresholds(self._logits, self._args)[:, None]
        stray = (self._logits >= found) & (self._logits.float() < exact - 1e-3 * self._temperature)
        return bool((found <= exact).all()) and not bool(stray.any())


def sampling(rows: int, kind: str, width: int = 128_256) -> Job:
    return Job(
        "sample", f"{rows}x{width} {kind}", lambda: Sample(rows, kind, width), rows * width * 2.0
    )
