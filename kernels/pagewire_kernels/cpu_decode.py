"""All layers and the head of a plain decoder for a few tokens, in one piece of machine code on a
CPU: at one token, a call of torch costs more than most of what it computes, and a layer has twenty
of them.

For decoders of the sequential kind with RMSNorm, rotary embedding and a gated MLP, whose matrices
are all quantized. Within, everything is float32, whatever the type of the caches.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from . import cpu_native, cpu_task
from .batch import Batch
from .cpu_linear import QuantizedLinear
from .cpu_task import MATRIX_FIELDS
from .kv_cache import FP8, UNSCALED, KVScales
from .quantized import GROUP

MOST_TOKENS: Final = 32
"""Of a step that runs so. Beyond it the products are what counts, and those have other ways
(cpu_linear)."""
CACHE_TYPES: Final = {
    torch.float32: cpu_task.CACHE_FLOAT32,
    torch.bfloat16: cpu_task.CACHE_BFLOAT16,
    FP8: cpu_task.CACHE_E4M3,
}


@dataclass(frozen=True)
class DecodeLayer:
    """qkv: query, key and value; up: gate and up. Norm weights, bias [N of qkv] and the weights of
    queries' and keys' norms are float32. window: tokens seen, 0 for all. scale: of scores,
    without that of keys; kv_scales: of caches of 8-bit codes, UNSCALED of others."""

    qkv: QuantizedLinear
    output: QuantizedLinear
    up: QuantizedLinear
    down: QuantizedLinear
    norm: Tensor
    norm2: Tensor
    bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    window: int
    scale: float
    kv_scales: KVScales = UNSCALED

    def fits(self, width: int) -> bool:
        """Whether the machine code can run it; `width`: query heads times their size. Sums by
        groups cover whole groups only."""
        even = (
            width % GROUP == 0 and self.down.columns % GROUP == 0 and self.qkv.columns % GROUP == 0
        )
        return even and len(self.qkv.panels) == 3 and len(self.up.panels) == 2

    def fields(self) -> np.ndarray:
        """int64 [L_FIELDS], without what changes: rotary table and cache."""
        out = np.zeros(cpu_task.L_FIELDS, np.int64)
        matrices = np.concatenate(
            [part.fields for part in (self.qkv, self.output, self.up, self.down)]
        )
        out[: len(matrices)] = matrices
        given = (self.norm, self.norm2, self.query_norm, self.key_norm, self.bias)
        out[cpu_task.L_NORM : cpu_task.L_BIAS + 1] = [
            0 if x is None else x.data_ptr() for x in given
        ]
        out[cpu_task.L_WINDOW] = self.window
        out[cpu_task.L_SCALE] = float_bits(self.scale * self.kv_scales.k)
        out[cpu_task.L_KEY_SCALE] = float_bits(self.kv_scales.k)
        out[cpu_task.L_VALUE_SCALE] = float_bits(self.kv_scales.v)
        return out


@dataclass(frozen=True)
class Sizes:
    """Of the decoder: features, heads and elements, the same in all layers."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    gelu: bool
    """The MLP's activation is GELU's approximation by tanh, not SiLU."""


