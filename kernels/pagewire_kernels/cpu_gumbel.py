"""The search for the token with the largest logit plus Gumbel noise, as machine code: all of the
vocabulary gets its random words, and almost none of it needs a logarithm.

Compiled by Numba for one address of int64, the fields of a task by number; every thread of the team
takes its share of the pieces. Imported only to compile. The caller computes the noise of the few
candidates that are left over (cpu_sampling), so that tokens do not depend on whether there is
machine code.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Numba's decorators change the signatures of what they decorate.

import math
from typing import Final

import numpy as np

from .cpu_kernels import bits_of, floats, inlined, longs, uints
from .cpu_task import (
    G_BLOCK,
    G_CANDIDATES,
    G_COUNTS,
    G_FLOORS,
    G_IDS,
    G_LOGITS,
    G_POSITIONS,
    G_ROWS,
    G_SCALES,
    G_SCRATCH,
    G_SEEDS,
    G_SLICES,
    G_WIDTH,
    G_WORDS,
)
from .cpu_team import share, thread_count, thread_number
from .philox import MULTIPLIERS, ROUNDS, WEYL

MARGIN: Final = 1e-3
RELATIVE: Final = 5e-7
"""Scores closer to the best one than MARGIN + RELATIVE * |best| are left to the caller: more than
the roundings of float32 here and there."""
LOWEST: Final = -3e38

LOW: Final = np.uint64(0xFFFFFFFF)
HALF: Final = np.uint64(32)
FIRST: Final = np.uint64(MULTIPLIERS[0])
SECOND: Final = np.uint64(MULTIPLIERS[1])
KEY_STEP_0: Final = np.uint64(WEYL[0])
KEY_STEP_1: Final = np.uint64(WEYL[1])
LN2: Final = np.float32(math.log(2.0))


@inlined
def _round(a, b, c, d, k0, k1):
    """One round of Philox4x32 on uint64 values under 2^32."""
    p = a * FIRST
    q = c * SECOND
    return (q >> HALF) ^ b ^ k0, q & LOW, (p >> HALF) ^ d ^ k1, p & LOW


@inlined
def _fill_words(words, group, groups, seed, position):
    """words[4 * j + w] = word w of vocabulary group `group` + j, for j under `groups`."""
    for j in range(groups):
        a = np.uint64(group + j)
        b = np.uint64(position) & LOW
        c = np.uint64(position) >> HALF
        d = np.uint64(0)
        k0 = np.uint64(seed) & LOW
        k1 = np.uint64(seed) >> HALF
        for _ in range(ROUNDS):
            a, b, c, d = _round(a, b, c, d, k0, k1)
            k0 = (k0 + KEY_STEP_0) & LOW
            k1 = (k1 + KEY_STEP_1) & LOW
        words[4 * j] = np.uint32(a)
        words[4 * j + 1] = np.uint32(b)
        words[4 * j + 2] = np.uint32(c)
        words[4 * j + 3] = np.uint32(d)


@inlined
def _most_noise(word):
    """An upper bound of a word's noise without a logarithm. -log(-log(1 - u)) < -log(u), and a
    float's exponent and mantissa, read as one number, are a line below its binary logarithm."""
    number = np.float32(word) + np.float32(0.5)
    binary_log = np.float32(bits_of(number)) * np.float32(2.0**-23) - np.float32(127.0)
    return LN2 * (np.float32(32.0) - binary_log)


@inlined
def _best_bound(logits, words, count, scale, floor):
    """The largest score that any of `count` tokens might have."""
    most = np.float32(LOWEST)
    for i in range(count):
        x = logits[i]
        bound = x * scale + _most_noise(words[i])
        bound = bound if x >= floor else np.float32(LOWEST)
        most = bound if bound > most else most
    return most


@inlined
def _noise(word):
    """Within a few roundings of `sampling_map.gumbel`."""
    u = np.float64(np.float32(np.float32(word) + np.float32(0.5))) * 2.0**-32
    if u < 0.01:
        return -math.log(u * (1.0 + u * (0.5 + u * (0.33333333 + u * 0.25))))
    return -math.log(-math.log(max(1.0 - u, 2.98e-8)))


@inlined
def _search(logits, first, last, scale, floor, seed, position, words, ids_out, words_out):
    """Writes the candidates among the ids first (a multiple of 4) to last and returns their
    number."""
    best, margin, num_candidates = LOWEST, 0.0, 0
    for start in range(first, last, G_BLOCK):
        count = min(G_BLOCK, last - start)
        _fill_words(words, start // 4, (count + 3) // 4, seed, position)
        if _best_bound(floats(logits + 4 * start), words, count, scale, floor) < best - margin:
            continue
        x = floats(logits + 4 * start)
        for i in range(count):
            scaled = np.float32(x[i] * scale)
            if x[i] < floor or scaled + _most_noise(words[i]) < best - margin:
                continue
            score = np.float64(scaled) + _noise(words[i])
            if score > best + margin:
                num_candidates = 0
            if score > best:
                best = score
                margin = MARGIN + RELATIVE * abs(best)
            elif score < best - margin:
                continue
            if num_candidates < G_CANDIDATES:
                ids_out[num_candidates] = start + i
                words_out[num_candidates] = np.int64(words[i])
            num_candidates += 1
    return num_candidates


def find_candidates(task):
    """For each slice of each row, the ids and words of the tokens that might have the largest
    score."""
    t = longs(task)
    me = thread_number()
    threads = thread_count()
    width = t[G_WIDTH]
    slices = t[G_SLICES]
    span = ((width + slices - 1) // slices + 3) // 4 * 4
    mine, end = share(t[G_ROWS] * slices, me, threads)
    for piece in range(mine, end):
        row = piece // slices
        part = piece % slices
        longs(t[G_COUNTS])[piece] = _search(
            t[G_LOGITS] + 4 * row * width,
            part * span,
            min((part + 1) * span, width),
            floats(t[G_SCALES])[row],
            floats(t[G_FLOORS])[row],
            longs(t[G_SEEDS])[row],
            longs(t[G_POSITIONS])[row],
            uints(t[G_SCRATCH] + 4 * G_BLOCK * me),
            longs(t[G_IDS] + 8 * G_CANDIDATES * piece),
            longs(t[G_WORDS] + 8 * G_CANDIDATES * piece),
        )
