"""Activations that a norm, or the function between an MLP's matrices, has rounded to float8 for the
product that reads them. Knows neither kernels nor back ends.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

ROW: Final = 0
"""As a group: all inputs of a row share one scale."""


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of x [T, K] as float8. group: inputs that share a scale, or ROW.

    codes: float8_e4m3fn [P, K] with P >= T, in the order of a weight's codes
    (quantized_decode.PERMUTED). scales: float32 [P, K / group], or [P, 1]. Rows from T on are there
    for the products' sake and hold anything. dtype: of x, and of products with it. full: x itself,
    where something else reads it.
    """

    codes: Tensor
    scales: Tensor
    count: int
    group: int
    dtype: torch.dtype
    full: Tensor | None = None

    def __len__(self) -> int:
        """T."""
        return self.count


Activations = Tensor | QuantizedRows
"""What a norm gives, and a linear layer takes."""


def full_rows(x: Activations) -> Tensor:
    """x [T, K] in 16 or 32 bits, for what cannot read float8."""
    if not isinstance(x, QuantizedRows):
        return x
    assert x.full is not None, "rows are read in full, and only float8 was kept of them"
    return x.full
