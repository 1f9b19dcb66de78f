"""A whole decode step, embedding to slot state, as one captured CUDA graph for each batch size
bucket.

A graph reads the slots to run from a fixed buffer and everything else from the slot state, so that
replaying it needs at most one small copy. Buckets are captured from large to small into one memory
pool. Steps whose rows have blocks in common have graphs of their own, with the groups in fixed
buffers too; they come in larger batches, so their buckets are fewer.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from pagewire_kernels import cuda as ops
from pagewire_kernels.batch import Batch
from pagewire_kernels.graph_capture import capture
from pagewire_kernels.slot_state import (
    DecodeRows,
    SlotState,
    commit,
    decode_inputs,
)
from pagewire_protocol.messages import Shared
from torch import Tensor

from ..load.loader import Loaded
from ..models.decoder import HiddenStates
from .borrowed import borrowed
from .cascade_buffers import GroupBuffers
from .stage_part import StagePart
from .staging import Uploads

Pool = Any
"""What torch.cuda.graph_pool_handle gives: memory that graphs share, since they run one after the
other."""
CASCADE_STEP: Final = 32
LEAST_CASCADE: Final = 2 * CASCADE_STEP
"""Smaller batches, whose common blocks the GPU's cache is expected to hold, are decoded plainly:
fewer kernels to compile at start."""


def buckets(most: int) -> list[int]:
    """Batch sizes with a graph of their own, rising: 1, 2, 4, then multiples of 8, of 16 above 256
    and of 32 above 512."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(544, 1025, 32)]
    return [size for size in sizes if size < most] + [most]


def cascade_buckets(most: int) -> list[int]:
    """Batch sizes with a graph for rows in groups, rising."""
    sizes = [*range(LEAST_CASCADE, 257, CASCADE_STEP), *range(384, 1025, 128)]
    return [size for size in sizes if size < most] + [most] if most >= LEAST_CASCADE else []


@dataclass
class Decoded:
    """What a step left on the device: logits [B, V]; sampled_tokens int32 [B], -1 where the logits
    were not finite. Of a pipeline stage before the last one, hidden states, and logits of no rows."""

    logits: Tensor
    sampled_tokens: Tensor
    hidden: HiddenStates | None = None

    @classmethod
    def of_stage(cls, hidden: HiddenStates) -> "Decoded":
        """What a stage before the last one leaves."""
        return cls(hidden.x[:0], hidden.x[:0], hidden)

    def lent(self) -> "Decoded":
        """The same, of a captured graph, whose pool keeps the memory."""
        if self.hidden is None:
            return Decoded(borrowed(self.logits), borrowed(self.sampled_tokens))
        x, residual = self.hidden
        return Decoded.of_stage(
            HiddenStates(borrowed(x), None if residual is None else borrowed(residual))
        )


class DecodeGraphs:
    """`run(rows, ...)` decodes the first `rows` entries of `slots`, which the caller fills (-1 is
    padding). stage: of a model that is divided into pipeline stages, else None."""

    def __init__(
        self,
        loaded: Loaded,
        state: SlotState,
        most: int,
        eager: bool,
        cascade: bool,
        pool: Pool,
        stage: StagePart | None = None,
    ) -> None:
        self._loaded = loaded
        self._stage = stage
        self._state = state
        self._eager = eager
        device = state.last_token.device
        self.slots = torch.full((most,), -1, dtype=torch.int32, device=device)
        self.sizes = buckets(most)
        self.cascade_sizes = cascade_buckets(most) if cascade else []
        self._groups = GroupBuffers(most, device)
        self._rows = DecodeRows.empty(most, state.table.shape[1], device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._sampled_tokens = torch.zeros(most, dtype=torch.int32, device=device)
        self._graphs: dict[tuple[int, bool, bool], tuple[torch.cuda.CUDAGraph, Decoded]] = {}
        self._pool = pool

    def bucket(self, rows: int) -> int:
        """The smallest captured size that holds `rows`."""
        return next(size for size in self.sizes if size >= rows)

    def group(self, shared: Shared | None, rows: int, uploads: Uploads) -> int:
        """Load the prefix groups of the next steps, of `rows` rows. Returns the bucket to `run`
        them in with cascade; 0 when that is not worthwhile."""
        if shared is None or rows < LEAST_CASCADE:
            return 0
        size = next((size for size in self.cascade_sizes if size >= rows), 0)
        if size:
            self._groups.load(shared, rows, uploads)
        return size

    def _wanted(self) -> list[tuple[int, bool]]:
        """(size, cascade) of the graphs, from large to small; filtered ones follow when they are
        needed."""
        return [
            *((size, False) for size in reversed(self.sizes)),
            *((size, True) for size in reversed(self.cascade_sizes)),
        ]

    def rehearsals(self) -> list[Callable[[], object]]:
        """What `capture_all` launches."""
        return [
            functools.partial(self._decode, size, False, cascade)
            for size, cascade in self._wanted()
        ]

    def capture_all(self, progress: Callable[[float], None]) -> None:
        """Capture each bucket."""
        wanted = self._wanted()
        for done, (size, cascade) in enumerate(wanted):
            self._capture(size, False, cascade)
            progress(done / len(wanted))

    def run(self, size: int, rows: int, filtered: bool, cascade: bool) -> Decoded:
        """`size` is a bucket, for `rows` rows; `filtered`: some row restricts the vocabulary;
        `cascade`: common blocks are read once a group. Raises CommunicatorFailed."""
        if not self._eager and (size, filtered, cascade) not in self._graphs:
            self._capture(size, filtered, cascade)
        if self._stage is not None:
            self._stage.receive(rows, size)
        if self._eager:
            return self._decode(size, filtered, cascade)
        graph, decoded = self._graphs[size, filtered, cascade]
        graph.replay()
        return decoded

    def _capture(self, size: int, filtered: bool, cascade: bool) -> None:
        """`slots` is all padding during that: neither the warm-up nor the capture may move a
        request on."""
        if self._eager:
            return
        saved = self.slots.clone()
        self.slots.fill_(-1)
        self._decode(size, filtered, cascade)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with capture(graph, self._pool):
            decoded = self._decode(size, filtered, cascade)
        self._graphs[size, filtered, cascade] = (graph, decoded.lent())
        self.slots.copy_(saved)

    def _decode(self, size: int, filtered: bool, cascade: bool) -> Decoded:
        loaded = self._loaded
        rows = self._rows.first(size)
        slots = self.slots[:size]
        decode_inputs(slots, self._state, loaded.sizing.block_size, rows)
        starts = self._starts[: size + 1]
        batch = Batch(
            rows.positions,
            rows.mapping,
            starts,
            rows.seq_lens,
            rows.tables,
            1,
            loaded.sizing.max_model_len,
        )
        batch.groups = self._groups.first(size) if cascade else None
        sampled_tokens = self._sampled_tokens[:size]
        if self._stage is None:
            logits = loaded.decoder(
                rows.tokens, loaded.cos_sin, loaded.caches, batch, None, lambda: None
            )
        else:
            hidden = self._stage.run(rows.tokens, batch)
            if not self._stage.is_last:
                # the tokens are those of the last stage, and come later
                commit(slots, sampled_tokens, sampled_tokens, self._state, sampled_tokens)
                return Decoded.of_stage(hidden)
            logits = self._stage.logits(hidden, batch, None)
        sampling = ops.SamplingRows(rows.sampling_params, rows.seeds, rows.positions, filtered)
        sampled = ops.sample(logits, sampling)
        commit(slots, sampled.tokens, sampled.bad, self._state, sampled_tokens)
        return Decoded(logits, sampled_tokens)
