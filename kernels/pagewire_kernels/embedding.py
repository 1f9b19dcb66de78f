"""Rows of the embedding table by token id."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import triton
import triton.language as tl


@triton.jit
def _embedding(ids, table, out, vocabulary, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row).to(tl.int64)
    known = (token >= 0) & (token < vocabulary)
    value = tl.load(table + token * H + i, mask=(i < H) & known, other=0.0)
    tl.store(out + row.to(tl.int64) * H + i, value, mask=i < H)


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids [T] int, table [V, H] -> [T, H]. An id outside the table, as padding rows have, gives
    zeros."""
    rows = ids.shape[0]
    vocabulary, width = table.shape
    out = torch.empty(rows, width, dtype=table.dtype, device=table.device)
    block = min(2048, triton.next_power_of_2(width))
    if rows:
        _embedding[(rows, triton.cdiv(width, block))](
            ids, table, out, vocabulary, H=width, BLOCK=block, num_warps=4
        )
    return out
