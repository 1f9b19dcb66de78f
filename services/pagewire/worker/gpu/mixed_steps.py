"""Steps with prompts in them, on a GPU: any mixture of chunks and single tokens, in a captured
graph where the step is small.

Launching the kernels of a step one by one takes the CPU about as long as the GPU needs for some
thousand tokens; below that a graph is replayed, padded to a bucket of tokens and of rows. What is
padding belongs to a slot of its own, behind the real ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from pagewire_kernels import cuda as ops
from pagewire_kernels.batch import Batch
from pagewire_kernels.slot_state import SlotState
from pagewire_protocol.messages import Shared
from torch import Tensor

from ..load.gpu_memory import captured_tokens
from ..load.loader import Loaded
from ..models.decoder import LogitsHook
from ..step.apply import spread
from ..step.slots import Ints, Slots
from .borrowed import borrowed
from .cascade_buffers import GroupBuffers
from .decode_graphs import LEAST_CASCADE, Decoded, Pool
from .staging import Uploads

ROWS: Final = (16, 64)
TOKENS: Final = (
    *range(16, 128, 16),
    *range(128, 512, 32),
    *range(512, 2048, 64),
    *range(2048, 4096, 256),
    *range(4096, 8193, 512),
)
"""Sizes of captured steps, as far as the model's `captured_tokens`."""
APART: Final = 4096
"""What is true of one size beyond is true of those near it."""
EAGER_TOKENS: Final = 16
"""Eager steps are padded to a multiple of this: rows of buffers stay aligned, and kernels are not
compiled anew."""
WARM: Final = (16, 64, 512)
"""Sizes run once before anything is captured, beside the largest: all kernels are compiled and
loaded then."""


@dataclass
class Inputs:
    """What a step reads, on the device. flat int64 [4, T]: token ids (-1: the slot's last token),
    positions, places in the cache, slots. rows int32 [3, B + 4]: slots, lengths, first tokens and
    the end. picked int64 [3, B]: the tokens whose logits are sampled, their slots, their
    positions."""

    flat: Tensor
    rows: Tensor
    picked: Tensor

    @classmethod
    def idle(cls, tokens: int, rows: int, spare: int) -> "Inputs":
        """Nothing but padding, for the slot `spare`."""
        flat = torch.zeros(4, tokens, dtype=torch.int64, device="cuda")
        flat[2], flat[3] = -1, spare
        columns = torch.zeros(3, rows + 4, dtype=torch.int32, device="cuda")
        columns[0] = spare
        picked = torch.zeros(3, rows, dtype=torch.int64, device="cuda")
        picked[1] = spare
        return cls(flat, columns, picked)


