"""What the CPU back end derives from a Batch once a step: rotary factors, cache rows, gather
indices and masks.

Caches are seen as rows of one (block, head) pair each, so that gathering blocks yields keys already
split by head. Rows that pad a table repeat the sequence's own first visible block: they are masked,
and what another request may have left (a NaN) cannot reach this one.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .batch import Batch

SHORT_BLOCKS: Final = 16
"""Decoding sequences up to this many blocks share a group whatever their lengths: another group
would cost more than the padding."""
QUERY_CHUNK: Final = 256
"""Longer prompts are attended in pieces of this many queries, each over the keys up to its end:
half the work of a full square."""
SCORE_LIMIT: Final = 1 << 23
"""Most scores of a group by KV head: what bounds the memory of a step's attention."""
WIDE_LIMIT: Final = 1 << 18
"""Decoding over at most this many key elements runs in float32: below it oneDNN's set-up costs more
than the products."""


@dataclass
class Group:
    """`size` sequences with `queries` new tokens and `length` visible places each, attended by one
    batched product."""

    tokens: Tensor | slice | None
    """Where they are in the step; None when they are all of it in order."""
    size: int
    queries: int
    length: int
    index: Tensor
    """The (block, head) rows of a cache that hold their keys, [size, Hkv, blocks] in one
    dimension."""
    mask: Tensor | None
    """[size * Hkv or 1, queries or 1, length], 0 or -inf; None when nothing is hidden."""
    wide: bool
    """Compute in float32."""
    at: np.ndarray
    """[size or 1, length]: the positions of the visible places."""
    asking: np.ndarray
    """[size or 1, queries]: those of the queries."""

    @cached_property
    def distances(self) -> Tensor:
        """[size or 1, queries, length] float32: how far after the query a place is; positive where
        it is hidden."""
        return torch.from_numpy((self.at[:, None, :] - self.asking[:, :, None]).astype(np.float32))


def _additive(visible: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32("-inf"))).to(dtype)


