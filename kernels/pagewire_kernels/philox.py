"""Random numbers without state: Philox4x32-10, a function of (key, counter) (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3").

Any number in a request's stream can be computed by itself, so a resumed request draws what it would
have drawn.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)
WORDS: Final = 4
"""32-bit words that one counter gives."""
LOW: Final = np.uint64(0xFFFFFFFF)
HALF: Final = np.uint64(32)

Words = npt.NDArray[np.uint64]


def philox(counter: tuple[Words, ...], key: tuple[Words, ...]) -> tuple[Words, ...]:
    """Four words from four counter words and two key words; all are uint64 arrays of one shape [N]
    with values under 2^32."""
    a, b, c, d = (word.copy() for word in counter)
    k0, k1 = (word.copy() for word in key)
    first = np.empty_like(a)
    second = np.empty_like(a)
    for _ in range(ROUNDS):
        np.multiply(a, np.uint64(MULTIPLIERS[0]), out=first)
        np.multiply(c, np.uint64(MULTIPLIERS[1]), out=second)
        # In place: these few operations, repeated, are the time of sampling without machine code.
        np.right_shift(second, HALF, out=a)
        a ^= b
        a ^= k0
        np.right_shift(first, HALF, out=c)
        c ^= d
        c ^= k1
        np.bitwise_and(second, LOW, out=b)
        np.bitwise_and(first, LOW, out=d)
        k0 += np.uint64(WEYL[0])
        k0 &= LOW
        k1 += np.uint64(WEYL[1])
        k1 &= LOW
    return a, b, c, d


def sampling_words(
    seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The random words of sampling: int64 [N, 4], values under 2^32. Row n has those of the
    vocabulary ids 4 * groups[n] to 4 * groups[n] + 3 for logits with seeds[n] and positions[n]. All
    three are int64 [N], not negative; groups are under 2^32."""
    seed = seeds.astype(np.uint64)
    position = positions.astype(np.uint64)
    counter = (groups.astype(np.uint64), position & LOW, position >> HALF, np.zeros_like(seed))
    words = philox(counter, (seed & LOW, seed >> HALF))
    return np.stack(words, 1).astype(np.int64)
