"""The next token of each row of logits on a CPU, by the random map of `sampling_map`, which is
the GPU's too: Gumbel noise from Philox words of seed, position and vocabulary id.

Only tokens that top-k, top-p and min-p keep get noise. Over a whole vocabulary its words are most
of the work: machine code computes them where there is Numba, and torch elsewhere and until that
code is compiled; both leave the deciding comparison to the same operations. A row's token is a
function of its own logits and parameters: nothing here depends on what else is in the batch.
"""

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from . import cpu_native, cpu_task
from .philox import WORDS, sampling_words
from .sampling_map import GREEDY_BELOW, SamplingRows, gumbel

NUCLEUS_CANDIDATES: Final = 1024
"""How many of the most likely tokens top-p looks at before it sorts a whole row."""
SUM_TILE: Final = 256
"""Probabilities are summed in float32 by tiles of so many, and in float64 over the tiles."""
NEGATIVE_INFINITY: Final = float("-inf")
MOST_NOISE: Final = 23.0
"""No noise is larger: that of word 0 is 32.5 * ln(2)."""
LEAST_NOISE: Final = -2.9
"""No noise is smaller: -log(-log(2.98e-8))."""
PIECE: Final = 16_384
"""Philox counters that are computed at a time without machine code."""
_search: list[int] = []
"""The address of `cpu_gumbel.find_candidates`, once `compile_search` is through."""


def compile_search() -> None:
    """Have the words of whole vocabularies computed by machine code from now on. Takes seconds
    where there is none on disk; may run in a thread beside `sample`. Raises NoNativeCode."""
    cpu_native.openmp()
    _search[:] = [cpu_native.address("find_candidates")]


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """logits float32 [R, V] without NaN, on any device -> tokens int64 [R]. `rows.filtered` is not
    looked at."""
    tokens = logits.argmax(-1)
    drawn = torch.nonzero(rows.temperature >= GREEDY_BELOW).flatten()
    if len(drawn):
        whole = len(drawn) == len(logits)
        tokens[drawn] = _draw(logits if whole else logits[drawn], rows if whole else rows.at(drawn))
    return tokens


def thresholds(logits: Tensor, rows: SamplingRows) -> Tensor:
    """float32 [R]: the least logit of each row of logits [R, V] that min-p, then top-k, then top-p
    keep; see `sampling_map.thresholds`. Temperatures are positive."""
    width = logits.shape[1]
    floors = torch.full((len(logits),), NEGATIVE_INFINITY, device=logits.device)
    by_min_p = rows.min_p > 0
    limited = torch.nonzero((rows.top_k > 0) & (rows.top_k < width)).flatten()
    nucleus = torch.nonzero(rows.top_p < 1).flatten()
    if by_min_p.any():
        relative = logits.amax(-1) + rows.temperature * torch.log(rows.min_p)
        floors = torch.where(by_min_p, relative, floors)
    if len(limited):
        k = rows.top_k[limited].long()
        largest = torch.topk(logits[limited], int(k.max()), sorted=True).values
        floors[limited] = torch.maximum(floors[limited], largest.gather(1, k[:, None] - 1)[:, 0])
    if len(nucleus):
        floors[nucleus] = _nucleus_floors(
            logits[nucleus], rows.temperature[nucleus], rows.top_p[nucleus], floors[nucleus]
        )
    return floors


def _nucleus_floors(x: Tensor, temperature: Tensor, top_p: Tensor, floors: Tensor) -> Tensor:
    """[R]: the smallest logit of the fewest most likely tokens, among those at or above `floors`,
    that have `top_p` of their probability."""
    peak = x.amax(-1, keepdim=True)
    scale = 1.0 / temperature[:, None]
    x = torch.where(x < floors[:, None], NEGATIVE_INFINITY, x)
    wanted = top_p.double()[:, None] * _total(torch.exp((x - peak) * scale))

    def reach(rows: Any, largest: Tensor) -> tuple[Tensor, Tensor]:
        """The logit at which the running sum over `largest`, falling, reaches what is wanted, or
        the last; and whether it does."""
        shares = torch.exp((largest - peak[rows]) * scale[rows])
        below = (shares.double().cumsum(-1) < wanted[rows]).sum(-1, keepdim=True)
        at = below.clamp(max=largest.shape[1] - 1)
        return largest.gather(1, at)[:, 0], below[:, 0] < largest.shape[1]

    count = min(NUCLEUS_CANDIDATES, x.shape[1])
    result, reached = reach(slice(None), torch.topk(x, count, sorted=True).values)
    rest = torch.nonzero(~reached).flatten()
    if len(rest):
        result[rest], _ = reach(rest, torch.sort(x[rest], descending=True).values)
    return result


def _total(weights: Tensor) -> Tensor:
    """[R, V] -> [R, 1] float64."""
    missing = -weights.shape[1] % SUM_TILE
    padded = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    tiles = padded.view(len(weights), -1, SUM_TILE).sum(-1, dtype=torch.float64)
    return tiles.sum(-1, keepdim=True)


