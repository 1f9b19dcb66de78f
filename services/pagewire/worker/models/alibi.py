"""ALiBi's slopes: how much each head prefers what is near (arXiv 2108.12409)."""

import math


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """For a power of two a falling geometric series from 2 ** (-8 / heads); else that of the next
    lower power, then every other one of the next higher."""
    power = 1 << math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    return (*slopes, *(2 ** (-4 * (n + 1) / power) for n in range(0, 2 * (heads - power), 2)))
