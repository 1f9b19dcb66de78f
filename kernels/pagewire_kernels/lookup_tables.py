"""Tables of 16 values that codes of 4 bits stand for. Imports no kernel.

A code's value is table[code], times a scale where there is one. Tables of whole formats have names;
SqueezeLLM has a table for each row of a matrix.
"""

import functools
from typing import Final

import torch
from torch import Tensor

NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution: the NF4 of QLoRA, with bitsandbytes' digits."""
FP4: Final = tuple(
    sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)
)
"""bitsandbytes' floating-point numbers of 4 bits: sign, 2 bits of exponent, 1 of mantissa."""
IQ4: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""ggml's kvalues_iq4nl, of IQ4_NL and IQ4_XS."""
ENTRIES: Final = 16
TABLES: Final[dict[str, tuple[float, ...]]] = {"nf4": NF4, "fp4": FP4, "iq4": IQ4}
"""By their names, which are forms of a matrix on a GPU too."""
ROW_TABLES: Final = "row tables"
"""The form of a matrix with a table for each row."""
GAINS: Final = {"nf4": 1.25, "fp4": 12.0, "iq4": 1.0}
"""By what the values of a table are multiplied before they are rounded to 16 bits; sums are divided
by it. NF4's are then off by 0.58 of what rounding each weight to bfloat16 costs (0.62 in float16),
the others are exact."""


@functools.cache
def named(form: str, device: torch.device) -> Tensor:
    """The table [16] float32 of that name."""
    return torch.tensor(TABLES[form], dtype=torch.float32, device=device)


def form_of(table: Tensor) -> str:
    """The form of matrices with this table: [16], one for all, or [N, 16]. Empty: of none."""
    if table.dim() == 2:
        return ROW_TABLES
    return next((form for form in TABLES if torch.equal(table, named(form, table.device))), "")
