"""Random numbers without state: Philox4x32-10, a function of (key, counter) (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3").

Any number in a request's stream can be had by itself, so a resumed request draws what it would have
drawn.
"""

from typing import Final

import torch
from torch import Tensor

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)
LOW: Final = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four words from four counter and two key words, each an int64 tensor of values under 2^32.
    Products wrap as unsigned ones do."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & LOW) ^ b ^ k0,
            second & LOW,
            ((first >> 32) & LOW) ^ d ^ k1,
            first & LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return a, b, c, d


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds, positions [R] int64, not negative -> [R] float64 in [0, 1) with 53 random bits; a pure
    function of each row."""
    zero = torch.zeros_like(positions)
    words = philox((positions & LOW, positions >> 32, zero, zero), (seeds & LOW, seeds >> 32))
    return ((words[0] << 21) | (words[1] >> 11)).double() * 2.0**-53
