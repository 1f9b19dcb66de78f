"""From the pieces of a byte-pair vocabulary and their order to the list of merges that `tokenizers`
works by. It knows no file format.

tiktoken and sentencepiece join those neighbours whose union comes first in the vocabulary, leftmost
first; they keep no list of pairs.
"""

import math
from itertools import pairwise
from typing import TypeVar

Piece = TypeVar("Piece", str, bytes)


def merges_of(ranks: dict[Piece, int]) -> list[tuple[Piece, Piece]]:
    """The pair that each piece of several characters (or bytes) is merged from, in the order of
    ranks; none for one that merging never reaches. A piece has one such pair only: until it is
    merged, its characters merge with each other alone, whatever stands around it."""
    merges: list[tuple[Piece, Piece]] = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        pairs = [
            (piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in ranks and piece[cut:] in ranks
        ]
        pair = pairs[0] if len(pairs) == 1 else _last_merge(piece, ranks) if pairs else None
        if pair is not None:
            merges.append(pair)
    return merges


def _last_merge(piece: Piece, ranks: dict[Piece, int]) -> tuple[Piece, Piece] | None:
    """Merge the piece's own characters, the lowest rank first, until two parts are left."""
    parts = [piece[n : n + 1] for n in range(len(piece))]
    while len(parts) > 2:
        rank, index = min(
            (ranks.get(left + right, math.inf), n)
            for n, (left, right) in enumerate(pairwise(parts))
        )
        if rank == math.inf:
            return None
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], parts[1]
