"""What the GPU keeps of each slot between steps, so that a step can start before the CPU knows the
last step's tokens.

`decode_inputs` turns a list of slots into the rows that the model and the sampler read; `commit`
writes the sampled tokens back. Both run inside the captured graph of a decode step: they read
everything from the device and have fixed shapes. A slot id of -1 is a padding row.
`place_last_tokens` does for a step with prompts, which the CPU lays out, what only the device knows.
The `*_reference` functions are the oracles in plain torch.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling_map import PARAMETERS

COPY_CHUNK = 1024
LAST_TOKEN = -1
"""An id that stands for the last token of its slot, which the CPU may not know."""


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


@triton.jit(do_not_specialize=["tokens", "rows", "picks"])
def _place_last_tokens(
    ids, token_slots, positions, mapping, tokens, row_slots, query_starts, seq_lens, rows,
    picked_tokens, picked_slots, picked_positions, picks, num_computed, table, columns,
    BLOCK_SIZE: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # Three lists side by side, entry i of each: ids, which nobody changes, say what is to be moved.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(ids + i, mask=i < tokens, other=0) == LAST
    slot = tl.load(token_slots + i, mask=last, other=0)
    position = tl.load(num_computed + slot, mask=last, other=0)
    block = tl.load(table + slot * columns + position // BLOCK_SIZE, mask=last, other=0)
    tl.store(positions + i, position.to(tl.int64), mask=last)
    place = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(mapping + i, place, mask=last)

    start = tl.load(query_starts + i, mask=i < rows, other=0)
    has_tokens = tl.load(query_starts + i + 1, mask=i < rows, other=0) > start
    last = tl.load(ids + start, mask=has_tokens, other=0) == LAST
    slot = tl.load(row_slots + i, mask=last, other=0).to(tl.int64)
    tl.store(seq_lens + i, tl.load(num_computed + slot, mask=last, other=0) + 1, mask=last)

    token = tl.load(picked_tokens + i, mask=i < picks, other=0)
    last = tl.load(ids + token, mask=i < picks, other=0) == LAST
    slot = tl.load(picked_slots + i, mask=last, other=0)
    position = tl.load(num_computed + slot, mask=last, other=0)
    tl.store(picked_positions + i, position.to(tl.int64), mask=last)


def place_last_tokens(
    tokens: Tensor, rows: Tensor, picked: Tensor, state: SlotState, block_size: int
) -> None:
    """In a step of T tokens, B rows and P picked tokens, move the last tokens of slots to where the
    device has counted up to: rows may have gone without a token in a step of which the CPU knows no
    result yet. In place: tokens int64 [4, T], of which each row is contiguous, are ids, positions,
    slot mapping (places in the KV cache) and slots; rows int32 [3, more than B] slots, sequence
    lengths, and first tokens with the end behind them; picked int64 [3, P] indices of tokens, their
    slots and positions. An id of LAST_TOKEN is a row of its own."""
    ids, positions, mapping, token_slots = tokens.unbind(0)
    row_slots, seq_lens, query_starts = rows.unbind(0)
    count = min(len(row_slots) - 1, picked.shape[1])
    most = max(len(ids), count)
    _place_last_tokens[(triton.cdiv(most, 256),)](
        ids, token_slots, positions, mapping, len(ids), row_slots, query_starts, seq_lens, count,
        *picked.unbind(0), picked.shape[1], state.num_computed, state.table, state.table.shape[1],
        BLOCK_SIZE=block_size, LAST=LAST_TOKEN, BLOCK=256
    )  # fmt: skip


def place_last_tokens_reference(
    tokens: Tensor, rows: Tensor, picked: Tensor, state: SlotState, block_size: int
) -> None:
    """The oracle of `place_last_tokens`."""
    last = tokens[0] == LAST_TOKEN
    slots = tokens[3, last]
    position = state.num_computed[slots].long()
    blocks = state.table[slots].gather(1, (position // block_size)[:, None])[:, 0].long()
    tokens[1, last] = position
    tokens[2, last] = blocks * block_size + position % block_size
    starts = rows[2].tolist()
    for row in range(picked.shape[1]):
        if starts[row + 1] > starts[row] and last[starts[row]]:
            rows[1, row] = state.num_computed[rows[0, row]] + 1
    for i, token in enumerate(picked[0].tolist()):
        if last[token]:
            picked[2, i] = state.num_computed[picked[1, i]]
