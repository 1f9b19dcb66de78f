"""Which new tokens torch's attention takes together: pieces of sequences that are alike, bounded in
memory. Plain numpy, once a step.

A piece is some new tokens of one sequence and the places that they see. Pieces of like size share
one batched product, padded to the largest of them. Knows no tensors and no scores.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

QUERIES: Final = 256
"""Most new tokens of a piece: what they see beyond each other's places is wasted work."""
SHORT: Final = 256
"""Contexts up to this length are alike: another product would cost more than the padding."""
STEP: Final = 16
"""Contexts are padded to a multiple of it, since torch copies masks whose rows are not aligned."""
SCORES: Final = 1 << 23
"""Most scores of a product."""
GATHERED: Final = 1 << 24
"""Most elements of keys that are gathered for a product, as far as one sequence allows."""
SCORE_BYTES: Final = 20
"""Of a score: in float32 before and after the softmax, with what makes one from the other, rounded,
and its mask."""


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and the size of a head."""

    heads: int
    kv_heads: int
    size: int


@dataclass(frozen=True)
class Pieces:
    """Columns of one entry a piece. rows: the sequence's place in the batch; tokens: the first new
    token in the step; counts: how many; starts: the first one's position; lows: the first position
    that is seen. queries, span: what all are padded to, in tokens and places."""

    rows: Ints
    tokens: Ints
    counts: Ints
    starts: Ints
    lows: Ints
    queries: int
    span: int


def workspace(shape: Shape, positions: int, itemsize: int, kv_itemsize: int) -> int:
    """Bytes that attention works in at most, of sequences of up to `positions` tokens. itemsize,
    kv_itemsize: of an element of queries and of caches."""
    keys = max(GATHERED, shape.kv_heads * shape.size * (positions + STEP))
    copied = keys * kv_itemsize if kv_itemsize != itemsize else 0
    return keys * 2 * itemsize + copied + keys // shape.size * 16 + SCORES * SCORE_BYTES


def plan(query_start: Ints, lengths: Ints, shape: Shape, window: int | None) -> list[Pieces]:
    """Every new token of the step is in exactly one piece. query_start [B + 1], lengths [B];
    sequences of length 0 are padding."""
    columns = _pieces(query_start, lengths, shape, window)
    if not columns.shape[1]:
        return []
    counts = columns[2]
    spans = columns[3] + columns[2] - columns[4]
    kinds = np.stack((np.ceil(np.log2(counts)), np.ceil(np.log2(np.maximum(spans, SHORT)))))
    found: list[Pieces] = []
    for kind in np.unique(kinds, axis=1).T:
        alike = columns[:, (kinds == kind[:, None]).all(0)]
        queries, span = _padding(alike)
        most = max(
            1,
            min(
                SCORES // (shape.heads * queries * span),
                GATHERED // (shape.kv_heads * shape.size * span),
            ),
        )
        for first in range(0, alike.shape[1], most):
            chosen = alike[:, first : first + most]
            queries, span = _padding(chosen)
            rows, tokens, counts, starts, lows = chosen
            found.append(Pieces(rows, tokens, counts, starts, lows, queries, span))
    return found


def _padding(columns: Ints) -> tuple[int, int]:
    """The most tokens and, rounded up, the most places of these pieces."""
    return int(columns[2].max()), -(
        -int((columns[3] + columns[2] - columns[4]).max()) // STEP
    ) * STEP


def _pieces(query_start: Ints, lengths: Ints, shape: Shape, window: int | None) -> Ints:
    """The columns of `Pieces`, [5, pieces]."""
    counts = np.where(lengths > 0, np.diff(query_start), 0)
    single = np.flatnonzero(counts == 1)
    found = [(row, query_start[row], 1, lengths[row] - 1) for row in single]
    for row in np.flatnonzero(counts > 1):
        before = lengths[row] - counts[row]
        span = lengths[row] if window is None else min(lengths[row], window + QUERIES)
        step = int(max(1, min(QUERIES, SCORES // (shape.heads * (span + STEP)))))
        for first in range(0, int(counts[row]), step):
            found.append(
                (row, query_start[row] + first, min(step, counts[row] - first), before + first)
            )
    columns = np.array(found, np.int64).reshape(-1, 4).T
    starts = columns[3]
    lows = np.zeros_like(starts) if window is None else np.maximum(starts - window + 1, 0)
    return np.concatenate((columns, lows[None]))