def _draw(logits: Tensor, rows: SamplingRows) -> Tensor:
    """One token for each row, of which none is greedy."""
    floors = thresholds(logits, rows)
    if not _search or logits.device.type != "cpu":
        return _draw_by_torch(logits, rows, floors)
    ids, words, overflowed = _find_candidates(logits.contiguous(), rows, floors)
    tokens = _winners(logits.gather(1, ids), ids, words, rows.temperature)
    if len(overflowed):
        tokens[overflowed] = _draw_by_torch(
            logits[overflowed], rows.at(overflowed), floors[overflowed]
        )
    return tokens


def _find_candidates(
    logits: Tensor, rows: SamplingRows, floors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, words) int64 [R, N] of the tokens that might win, the first of them repeated where a
    row has fewer; and the rows [M] that have more than there is room for."""
    count, width = logits.shape
    threads = torch.get_num_threads()
    slices = -(-threads // count)
    scales = 1.0 / rows.temperature
    room = cpu_task.G_CANDIDATES
    ids = torch.zeros(count, slices, room, dtype=torch.int64)
    words = torch.zeros_like(ids)
    counts = torch.zeros(count, slices, dtype=torch.int64)
    scratch = torch.empty(threads, cpu_task.G_BLOCK, dtype=torch.int32)
    seeds = rows.seeds.contiguous()
    positions = rows.positions.contiguous()
    task = np.zeros(cpu_task.G_FIELDS, np.int64)
    for field, value in (
        (cpu_task.G_LOGITS, logits.data_ptr()),
        (cpu_task.G_ROWS, count),
        (cpu_task.G_WIDTH, width),
        (cpu_task.G_SLICES, slices),
        (cpu_task.G_SCALES, scales.data_ptr()),
        (cpu_task.G_FLOORS, floors.data_ptr()),
        (cpu_task.G_SEEDS, seeds.data_ptr()),
        (cpu_task.G_POSITIONS, positions.data_ptr()),
        (cpu_task.G_SCRATCH, scratch.data_ptr()),
        (cpu_task.G_IDS, ids.data_ptr()),
        (cpu_task.G_WORDS, words.data_ptr()),
        (cpu_task.G_COUNTS, counts.data_ptr()),
    ):
        task[field] = value
    cpu_native.run(_search[0], task, threads)
    used = (torch.arange(room) < counts[:, :, None]).flatten(1)
    overflowed = torch.nonzero((counts > room).any(-1)).flatten()
    return _padded(ids.flatten(1), used), _padded(words.flatten(1), used), overflowed


def _padded(entries: Tensor, used: Tensor) -> Tensor:
    """entries [R, N] of which those that are not used [R, N] repeat the row's first that is, so
    that all of a row can be compared."""
    first = used.byte().argmax(-1, keepdim=True)
    return torch.where(used, entries, entries.gather(1, first))


def _winners(x: Tensor, ids: Tensor, words: Tensor, temperature: Tensor) -> Tensor:
    """x, ids and words [R, N] of the tokens that are left of each row: the one of the largest
    score [R], the lowest id among equals."""
    scores = x * (1.0 / temperature)[:, None] + gumbel(words)
    best = scores == scores.amax(-1, keepdim=True)
    return torch.where(best, ids, torch.iinfo(torch.int64).max).amin(-1)


def _draw_by_torch(logits: Tensor, rows: SamplingRows, floors: Tensor) -> Tensor:
    """The vocabulary in groups of the ids that share a Philox counter. Groups of which no token
    could win get no noise: without it, too, they are behind."""
    scores = logits * (1.0 / rows.temperature)[:, None]
    scores.masked_fill_(logits < floors[:, None], NEGATIVE_INFINITY)
    least = scores.amax(-1, keepdim=True) + (LEAST_NOISE - MOST_NOISE)
    missing = -scores.shape[1] % WORDS
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=NEGATIVE_INFINITY)
    row, group = torch.nonzero(
        (scores >= least).view(len(scores), -1, WORDS).any(-1), as_tuple=True
    )
    noise = _noise(rows.seeds[row], rows.positions[row], group)
    scores.view(-1, WORDS).index_add_(0, row * (scores.shape[1] // WORDS) + group, noise)
    return scores.argmax(-1)


def _noise(seeds: Tensor, positions: Tensor, groups: Tensor) -> Tensor:
    """float32 [N, 4] of the ids in `groups` [N], in pieces that stay in the cache."""
    noise = torch.empty(len(groups), WORDS, device=groups.device)
    columns = [column.numpy(force=True) for column in (seeds, positions, groups)]
    for start in range(0, len(groups), PIECE):
        part = slice(start, start + PIECE)
        words = torch.from_numpy(sampling_words(*(column[part] for column in columns)))
        noise[part] = gumbel(words)
    return noise
