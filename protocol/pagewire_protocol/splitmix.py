"""The finalizer of SplitMix64 (Steele, Lea, Flood 2014): spreads 64 bits so that near inputs have
unrelated outputs. The seeds of several choices and the fake model's tokens come from it."""

from typing import Final

MASK64: Final = 2**64 - 1
GOLDEN_GAMMA: Final = 0x9E3779B97F4A7C15
"""The odd integer nearest to 2^64 divided by the golden ratio: the step between two states."""
MULTIPLIERS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def finalize(state: int) -> int:
    """A bijection of 0 .. 2^64 - 1."""
    state = ((state ^ (state >> 30)) * MULTIPLIERS[0]) & MASK64
    state = ((state ^ (state >> 27)) * MULTIPLIERS[1]) & MASK64
    return state ^ (state >> 31)
