"""Cascade decode against attention row by row: several groups, rows of no group, unused groups, padding."""

import pytest
import torch
from ops.triton_cases import error, paged
from pagewire_kernels import reference
from pagewire_kernels.cascade import Groups, cascade_attention


def grouped(rows: list[list[int]], lengths: list[int], total: int, unused: int) -> Groups:
    """Groups of the given rows; `unused` empty ones follow."""
    order = [row for group in rows for row in group]
    starts = [0]
    for group in rows:
        starts.append(starts[-1] + len(group))
    shared = [0] * total
    for group, length in zip(rows, lengths, strict=True):
        for row in group:
            shared[row] = length
    order += [0] * (total - len(order))
    i32 = torch.int32
    return Groups(
        torch.tensor(order, dtype=i32),
        torch.tensor(starts + [starts[-1]] * unused, dtype=i32),
        torch.tensor(lengths + [0] * unused, dtype=i32),
        torch.tensor(shared, dtype=i32),
    )


@pytest.mark.parametrize(("dim", "group", "page", "cap"), [(64, 4, 16, None), (80, 3, 16, 4.0), (128, 1, 8, None), (64, 8, 48, None)])
def test_cascade(dim: int, group: int, page: int, cap: float | None) -> None:
    lengths = [200, 150, 30, 151, 193, 100]
    q, k, v, batch = paged([1] * 6, lengths, 2, group, dim, page)
    first, second = 96, 144
    batch.block_tables[3, : first // page] = batch.block_tables[5, : first // page]
    for row in (4, 0):
        batch.block_tables[row, : second // page] = batch.block_tables[1, : second // page]
    expected = reference.paged_attention(q, k, v, batch, 0.1, None, cap).clone()
    batch.seq_lens[2] = 0
    expected[2] = 0
    groups = grouped([[3, 5], [1, 4, 0]], [first, second], 6, 1)
    out = cascade_attention(q, k, v, batch.block_tables, batch.seq_lens, groups, 0.1, cap)
    assert error(out, expected) < 1e-5


def test_large_group_spans_tiles_and_no_group_is_plain_decode() -> None:
    q, k, v, batch = paged([1] * 20, [40 + i for i in range(20)], 1, 4, 64, 16)
    batch.block_tables[1:, :2] = batch.block_tables[0, :2]
    expected = reference.paged_attention(q, k, v, batch, 0.125, None)
    args = (q, k, v, batch.block_tables, batch.seq_lens)
    assert error(cascade_attention(*args, grouped([list(range(20))], [32], 20, 0), 0.125), expected) < 1e-5
    assert error(cascade_attention(*args, grouped([], [], 20, 2), 0.125), expected) < 1e-5
