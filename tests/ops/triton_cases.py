"""Random paged batches for the attention tests, with NaN wherever a kernel must not look."""

import torch
from pagewire_kernels.batch import Batch, make_batch
from pagewire_kernels.cascade import Groups
from torch import Tensor


def paged(
    counts: list[int],
    lengths: list[int],
    hkv: int,
    group: int,
    dim: int,
    page: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
):
    """(q, k_cache, v_cache, batch): distinct shuffled blocks, NaN in unused slots and in the blocks
    that padded tables point to."""
    rng = torch.Generator().manual_seed(seed)
    blocks = [-(-length // page) for length in lengths]
    order = (torch.randperm(sum(blocks), generator=rng) + 1).tolist()
    tables = [[order.pop() for _ in range(n)] for n in blocks]
    batch = make_batch(counts, lengths, [t or [0] for t in tables], page)
    k, v = (
        torch.full((sum(blocks) + 1, hkv, page, dim), float("nan"), dtype=dtype) for _ in range(2)
    )
    for table, length in zip(tables, lengths, strict=True):
        for i, block in enumerate(table):
            used = min(page, length - i * page)
            k[block, :, :used] = torch.randn(hkv, used, dim, generator=rng).to(dtype)
            v[block, :, :used] = torch.randn(hkv, used, dim, generator=rng).to(dtype)
    q = torch.randn(sum(counts), hkv * group, dim, generator=rng).to(dtype)
    return q, k, v, batch


def error(out: Tensor, ref: Tensor) -> float:
    """Relative norm of the difference; NaN when anything is."""
    return ((out.double() - ref.double()).norm() / ref.double().norm()).item()


def seq_lens_only(batch: Batch, lengths: list[int]) -> Batch:
    batch.seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return batch


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
