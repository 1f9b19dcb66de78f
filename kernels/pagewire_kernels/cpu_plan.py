"""What the CPU back end derives from a Batch once a step: rotary factors, cache rows, gather indices and masks.

Caches are seen as rows of one (block, head) pair each, so that gathering blocks yields keys already split by head. Rows that pad a table
repeat the sequence's own first visible block: they are masked, and what another request may have left (a NaN) cannot reach this one.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .batch import Batch

SHORT_BLOCKS: Final = 16
"""Sequences up to this many blocks share a group whatever their lengths: another group would cost more than the padding."""


@dataclass(slots=True)
class Decode:
    """Sequences of one new token each, padded to one `length`. rows: their tokens in the step, None when they are all of it in order."""

    rows: Tensor | None
    size: int
    length: int
    index: Tensor
    mask: Tensor | None
    """[size * kv_heads, 1, length], 0 or -inf; None when nothing is hidden."""
    k_buffer: Tensor
    v_buffer: Tensor


@dataclass(slots=True)
class Prefill:
    """One sequence's several new tokens. `mask` [n, length] is 0 or -inf; None stands for a plain causal square."""

    first: int
    last: int
    length: int
    index: Tensor
    mask: Tensor | None
    k_buffer: Tensor
    v_buffer: Tensor

    def full_mask(self, dtype: torch.dtype) -> Tensor:
        return self.mask if self.mask is not None else _additive(np.tri(self.length, dtype=bool), dtype)


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
    _rotary: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    _work: dict[tuple[int | None, torch.dtype], tuple[list[Decode], list[Prefill]]] = field(default_factory=dict)

    def rotary(self, cos_sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(cosines twice over [T, 1, D], sines [T, 1, D/2], minus sines) in `dtype`."""
        key = (cos_sin.data_ptr(), dtype)
        if key not in self._rotary:
            cos, sin = cos_sin[self.positions].to(dtype)[:, None].chunk(2, -1)
            self._rotary[key] = (torch.cat((cos, cos), -1), sin.contiguous(), -sin)
        return self._rotary[key]

    def work(self, window: int | None, dtype: torch.dtype) -> tuple[list[Decode], list[Prefill]]:
        key = (window, dtype)
        if key not in self._work:
            counts = np.diff(self.starts)
            decodes = [self._decode(rows, window) for rows in self._groups(np.flatnonzero(counts == 1), window)]
            self._work[key] = (decodes, [self._prefill(row, window) for row in np.flatnonzero(counts > 1)])
        return self._work[key]

    def _groups(self, rows: np.ndarray, window: int | None) -> list[np.ndarray]:
        """Split by length where padding to the longest would more than double the work."""
        if not len(rows):
            return []
        blocks = -(-self.lengths[rows] // self.block_size)
        if window is not None:
            blocks = np.minimum(blocks, window // self.block_size + 2)
        classes = np.where(blocks <= SHORT_BLOCKS, 0, np.ceil(np.log2(blocks)))
        return [rows[classes == c] for c in np.unique(classes)]

    def _decode(self, rows: np.ndarray, window: int | None) -> Decode:
        lengths = self.lengths[rows].astype(np.int64)
        low = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
        first, end = low // self.block_size, -(-lengths // self.block_size)
        columns = first[:, None] + np.arange((end - first).max())
        blocks = self.tables[rows[:, None], np.where(columns < end[:, None], columns, first[:, None])]
        at = (columns[:, :, None] * self.block_size + np.arange(self.block_size)).reshape(len(rows), -1)
        visible = (at >= low[:, None]) & (at < lengths[:, None])
        mask = None if visible.all() else _additive(np.repeat(visible, self.kv_heads, 0)[:, None], self.dtype)
        tokens = None if len(rows) == len(self.positions) else torch.from_numpy(self.starts[rows].astype(np.int64))
        index = self._index(blocks)
        return Decode(tokens, len(rows), at.shape[1], index, mask, self._buffer(index), self._buffer(index))

    def _prefill(self, row: int, window: int | None) -> Prefill:
        first, last = int(self.starts[row]), int(self.starts[row + 1])
        end = int(self.lengths[row])
        start = end - (last - first)
        low = 0 if window is None else max(0, start - window + 1) // self.block_size * self.block_size
        blocks = self.tables[row, low // self.block_size : -(-end // self.block_size)]
        mask = None
        if start or (window is not None and end > window):
            i, j = np.arange(start, end)[:, None], np.arange(low, end)[None]
            mask = _additive((j <= i) if window is None else (j <= i) & (j > i - window), self.dtype)
        index = self._index(blocks[None])
        return Prefill(first, last, end - low, index, mask, self._buffer(index), self._buffer(index))

    def _index(self, blocks: np.ndarray) -> Tensor:
        """blocks [B, M] -> (block, head) rows in the order [B, Hkv, M]."""
        pairs = blocks[:, None, :].astype(np.int64) * self.kv_heads + np.arange(self.kv_heads)[None, :, None]
        return torch.from_numpy(pairs.reshape(-1))

    def _buffer(self, index: Tensor) -> Tensor:
        return torch.empty(len(index), self.block_size * self.head_dim, dtype=self.dtype)


def make_plan(batch: Batch, cache: Tensor) -> Plan:
    """The plan of `batch` for caches shaped and typed like `cache`; also left on `batch.plan`."""
    _, kv_heads, block_size, head_dim = cache.shape
    slots = batch.slot_mapping.numpy()
    kept = None if (slots >= 0).all() else torch.from_numpy(np.flatnonzero(slots >= 0))
    block, offset = np.divmod(slots[slots >= 0], block_size)
    rows = (block[:, None] * kv_heads + np.arange(kv_heads)) * block_size + offset[:, None]
    batch.plan = Plan(
        kv_heads,
        block_size,
        head_dim,
        cache.dtype,
        batch.positions,
        torch.from_numpy(rows.reshape(-1)),
        kept,
        batch.query_start.numpy(),
        batch.seq_lens.numpy(),
        batch.block_tables.numpy(),
    )
    return batch.plan
