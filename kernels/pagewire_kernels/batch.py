"""What one forward pass computes: which positions of which sequences, and where their keys and
values live.

All operations of a step share one Batch. It knows neither requests nor the model; back ends may
hang what they derive from it on `plan`, so that the layers share that work.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """B sequences with T new tokens in all, laid end to end.

    positions [T] int64: each token's place in its sequence. slot_mapping [T] int64: block *
    block_size + offset of its keys and values, -1 for padding. query_start [B+1] int32: first token
    of each sequence. seq_lens [B] int32: tokens including this step's. block_tables [B, M] int32:
    the blocks of each sequence; only the first ceil(seq_len / block_size) entries of a row count.
    """

    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_seq_len: int
    plan: Any = None
    """Derived once a step by the back end that needs it; the caller leaves it empty."""
    groups: Any = None
    """A cascade.Groups where rows of one token may have leading blocks in common; such rows come
    first. Results are the same without."""


def make_batch(
    counts: list[int],
    seq_lens: list[int],
    tables: list[list[int]],
    block_size: int,
    device: str = "cpu",
) -> Batch:
    """A Batch from plain lists: sequence i computes its last `counts[i]` of `seq_lens[i]` tokens.
    For tests and tools; the worker builds its batches from columns."""
    positions = []
    slots = []
    starts = [0]
    for count, length, table in zip(counts, seq_lens, tables, strict=True):
        span = range(length - count, length)
        positions += span
        slots += [table[p // block_size] * block_size + p % block_size for p in span]
        starts.append(starts[-1] + count)
    width = max(len(table) for table in tables)
    padded = [table + [0] * (width - len(table)) for table in tables]

    def tensor(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    i32 = torch.int32
    i64 = torch.int64
    return Batch(
        tensor(positions, i64),
        tensor(slots, i64),
        tensor(starts, i32),
        tensor(seq_lens, i32),
        tensor(padded, i32),
        max(counts),
        max(seq_lens),
    )
