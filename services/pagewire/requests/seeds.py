"""The seeds of a request's choices: one rule for every way in.

A request without a seed draws one. Choice 0 of a prompt uses the request's seed itself, so that a
request with `n` choices repeats the one with a single choice; every further choice uses a seed
derived from it, so that choices are unlike each other and repeat when the request is repeated.
"""

from collections.abc import Callable
from typing import Final

from pagewire_protocol.splitmix import GOLDEN_GAMMA, MASK64, finalize

SEED_BITS: Final = 63
"""The wire carries a seed as 0 .. 2^63 - 1."""
SEED_MASK: Final = 2**SEED_BITS - 1
NO_SEED: Final = -1
"""The same as no seed, as in vLLM."""


def base_seed(seed: int | None, draw_bits: Callable[[int], int]) -> int:
    """The seed of choice 0, 0 .. 2^63 - 1. `seed` is a signed 64-bit integer, of which the lower 63
    bits of the two's complement count; without one, `draw_bits(63)` is called."""
    if seed is None or seed == NO_SEED:
        return draw_bits(SEED_BITS)
    return seed & SEED_MASK


def choice_seed(base: int, choice: int) -> int:
    """The seed of a choice, 0 .. 2^63 - 1: the output of SplitMix64, started at `base`, after
    `choice` steps."""
    if choice == 0:
        return base
    return finalize((base + choice * GOLDEN_GAMMA) & MASK64) & SEED_MASK
