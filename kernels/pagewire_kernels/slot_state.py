"""What the GPU keeps of each slot between steps, so that a step can start before the CPU knows the
last step's tokens.

`decode_inputs` turns a list of slots into the rows that the model and the sampler read; `commit`
writes the sampled tokens back. Both run inside the captured graph of a decode step: they read
everything from the device and have fixed shapes. A slot id of -1 is a padding row. The
`*_reference` functions are the oracles in plain torch.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling_map import PARAMETERS

COPY_CHUNK = 1024


@dataclass
class SlotState:
    """S slots. last_token, kept_token, num_computed int32 [S]; table int32 [S, M]; sampling_params
    float32 [S, PARAMETERS]; seeds int64 [S]. kept_token: last_token as the last decode step found
    it, for those who take back what a step did."""

    last_token: Tensor
    kept_token: Tensor
    num_computed: Tensor
    table: Tensor
    sampling_params: Tensor
    seeds: Tensor

    @classmethod
    def empty(cls, slots: int, blocks: int, device: torch.device | str) -> "SlotState":
        """`slots` slots with tables of `blocks` blocks, all zero."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        sampling_params = zeros(slots, len(PARAMETERS), dtype=torch.float32)
        return cls(
            zeros(slots),
            zeros(slots),
            zeros(slots),
            zeros(slots, blocks),
            sampling_params,
            zeros(slots, dtype=torch.int64),
        )


@dataclass
class DecodeRows:
    """B rows. tokens, positions, mapping, seeds int64 [B]; seq_lens int32 [B]; tables int32
    [B, M]; sampling_params float32 [PARAMETERS, B]."""

    tokens: Tensor
    positions: Tensor
    mapping: Tensor
    seq_lens: Tensor
    tables: Tensor
    sampling_params: Tensor
    seeds: Tensor

    @classmethod
    def empty(cls, rows: int, blocks: int, device: torch.device | str) -> "DecodeRows":
        """`rows` rows with tables of `blocks` blocks, all zero."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tokens=zeros(rows),
            positions=zeros(rows),
            mapping=zeros(rows),
            seq_lens=zeros(rows, dtype=torch.int32),
            tables=zeros(rows, blocks, dtype=torch.int32),
            sampling_params=zeros(len(PARAMETERS), rows, dtype=torch.float32),
            seeds=zeros(rows),
        )

    def first(self, rows: int) -> "DecodeRows":
        """A view of the first `rows` rows."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return DecodeRows(
            **{
                name: part[:, :rows] if name == "sampling_params" else part[:rows]
                for name, part in parts.items()
            }
        )


@triton.jit
def _decode_inputs(
    slots, last_token, kept_token, num_computed, table, sampling, seeds,
    tokens, positions, mapping, seq_lens, rows, row_sampling, row_seeds,
    columns, sampling_stride, NUM_PARAMETERS: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    live = slot >= 0
    slot = tl.maximum(slot, 0)
    position = tl.load(num_computed + slot)
    block = tl.load(table + slot * columns + position // BLOCK_SIZE).to(tl.int64)
    length = tl.where(live, position + 1, 0)
    token = tl.load(last_token + slot)
    tl.store(kept_token + slot, token, mask=live)
    tl.store(tokens + row, tl.where(live, token, 0).to(tl.int64))
    tl.store(positions + row, tl.where(live, position, 0).to(tl.int64))
    tl.store(mapping + row, tl.where(live, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    tl.store(seq_lens + row, length)
    tl.store(row_seeds + row, tl.load(seeds + slot))
    for i in tl.static_range(NUM_PARAMETERS):
        value = tl.load(sampling + slot * NUM_PARAMETERS + i)
        tl.store(row_sampling + i * sampling_stride + row, value)
    used = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
    for start in range(0, used, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = column < used
        tl.store(
            rows + row * columns + column,
            tl.load(table + slot * columns + column, mask=inside),
            mask=inside,
        )


def decode_inputs(slots: Tensor, state: SlotState, block_size: int, out: DecodeRows) -> None:
    """Fill `out` for the next token of each of `slots` [B] int32. Of a block table row only the
    used part is written. Padding rows get token 0, position 0, mapping -1 and length 0."""
    _decode_inputs[(slots.shape[0],)](
        slots, state.last_token, state.kept_token, state.num_computed, state.table, state.sampling_params, state.seeds,
        out.tokens, out.positions, out.mapping, out.seq_lens, out.tables, out.sampling_params, out.seeds,
        state.table.shape[1], out.sampling_params.stride(0), NUM_PARAMETERS=len(PARAMETERS), BLOCK_SIZE=block_size,
        CHUNK=COPY_CHUNK
    )  # fmt: skip


def decode_inputs_reference(slots: Tensor, state: SlotState, block_size: int) -> DecodeRows:
    """The values that `decode_inputs` writes; block table entries past a row's length are
    meaningless."""
    live = slots >= 0
    slot = slots.clamp(min=0).long()
    position = torch.where(live, state.num_computed[slot], 0).long()
    tables = state.table[slot]
    block = tables.gather(1, (position // block_size)[:, None])[:, 0].long()
    mapping = torch.where(live, block * block_size + position % block_size, -1)
    tokens = torch.where(live, state.last_token[slot], 0).long()
    lengths = torch.where(live, position + 1, 0).int()
    return DecodeRows(
        tokens,
        position,
        mapping,
        lengths,
        tables,
        state.sampling_params[slot].T,
        state.seeds[slot],
    )


@triton.jit
def _commit(slots, sampled, bad, last_token, num_computed, sampled_tokens, n, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row, mask=row < n, other=-1).to(tl.int64)
    live = slot >= 0
    token = tl.load(sampled + row, mask=row < n, other=0).to(tl.int32)
    tl.store(last_token + slot, token, mask=live)
    tl.store(num_computed + slot, tl.load(num_computed + slot, mask=live, other=0) + 1, mask=live)
    tl.store(
        sampled_tokens + row,
        tl.where(tl.load(bad + row, mask=row < n, other=0) != 0, -1, token),
        mask=row < n,
    )


def commit(
    slots: Tensor, sampled: Tensor, bad: Tensor, state: SlotState, sampled_tokens: Tensor
) -> None:
    """After a decode step: each row's slot gets its sampled token [B] and one more computed token;
    `sampled_tokens` [B] int32 gets the token, or -1 where the row is `bad` [B] bool. Slots must
    differ."""
    n = slots.shape[0]
    _commit[(triton.cdiv(n, 256),)](
        slots, sampled, bad, state.last_token, state.num_computed, sampled_tokens, n, BLOCK=256
    )


def commit_reference(
    slots: Tensor, sampled: Tensor, bad: Tensor, state: SlotState, sampled_tokens: Tensor
) -> None:
    """The oracle of `commit`."""
    live = slots >= 0
    state.last_token[slots[live].long()] = sampled[live].int()
    state.num_computed[slots[live].long()] += 1
    sampled_tokens.copy_(torch.where(bad, -1, sampled))