class MixedSteps:
    """`run` computes a step. Slots are columns on the host (`slots`) and on the device (`state`,
    which has one slot more)."""

    def __init__(
        self,
        loaded: Loaded,
        slots: Slots,
        state: SlotState,
        uploads: Uploads,
        eager: bool,
        cascade: bool,
        pool: Pool,
    ) -> None:
        self._loaded, self._slots, self._state, self._uploads, self._eager = (
            loaded,
            slots,
            state,
            uploads,
            eager,
        )
        self._groups = GroupBuffers(slots.count, "cuda") if cascade else None
        self._spare = slots.count
        self._inputs: dict[tuple[int, int], Inputs] = {}
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Decoded]] = {}
        self._pool = pool
        self._sizes = [size for size in TOKENS if size <= captured_tokens(loaded.decoder.arch)]

    def run(
        self,
        slots: Ints,
        counts: Ints,
        first: Ints,
        end: Ints,
        sampling: Ints,
        told: Ints,
        shared: Shared | None,
        tap: LogitsHook | None = None,
    ) -> Decoded:
        """The slots `slots` compute `counts` tokens each, positions `first` to `end`; `sampling`
        are the indices of those that then sample one, and the first rows of the result are theirs,
        in order. `told`: how many tokens of each slot the host knows. `shared`: groups among the
        leading rows of one token. `tap` looks at the logits of further tokens: the step is then run
        eagerly."""
        tokens, rows = int(counts.sum()), self.padded(len(slots))
        self._group(shared, counts)
        size = next((size for size in self._sizes if size >= tokens), 0)
        if tap is None and (size, rows) in self._graphs:
            self._fill(self._inputs[size, rows], slots, counts, first, end, sampling, told)
            graph, decoded = self._graphs[size, rows]
            graph.replay()
            return decoded
        inputs = Inputs.idle(-(-tokens // EAGER_TOKENS) * EAGER_TOKENS, rows, self._spare)
        self._fill(inputs, slots, counts, first, end, sampling, told)
        return self.forward(inputs, tap)

    def _group(self, shared: Shared | None, counts: Ints) -> None:
        if self._groups is None:
            return
        if shared is None:
            self._groups.clear()
        else:
            self._groups.load(shared, int(np.cumprod(counts == 1).sum()), self._uploads)

    def replay(self, tokens: int, rows: int) -> None:
        """A step of padding alone, for its time."""
        key = next(size for size in self._sizes if size >= tokens), self.padded(rows)
        if key in self._graphs:
            self._graphs[key][0].replay()
        else:
            self.forward(Inputs.idle(*key, self._spare))

    def probe(self) -> None:
        """A small step of padding, of more tokens than rows."""
        rows = self.row_counts()[-1]
        self.forward(Inputs.idle(max(WARM[2], 2 * rows), rows, self._spare))

    def sizes(self, largest: int) -> list[int]:
        """Token counts that steps of up to `largest` have; of the large ones, those that others are
        near to."""
        return [size for size in TOKENS if size <= min(largest, APART)] + [
            size for size in (6144, 8192, largest) if APART < size <= largest
        ]

    def row_counts(self) -> list[int]:
        """All that `padded` gives, falling."""
        return sorted(
            {self.padded(count) for count in (1, ROWS[-1], self._slots.count)}, reverse=True
        )

    def padded(self, rows: int) -> int:
        """Rows with padding: few different numbers, since each is a compilation of the attention
        kernels."""
        return next((size for size in ROWS if rows <= size < self._slots.count), self._slots.count)

    def _fill(
        self,
        inputs: Inputs,
        slots: Ints,
        counts: Ints,
        first: Ints,
        end: Ints,
        sampling: Ints,
        told: Ints,
    ) -> None:
        host, page = self._slots, self._slots.block_size
        rows, positions = spread(first, counts)
        mine, size = slots[rows], len(rows)
        flat = np.zeros(inputs.flat.shape, np.int64)
        flat[0, :size] = np.where(positions >= told[mine], -1, host.tokens[mine, positions])
        flat[1, :size], flat[3, :size] = positions, mine
        flat[2, :size] = (
            host.tables[mine, positions // page].astype(np.int64) * page + positions % page
        )
        flat[2, size:], flat[3, size:] = -1, self._spare
        columns = np.zeros(inputs.rows.shape, np.int32)
        columns[0] = self._spare
        columns[0, : len(slots)], columns[1, : len(slots)] = slots, end
        columns[2, 1 : len(slots) + 1] = np.cumsum(counts)
        columns[2, len(slots) + 1 :] = size
        picked = np.zeros(inputs.picked.shape, np.int64)
        picked[1] = self._spare
        picked[:, : len(sampling)] = np.stack(
            (np.cumsum(counts)[sampling] - 1, slots[sampling], end[sampling] - 1)
        )
        for values, out in ((flat, inputs.flat), (columns, inputs.rows), (picked, inputs.picked)):
            self._uploads.up(values, out=out)

    def forward(self, inputs: Inputs, tap: LogitsHook | None = None) -> Decoded:
        """The kernels of one step, launched one by one. Rows of the result that were not picked for
        sampling mean nothing."""
        loaded, state, flat = self._loaded, self._state, inputs.flat
        rows, most = inputs.picked.shape[1], loaded.sizing.max_model_len
        index = inputs.rows[0, :rows].long()
        lengths = inputs.rows[1, :rows]
        ids = torch.where(flat[0] < 0, state.last_token[flat[3]].long(), flat[0])
        batch = Batch(
            flat[1],
            flat[2],
            inputs.rows[2, : rows + 1],
            lengths,
            state.table[index],
            flat.shape[1],
            most,
        )
        batch.groups = (
            self._groups.first(rows) if self._groups is not None and rows >= LEAST_CASCADE else None
        )
        logits = loaded.decoder(
            ids, loaded.cos_sin, loaded.caches, batch, inputs.picked[0], lambda: None, tap
        )
        state.computed[index] = lengths
        places = inputs.picked[1]
        heat, top_p, min_p = (column.contiguous() for column in state.odds[places].unbind(1))
        drawn = ops.SamplingRows(
            heat, state.top_k[places], top_p, min_p, state.seeds[places], inputs.picked[2]
        )
        sampled = ops.sample(logits, drawn)
        tokens = sampled.tokens.int()
        state.last_token[places] = tokens
        return Decoded(logits, torch.where(sampled.bad, -1, tokens))

    def capture_all(self, largest: int, progress: Callable[[float], None]) -> None:
        """Compile what steps need, so that no request waits for a compiler, and capture the small
        ones. largest: most tokens of a step, which is run once as well: what does not fit into
        memory is to be known before anyone waits."""
        rows = self.row_counts()
        warm = [
            (size, count)
            for count in rows
            for size in sorted({*WARM, self._sizes[-1], largest})
            if size <= largest
        ]
        graphs = (
            [
                (size, count)
                for i, count in enumerate(rows)
                for size in self._captured(rows[i + 1 :], largest)
            ]
            if not self._eager
            else []
        )
        for done, (size, count) in enumerate(warm):
            self.forward(Inputs.idle(size, count, self._spare))
            torch.cuda.synchronize()
            progress(done / (len(warm) + len(graphs)))
        for done, (size, count) in enumerate(graphs, len(warm)):
            self._capture(size, count)
            progress(done / (len(warm) + len(graphs)))

    def _capture(self, size: int, rows: int) -> None:
        inputs = self._inputs[size, rows] = Inputs.idle(size, rows, self._spare)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            decoded = self.forward(inputs)
        self._graphs[size, rows] = (
            graph,
            Decoded(borrowed(decoded.logits), borrowed(decoded.report)),
        )

    def _captured(self, fewer: list[int], largest: int) -> list[int]:
        """Token counts, falling, of the graphs for a row count that is used beyond `fewer` rows:
        each row has a token at least."""
        first = next((size for size in self._sizes if size >= largest), self._sizes[-1])
        return [size for size in reversed(self._sizes) if max(fewer, default=0) < size <= first]