def float_bits(value: float) -> int:
    """The bits of a float32, as a task holds it."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return bits


class NativeDecoder:
    """The decoder as one function; keeps its buffers from step to step."""

    def __init__(
        self, layers: Sequence[DecodeLayer], norm: Tensor, head: QuantizedLinear, sizes: Sizes
    ) -> None:
        self._layers = layers
        self._norm = norm
        self._head = head
        self._sizes = sizes
        self._run = cpu_native.address("decode")
        self._table = np.stack([layer.fields() for layer in layers])
        self._memory: dict[str, Tensor] = {}

    def _room(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory that is kept from step to step and grows."""
        size = int(np.prod(shape))
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            memory = self._memory[name] = torch.zeros(size, dtype=dtype)
        return memory[:size].view(shape)

    def _rows_of(self, batch: Batch) -> np.ndarray:
        """Of each token, its row of the block tables, int64."""
        return np.repeat(np.arange(len(batch.seq_lens)), np.diff(batch.query_start.numpy()))

    def __call__(
        self,
        x: Tensor,
        cos_sin: list[Tensor],
        caches: list[Tensor],
        batch: Batch,
        logits_indices: Tensor | None,
    ) -> Tensor:
        """x [T, H] float32, overwritten -> logits [R, V] float32 of the tokens `logits_indices` [R]
        int64 (None: of all). cos_sin [positions, D] and caches [2, blocks, Hkv, block_size, D],
        float32, bfloat16 or 8-bit codes: one for each layer."""
        t = cpu_task
        threads = torch.get_num_threads()
        rows = torch.arange(len(x)) if logits_indices is None else logits_indices
        rows_of = self._rows_of(batch)
        logits = torch.empty(len(rows), self._head.padded)
        self._point_to(cos_sin, caches)
        task = self._task(x, caches[0], batch, threads)
        task[t.T_ROW_OF] = rows_of.ctypes.data
        task[t.T_LOGITS_INDICES] = rows.data_ptr()
        task[t.T_COUNT] = len(rows)
        task[t.T_LOGITS] = logits.data_ptr()
        task[t.T_LOGITS_STRIDE] = 4 * self._head.padded
        cpu_native.run(self._run, task, threads)
        return logits[:, : self._head.rows]

    def _point_to(self, cos_sin: list[Tensor], caches: list[Tensor]) -> None:
        """Write into the layers' fields what may have moved since the last step."""
        t = cpu_task
        table = self._table
        table[:, t.L_ROTARY] = [factors.data_ptr() for factors in cos_sin]
        table[:, t.L_CACHE] = [cache[0].data_ptr() for cache in caches]
        table[:, t.L_VALUES] = [cache[1].data_ptr() for cache in caches]

    def _task(self, x: Tensor, cache: Tensor, batch: Batch, threads: int) -> np.ndarray:
        """int64 [T_FIELDS]: sizes, the batch's columns, and the buffers that the layers hand their
        results on in; without rows and logits. Strides are bytes. The caller keeps all of it alive
        until the task has run."""
        t = cpu_task
        s = self._sizes
        tokens = len(x)
        width = s.heads * s.head_dim
        # of a thread: the inputs of all tokens with their sums by group, or the scores of one head
        longest = max(s.hidden, s.inner, width)
        private = max(tokens * longest * (GROUP + 1) // GROUP, batch.max_seq_len) + GROUP
        inner = self._layers[0].up.padded // 2
        scratch = self._room("scratch", threads, private)
        qkv = self._room("qkv", tokens, self._layers[0].qkv.padded)
        attended = self._room("attended", tokens, width)
        gate = self._room("gate", tokens, inner)
        up = self._room("up", tokens, inner)

        task = np.zeros(t.T_FIELDS, np.int64)
        task[t.T_LAYERS] = len(self._table)
        task[t.T_TABLE] = self._table.ctypes.data
        task[t.T_TOKENS] = tokens
        task[t.T_HIDDEN] = s.hidden
        task[t.T_HEADS] = s.heads
        task[t.T_KV_HEADS] = s.kv_heads
        task[t.T_SIZE] = s.head_dim
        task[t.T_INNER] = s.inner
        task[t.T_BLOCK] = cache.shape[3]
        task[t.T_CACHE] = CACHE_TYPES[cache.dtype]
        task[t.T_GELU] = int(s.gelu)

        task[t.T_X] = x.data_ptr()
        task[t.T_POSITIONS] = batch.positions.data_ptr()
        task[t.T_TABLES] = batch.block_tables.data_ptr()
        task[t.T_TABLE_STRIDE] = batch.block_tables.stride(0)
        task[t.T_SLOTS] = batch.slot_mapping.data_ptr()

        task[t.T_SCRATCH] = scratch.data_ptr()
        task[t.T_SCRATCH_BYTES] = 4 * private
        task[t.T_QKV] = qkv.data_ptr()
        task[t.T_QKV_STRIDE] = 4 * qkv.shape[1]
        task[t.T_ATTENDED] = attended.data_ptr()
        task[t.T_GATE] = gate.data_ptr()
        task[t.T_UP] = up.data_ptr()
        task[t.T_INNER_STRIDE] = 4 * inner

        task[t.T_NORM] = self._norm.data_ptr()
        task[t.T_HEAD : t.T_HEAD + MATRIX_FIELDS] = self._head.fields
        task[t.T_HEAD + MATRIX_FIELDS] = float_bits(s.eps)
        return task