@dataclass(slots=True)
class Plan:
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype
    positions: Tensor
    cache_rows: Tensor
    """[kept tokens * kv_heads] rows of a cache seen as [-1, D]."""
    kept: Tensor | None
    """The tokens that are no padding; None when all are."""
    starts: np.ndarray
    lengths: np.ndarray
    tables: np.ndarray
    _rotary: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict
    )
    _work: dict[int | None, list[Group]] = field(default_factory=dict)

    def rotary(self, cos_sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(cosines twice over [T, 1, D], sines [T, 1, D/2], minus sines) in `dtype`."""
        key = (cos_sin.data_ptr(), dtype)
        if key not in self._rotary:
            cos, sin = cos_sin[self.positions].to(dtype)[:, None].chunk(2, -1)
            self._rotary[key] = (torch.cat((cos, cos), -1), sin.contiguous(), -sin)
        return self._rotary[key]

    def work(self, window: int | None) -> list[Group]:
        """Every new token of the step is in exactly one group."""
        if window not in self._work:
            counts = np.diff(self.starts)
            groups = [
                self._decode(rows, window)
                for rows in self._by_length(np.flatnonzero(counts == 1), window)
            ]
            alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for row in np.flatnonzero(counts > 1):
                for first in range(0, int(counts[row]), QUERY_CHUNK):
                    start = int(self.lengths[row] - counts[row]) + first
                    key = (start, min(QUERY_CHUNK, int(counts[row]) - first))
                    alike.setdefault(key, []).append((int(row), int(self.starts[row]) + first))
            for (start, count), members in alike.items():
                most = max(1, SCORE_LIMIT // (count * (start + count)))
                groups += [
                    self._prefill(members[i : i + most], start, count, window)
                    for i in range(0, len(members), most)
                ]
            self._work[window] = groups
        return self._work[window]

    def _by_length(self, rows: np.ndarray, window: int | None) -> list[np.ndarray]:
        """Split by length where padding to the longest would more than double the work."""
        if not len(rows):
            return []
        blocks = -(-self.lengths[rows] // self.block_size)
        if window is not None:
            blocks = np.minimum(blocks, window // self.block_size + 2)
        classes = np.where(blocks <= SHORT_BLOCKS, 0, np.ceil(np.log2(blocks)))
        return [rows[classes == c] for c in np.unique(classes)]

    def _decode(self, rows: np.ndarray, window: int | None) -> Group:
        lengths = self.lengths[rows].astype(np.int64)
        low = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
        first = low // self.block_size
        end = -(-lengths // self.block_size)
        columns = first[:, None] + np.arange((end - first).max())
        blocks = self.tables[
            rows[:, None], np.where(columns < end[:, None], columns, first[:, None])
        ]
        at = (columns[:, :, None] * self.block_size + np.arange(self.block_size)).reshape(
            len(rows), -1
        )
        visible = (at >= low[:, None]) & (at < lengths[:, None])
        index = self._index(blocks)
        wide = at.size * self.kv_heads * self.head_dim <= WIDE_LIMIT
        mask = (
            None
            if visible.all()
            else self._mask(np.repeat(visible, self.kv_heads, 0)[:, None], wide)
        )
        return Group(
            self._tokens(self.starts[rows], 1),
            len(rows),
            1,
            at.shape[1],
            index,
            mask,
            wide,
            at,
            lengths[:, None] - 1,
        )

    def _prefill(
        self, members: list[tuple[int, int]], start: int, count: int, window: int | None
    ) -> Group:
        """members: (row, first token in the step); each computes the `count` positions from `start`
        on."""
        end = start + count
        low = (
            0 if window is None else max(0, start - window + 1) // self.block_size * self.block_size
        )
        rows = np.array([row for row, _ in members])
        blocks = self.tables[rows, low // self.block_size : -(-end // self.block_size)]
        i = np.arange(start, end)[:, None]
        j = np.arange(low, end)[None]
        visible = (j <= i) if window is None else (j <= i) & (j > i - window)
        tokens = self._tokens(np.array([first for _, first in members]), count)
        index = self._index(blocks)
        mask = self._mask(visible[None], False)
        return Group(tokens, len(rows), count, end - low, index, mask, False, j, i.T)

    def _tokens(self, firsts: np.ndarray, count: int) -> Tensor | slice | None:
        """Runs of `count` tokens each."""
        if (np.diff(firsts) == count).all():
            first = int(firsts[0])
            last = int(firsts[-1]) + count
            return None if last - first == len(self.positions) else slice(first, last)
        return torch.from_numpy((firsts[:, None] + np.arange(count)).reshape(-1).astype(np.int64))

    def _mask(self, visible: np.ndarray, wide: bool) -> Tensor:
        return _additive(
            visible, torch.promote_types(self.dtype, torch.float32) if wide else self.dtype
        )

    def _index(self, blocks: np.ndarray) -> Tensor:
        """blocks [B, M] -> (block, head) rows in the order [B, Hkv, M]."""
        pairs = (
            blocks[:, None, :].astype(np.int64) * self.kv_heads
            + np.arange(self.kv_heads)[None, :, None]
        )
        return torch.from_numpy(pairs.reshape(-1))


def make_plan(batch: Batch, cache: Tensor, dtype: torch.dtype) -> Plan:
    """The plan of `batch` for caches shaped like `cache` and activations of `dtype`; also left on
    `batch.plan`."""
    _, kv_heads, block_size, head_dim = cache.shape
    slots = batch.slot_mapping.numpy()
    kept = None if (slots >= 0).all() else torch.from_numpy(np.flatnonzero(slots >= 0))
    block, offset = np.divmod(slots[slots >= 0], block_size)
    rows = (block[:, None] * kv_heads + np.arange(kv_heads)) * block_size + offset[:, None]
    batch.plan = Plan(
        kv_heads,
        block_size,
        head_dim,
        dtype,
        batch.positions,
        torch.from_numpy(rows.reshape(-1)),
        kept,
        batch.query_start.numpy(),
        batch.seq_lens.numpy(),
        batch.block_tables.numpy(),
    )
    return batch.plan
