"""How a mixture of experts chooses the experts of a token: the rule alone, for every back end.
Knows neither weights nor devices."""

from dataclasses import dataclass
from typing import Final, Literal

NO_EXPERT: Final = -1
"""In place of an expert's id: nothing is computed and nothing is read. All ids of padding are."""
LEAST_SUM: Final = 1e-20
"""Added to a token's sum of weights before weights are divided by it."""


@dataclass(frozen=True)
class Routing:
    """A token's `top_k` of `num_experts` experts and their weights. Raises ValueError for numbers
    that do not go together.

    Scores are the softmax over all experts, or the sigmoid of each logit by itself. Experts are
    chosen by their score, plus a correction bias where the model has one; among equals the lowest
    id comes first. Weights are scores without that bias, divided by their sum with `renormalize`
    (softmax over the chosen logits alone gives the same), times `routed_scaling_factor`.

    With num_expert_group > 1 the experts are in so many groups of equal size, and the choice is
    made among those of the best `topk_group` groups. A group is as good as its best expert; with a
    correction bias, as its best two together (DeepSeek-V2 and -V3).
    """

    num_experts: int
    top_k: int
    renormalize: bool = False
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    routed_scaling_factor: float = 1.0
    num_expert_group: int = 1
    topk_group: int = 1

    def __post_init__(self) -> None:
        if self.num_experts % self.num_expert_group:
            raise ValueError(
                f"{self.num_experts} experts cannot be divided into {self.num_expert_group} groups"
            )
        if not 0 < self.topk_group <= self.num_expert_group:
            raise ValueError(
                f"{self.topk_group} of {self.num_expert_group} groups of experts cannot be chosen"
            )
        if not 0 < self.top_k <= self.group_size * self.topk_group:
            raise ValueError(
                f"{self.top_k} experts a token cannot be chosen among {self.group_size * self.topk_group}"
            )

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.num_experts // self.num_expert_group
