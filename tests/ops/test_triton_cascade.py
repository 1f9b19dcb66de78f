"""Cascade decode against attention row by row: several groups, rows of no group, unused groups,
padding."""

import numpy as np
import pytest
import torch
from ops.triton_cases import error, grouped, paged
from pagewire.worker.gpu.cascade_buffers import GroupBuffers
from pagewire.worker.step.slots import BadStep
from pagewire_kernels import cuda, reference
from pagewire_kernels.cascade import cascade_attention
from pagewire_protocol.agreed import MAX_PREFIX_GROUPS
from pagewire_protocol.messages import Shared, pack


@pytest.mark.parametrize(
    ("dim", "group", "page", "cap"),
    [(64, 4, 16, None), (80, 3, 16, 4.0), (128, 1, 8, None), (64, 8, 48, None)],
)
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
    assert (
        error(cascade_attention(*args, grouped([list(range(20))], [32], 20, 0), 0.125), expected)
        < 1e-5
    )
    assert error(cascade_attention(*args, grouped([], [], 20, 2), 0.125), expected) < 1e-5


def test_a_batch_with_groups_gives_what_it_gives_without_and_windows_ignore_them() -> None:
    q, k, v, batch = paged([1] * 5, [40 + i for i in range(5)], 1, 4, 64, 16)
    batch.block_tables[1:4, :2] = batch.block_tables[0, :2]
    for window in (None, 7):
        plain = cuda.paged_attention(q, k, v, batch, 0.125, window)
        batch.groups = grouped([[3, 0, 1, 2]], [32], 5, 3)
        assert error(cuda.paged_attention(q, k, v, batch, 0.125, window), plain) < 1e-5
        batch.groups = None


@pytest.mark.parametrize("grouping", [([[3, 0, 1]], [32]), ([], [])])
def test_rows_in_groups_before_chunks(grouping: tuple[list[list[int]], list[int]]) -> None:
    q, k, v, batch = paged([1, 1, 1, 1, 9, 1, 20], [60, 41, 30, 77, 50, 33, 20], 2, 3, 64, 16)
    batch.block_tables[[0, 1], :2] = batch.block_tables[3, :2]
    plain = cuda.paged_attention(q, k, v, batch, 0.125, None)
    batch.groups = grouped(*grouping, 7, 3)
    assert error(cuda.paged_attention(q, k, v, batch, 0.125, None), plain) < 1e-5


class Direct:
    """Uploads where host and device are the same."""

    def up(self, values, out):
        assert values.shape == tuple(out.shape) and values.dtype == np.int32
        return out.copy_(torch.from_numpy(values))


def shared(rows: list[list[int]], lengths: list[int]) -> Shared:
    starts = np.cumsum([0, *map(len, rows)]).tolist()
    return Shared(
        pack("i", [row for group in rows for row in group]), pack("i", starts), pack("i", lengths)
    )


def test_buffers_hold_the_groups_of_the_newest_step_alone() -> None:
    buffers = GroupBuffers(12, "cpu")
    buffers.clear()
    buffers.load(shared([[9, 2, 3], [0, 4, 5, 6]], [96, 32]), 10, Direct())
    buffers.load(shared([[1, 2]], [64]), 10, Direct())
    groups = buffers.first(12)
    assert groups.order.tolist()[:2] == [1, 2] and groups.shared.tolist() == [0, 64, 64, *[0] * 9]
    assert groups.starts.tolist() == [0] + [2] * MAX_PREFIX_GROUPS and groups.lengths.tolist() == [
        64
    ] + [0] * (MAX_PREFIX_GROUPS - 1)
    assert len(buffers.first(8).shared) == 8


def test_groups_beyond_the_buffers_are_decoded_plainly() -> None:
    buffers = GroupBuffers(32, "cpu")
    buffers.load(
        shared([[2 * i, 2 * i + 1] for i in range(10)], [16 * (i + 1) for i in range(10)]),
        20,
        Direct(),
    )
    groups = buffers.first(32)
    assert groups.starts.tolist() == list(range(0, 2 * MAX_PREFIX_GROUPS + 1, 2))
    assert groups.shared.tolist() == [16 * (i // 2 + 1) for i in range(16)] + [0] * 16


@pytest.mark.parametrize("rows", [[[0, 1], [1, 2]], [[0, 4]], [[-1, 2]]])
def test_groups_that_name_wrong_rows_are_refused(rows: list[list[int]]) -> None:
    with pytest.raises(BadStep, match="twice or beyond the step's 4"):
        GroupBuffers(8, "cpu").load(shared(rows, [16] * len(rows)), 4, Direct())


@pytest.mark.parametrize("starts", [[0], [0, 3], [1, 2], [0, 3, 2]])
def test_groups_that_do_not_add_up_are_refused(starts: list[int]) -> None:
    with pytest.raises(BadStep, match="do not add up"):
        GroupBuffers(8, "cpu").load(
            Shared(pack("i", [0, 1]), pack("i", starts), pack("i", [16] * max(1, len(starts) - 1))),
            4,
            Direct(),
        )
