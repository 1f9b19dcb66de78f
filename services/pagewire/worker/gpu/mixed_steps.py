"""Steps with prompts in them, on a GPU: any mixture of chunks and single tokens, in a captured
graph where the step is small.

Launching the kernels of a step one by one takes the CPU about as long as the GPU needs for some
thousand tokens; below that a graph is replayed, padded to a bucket of tokens and of rows. Padding
belongs to a slot of its own, behind the real ones.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pagewire_kernels import cuda as ops
from pagewire_kernels.batch import Batch
from pagewire_kernels.graph_capture import capture
from pagewire_kernels.slot_state import LAST_TOKEN, SlotState, place_last_tokens
from pagewire_protocol.messages import Shared
from torch import Tensor

from ..load.gpu_memory import captured_tokens
from ..load.loader import Loaded
from ..models.decoder import LogitsHook
from ..step.apply import StepRows, spread
from ..step.slots import Ints, Slots
from .cascade_buffers import GroupBuffers
from .decode_graphs import LEAST_CASCADE, Decoded, Pool
from .mixed_graphs import Key, MixedGraphs
from .stage_part import StagePart
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
MANY_TOKENS: Final = 4096
"""What is true of one size beyond is true of those near it."""
EAGER_TOKENS: Final = 16
"""Eager steps are padded to a multiple of this: rows of buffers stay aligned, and kernels are not
compiled anew."""
WARM: Final = (16, 64, 512)
"""Sizes run once before anything is captured, beside the largest: all kernels are compiled and
loaded then."""
COLUMN_PADDING: Final = 4
"""Entries that a row of int32 columns has beyond one for each row: the end behind the last first
token, and rows of a multiple of 16 bytes."""

# Rows of Inputs.tokens.
IDS, POSITIONS, SLOT_MAPPING, TOKEN_SLOTS = range(4)
# Rows of Inputs.rows.
ROW_SLOTS, SEQ_LENS, QUERY_STARTS = range(3)
# Rows of Inputs.picked.
PICKED_TOKENS, PICKED_SLOTS, PICKED_POSITIONS = range(3)

NO_CACHE_SLOT: Final = -1
"""Keys and values of padding are written nowhere."""


@dataclass
class Inputs:
    """What a step of T tokens and B rows reads, on the device.

    tokens int64 [4, T]: ids (LAST_TOKEN: the slot's last token), positions, slot mapping and slots.
    rows int32 [3, B + COLUMN_PADDING]: slots, sequence lengths, and first tokens with the end
    behind them. picked int64 [3, B]: the tokens whose logits are sampled, their slots and
    positions.
    """

    tokens: Tensor
    rows: Tensor
    picked: Tensor

    @classmethod
    def padding(cls, tokens: int, rows: int, spare: int, device: torch.device) -> "Inputs":
        """Nothing but padding, for the slot `spare`."""
        token_columns = torch.zeros(4, tokens, dtype=torch.int64, device=device)
        token_columns[SLOT_MAPPING] = NO_CACHE_SLOT
        token_columns[TOKEN_SLOTS] = spare
        row_columns = torch.zeros(3, rows + COLUMN_PADDING, dtype=torch.int32, device=device)
        row_columns[ROW_SLOTS] = spare
        picked = torch.zeros(3, rows, dtype=torch.int64, device=device)
        picked[PICKED_SLOTS] = spare
        return cls(token_columns, row_columns, picked)


class CapturedStep(NamedTuple):
    """A graph, and where a replay reads and writes."""

    inputs: Inputs
    graph: torch.cuda.CUDAGraph
    decoded: Decoded


class MixedSteps:
    """`run` computes a step. Slots are columns on the host (`slots`) and on the device (`state`,
    which has one slot more). eager: nothing is captured. cascade: steps may bring prefix groups.
    stage: of a model that is divided into pipeline stages, else None."""

    def __init__(
        self,
        loaded: Loaded,
        slots: Slots,
        state: SlotState,
        uploads: Uploads,
        eager: bool,
        cascade: bool,
        pool: Pool,
        stage: StagePart | None = None,
    ) -> None:
        self._loaded = loaded
        self._stage = stage
        self._slots = slots
        self._state = state
        self._uploads = uploads
        self._eager = eager
        self._device = state.last_token.device
        self._groups = GroupBuffers(slots.count, self._device) if cascade else None
        self._spare = slots.count
        self._graphs = MixedGraphs(self._capture)
        self._pool = pool
        self._sizes = [size for size in TOKENS if size <= captured_tokens(loaded.decoder.arch)]

    def run(
        self,
        step: StepRows,
        host_known_len: Ints,
        shared: Shared | None,
        hook: LogitsHook | None = None,
        moved: bool = False,
    ) -> Decoded:
        """Compute `step`; the first rows of the result are those of step.sampling, in order.

        host_known_len [slots]: how many tokens of each slot the host knows. shared: prefix groups
        among the leading rows of one token. hook looks at the logits of further tokens: the step is
        then run eagerly. moved: rows of one token may begin before `step` says, where the device
        has counted up to. Raises CommunicatorFailed.
        """
        tokens = int(step.counts.sum())
        rows = self.padded(len(step.slots))
        self._take_groups(shared, step.counts)
        size = next((size for size in self._sizes if size >= tokens), 0)
        captured = self._graphs.find((size, rows)) if hook is None and size else None
        if captured is not None:
            self._fill(captured.inputs, step, host_known_len, moved)
            self._receive(tokens, captured.inputs.tokens.shape[1])
            captured.graph.replay()
            return captured.decoded
        padded_tokens = -(-tokens // EAGER_TOKENS) * EAGER_TOKENS
        inputs = self._padding(padded_tokens, rows)
        self._fill(inputs, step, host_known_len, moved)
        self._receive(tokens, padded_tokens)
        return self.forward(inputs, hook)

    def _receive(self, tokens: int, padded: int) -> None:
        if self._stage is not None:
            self._stage.receive(tokens, padded)

    def _padding(self, tokens: int, rows: int) -> Inputs:
        return Inputs.padding(tokens, rows, self._spare, self._device)

    def _take_groups(self, shared: Shared | None, counts: Ints) -> None:
        if self._groups is None:
            return
        if shared is None:
            self._groups.clear()
        else:
            # Groups are among the rows before the first chunk.
            leading = int(np.cumprod(counts == 1).sum())
            self._groups.load(shared, leading, self._uploads)

    def replay(self, tokens: int, rows: int) -> None:
        """A step of tokens that belong to no row, for its time. They are not padding, which would
        go through no expert of a mixture, and their ids differ, so that they choose unlike ones."""
        key = next(size for size in self._sizes if size >= tokens), self.padded(rows)
        captured = self._graphs.own(key)
        inputs = self._padding(*key) if captured is None else captured.inputs
        vocab_size = self._loaded.decoder.arch.vocab_size
        torch.arange(key[0], out=inputs.tokens[IDS]).remainder_(vocab_size)
        inputs.tokens[SLOT_MAPPING] = 0
        if captured is None:
            self.forward(inputs)
        else:
            captured.graph.replay()

    def probe(self) -> None:
        """A small step of padding, of more tokens than rows."""
        rows = self.row_counts()[-1]
        self.forward(self._padding(max(WARM[2], 2 * rows), rows))

    def sizes(self, largest: int) -> list[int]:
        """Token counts that steps of up to `largest` have; of the large ones a few, which stand for
        those near them."""
        small = [size for size in TOKENS if size <= min(largest, MANY_TOKENS)]
        return small + [size for size in (6144, 8192, largest) if MANY_TOKENS < size <= largest]

    def row_counts(self) -> list[int]:
        """All that `padded` gives, falling."""
        return sorted(
            {self.padded(count) for count in (1, ROWS[-1], self._slots.count)}, reverse=True
        )

    def padded(self, rows: int) -> int:
        """Rows with padding: few different numbers, since each is a compilation of the attention
        kernels."""
        return next((size for size in ROWS if rows <= size < self._slots.count), self._slots.count)

    def _fill(self, inputs: Inputs, step: StepRows, host_known_len: Ints, moved: bool) -> None:
        """Bring the step to the device, padding included, whatever `inputs` held before."""
        for values, out in (
            (self._token_columns(inputs.tokens.shape, step, host_known_len), inputs.tokens),
            (self._row_columns(inputs.rows.shape, step), inputs.rows),
            (self._picked_columns(inputs.picked.shape, step), inputs.picked),
        ):
            self._uploads.up(values, out=out)
        if moved:
            self._place_last_tokens(inputs)

    def _place_last_tokens(self, inputs: Inputs) -> None:
        place_last_tokens(
            inputs.tokens, inputs.rows, inputs.picked, self._state, self._slots.block_size
        )

    def _token_columns(self, shape: tuple[int, ...], step: StepRows, host_known_len: Ints) -> Ints:
        """Inputs.tokens: the rows' new tokens end to end, then padding."""
        host = self._slots
        block_size = self._slots.block_size
        row_of, positions = spread(step.first, step.counts)
        slots = step.slots[row_of]
        # The newest token of a decoding row was sampled by a step whose result the host has not
        # seen, so the device takes it from the slot's state.
        unknown = positions >= host_known_len[slots]
        blocks = host.tables[slots, positions // block_size].astype(np.int64)
        size = len(positions)
        columns = np.zeros(shape, np.int64)
        columns[IDS, :size] = np.where(unknown, LAST_TOKEN, host.tokens[slots, positions])
        columns[POSITIONS, :size] = positions
        columns[SLOT_MAPPING, :size] = blocks * block_size + positions % block_size
        columns[SLOT_MAPPING, size:] = NO_CACHE_SLOT
        columns[TOKEN_SLOTS, :size] = slots
        columns[TOKEN_SLOTS, size:] = self._spare
        return columns

    def _row_columns(self, shape: tuple[int, ...], step: StepRows) -> npt.NDArray[np.int32]:
        """Inputs.rows. Padding rows have no tokens: they begin where the last row ends, and their
        sequences are empty."""
        rows = len(step.slots)
        ends = np.cumsum(step.counts)
        columns = np.zeros(shape, np.int32)
        columns[ROW_SLOTS] = self._spare
        columns[ROW_SLOTS, :rows] = step.slots
        columns[SEQ_LENS, :rows] = step.end
        columns[QUERY_STARTS, 1 : rows + 1] = ends
        columns[QUERY_STARTS, rows + 1 :] = ends[-1]
        return columns

    def _picked_columns(self, shape: tuple[int, ...], step: StepRows) -> Ints:
        """Inputs.picked: the last token of each row that samples. Padding samples token 0 for the
        spare slot."""
        sampling = step.sampling
        last_tokens = np.cumsum(step.counts) - 1
        columns = np.zeros(shape, np.int64)
        columns[PICKED_SLOTS] = self._spare
        columns[PICKED_TOKENS, : len(sampling)] = last_tokens[sampling]
        columns[PICKED_SLOTS, : len(sampling)] = step.slots[sampling]
        columns[PICKED_POSITIONS, : len(sampling)] = step.end[sampling] - 1
        return columns

    def forward(self, inputs: Inputs, hook: LogitsHook | None = None) -> Decoded:
        """The kernels of one step, launched one by one. Rows of the result that were not picked for
        sampling mean nothing."""
        loaded = self._loaded
        state = self._state
        rows = inputs.picked.shape[1]
        row_slots = inputs.rows[ROW_SLOTS, :rows].long()
        batch = self._batch(inputs, row_slots)
        wanted = inputs.picked[PICKED_TOKENS]
        if self._stage is None:
            logits = loaded.decoder(
                self._token_ids(inputs),
                loaded.cos_sin,
                loaded.caches,
                batch,
                wanted,
                lambda: None,
                hook,
            )
        else:
            is_first = self._stage.is_first
            hidden = self._stage.run(self._token_ids(inputs) if is_first else None, batch)
            if not self._stage.is_last:
                state.num_computed[row_slots] = inputs.rows[SEQ_LENS, :rows]
                return Decoded.of_stage(hidden)
            logits = self._stage.logits(hidden, batch, wanted, hook)
        return self._sample(inputs, row_slots, logits)

    def _sample(self, inputs: Inputs, row_slots: Tensor, logits: Tensor) -> Decoded:
        """What `slot_state.commit` does for a decode step, after sampling: the slots move on, and
        those that sampled keep their token for the next step."""
        state = self._state
        state.num_computed[row_slots] = inputs.rows[SEQ_LENS, : len(row_slots)]
        slots = inputs.picked[PICKED_SLOTS]
        sampling = ops.SamplingRows(
            state.sampling_params[slots].T.contiguous(),
            state.seeds[slots],
            inputs.picked[PICKED_POSITIONS],
        )
        sampled = ops.sample(logits, sampling)
        tokens = sampled.tokens.int()
        state.last_token[slots] = tokens
        return Decoded(logits, torch.where(sampled.bad, -1, tokens))

    def _token_ids(self, inputs: Inputs) -> Tensor:
        ids = inputs.tokens[IDS]
        last = self._state.last_token[inputs.tokens[TOKEN_SLOTS]].long()
        return torch.where(ids < 0, last, ids)

    def _batch(self, inputs: Inputs, row_slots: Tensor) -> Batch:
        rows = len(row_slots)
        batch = Batch(
            inputs.tokens[POSITIONS],
            inputs.tokens[SLOT_MAPPING],
            inputs.rows[QUERY_STARTS, : rows + 1],
            inputs.rows[SEQ_LENS, :rows],
            self._state.table[row_slots],
            inputs.tokens.shape[1],
            self._loaded.sizing.max_model_len,
        )
        if self._groups is not None and rows >= LEAST_CASCADE:
            batch.groups = self._groups.first(rows)
        return batch

    def rehearsals(self, largest: int) -> list[Callable[[], object]]:
        """Steps of up to `largest` tokens that launch what `capture_all` does, but for the largest
        one, which need not be capturable."""
        sizes = {size for size in (*WARM, self._sizes[-1]) if size <= largest}
        return [
            functools.partial(self.forward, self._padding(size, rows))
            for rows in self.row_counts()
            for size in sizes
        ]

    def capture_all(self, largest: int, progress: Callable[[float], None]) -> None:
        """Compile what steps need, so that no request waits for a compiler, and capture a part of
        the small ones, the rest by `capture_next`. largest: most tokens of a step, which is run once as well: what does not fit into
        memory is to be known before anyone waits."""
        rows = self.row_counts()
        warm = [
            (size, count)
            for count in rows
            for size in sorted({*WARM, self._sizes[-1], largest})
            if size <= largest
        ]
        graphs: list[list[Key]] = []
        if not self._eager:
            graphs = [
                [(size, count) for size in self._captured(rows[i + 1 :], largest)]
                for i, count in enumerate(rows)
            ]
        total = len(warm) + MixedGraphs.count_at_start(graphs)
        for done, (size, count) in enumerate(warm):
            inputs = self._padding(size, count)
            self._place_last_tokens(inputs)
            self.forward(inputs)
            torch.cuda.synchronize()
            progress(done / total)
        self._graphs.start(graphs, lambda done: progress((len(warm) + done) / total))

    def capture_next(self) -> bool:
        """Capture a step that the start has put off; whether there was any."""
        return self._graphs.capture_next()

    @torch.inference_mode()
    def _capture(self, size: int, rows: int) -> "CapturedStep":
        inputs = self._padding(size, rows)
        graph = torch.cuda.CUDAGraph()
        with capture(graph, self._pool):
            decoded = self.forward(inputs)
        return CapturedStep(inputs, graph, decoded.lent())

    def _captured(self, fewer: list[int], largest: int) -> list[int]:
        """Token counts, falling, of the graphs for a row count that is used beyond `fewer` rows:
        each row has a token at least."""
        first = next((size for size in self._sizes if size >= largest), self._sizes[-1])
        return [size for size in reversed(self._sizes) if max(fewer, default=0) < size <= first]
