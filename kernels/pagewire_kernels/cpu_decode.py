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
from .quantized import GROUP

MOST_TOKENS: Final = 32
"""Of a step that runs so. Beyond it the products are what counts, and those have other ways
(cpu_linear)."""


@dataclass(frozen=True)
class DecodeLayer:
    """qkv: query, key and value; up: gate and up. Norm weights, bias [N of qkv] and the weights of
    queries' and keys' norms are float32. window: tokens seen, 0 for all. scale: of scores."""

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
        out[cpu_task.L_WINDOW], out[cpu_task.L_SCALE] = self.window, float_bits(self.scale)
        return out


@dataclass(frozen=True)
class Sizes:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    gelu: bool
    """The MLP's activation is GELU's approximation by tanh, not SiLU."""


def float_bits(value: float) -> int:
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return bits


class NativeDecoder:
    def __init__(
        self, layers: Sequence[DecodeLayer], norm: Tensor, head: QuantizedLinear, sizes: Sizes
    ) -> None:
        self._layers, self._norm, self._head, self._sizes = layers, norm, head, sizes
        self._run = cpu_native.address("decode")
        self._table = np.stack([layer.fields() for layer in layers])
        self._memory: dict[str, Tensor] = {}

    def _room(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory that is kept from step to step and grows."""
        size, found = int(np.prod(shape)), self._memory.get(name)
        if found is None or found.numel() < size:
            found = self._memory[name] = torch.zeros(size, dtype=dtype)
        return found[:size].view(shape)

    def _rows_of(self, batch: Batch) -> np.ndarray:
        """Of each token, its row of the block tables, int64."""
        return np.repeat(np.arange(len(batch.seq_lens)), np.diff(batch.query_start.numpy()))

    def __call__(
        self,
        x: Tensor,
        cos_sin: list[Tensor],
        caches: list[Tensor],
        batch: Batch,
        wanted: Tensor | None,
    ) -> Tensor:
        """x [T, H] float32, overwritten -> logits [R, V] float32 of the tokens `wanted` [R] int64
        (None: of all). cos_sin [positions, D] and caches [2, blocks, Hkv, block_size, D], float32
        or bfloat16: one for each layer."""
        t, s, threads = cpu_task, self._sizes, torch.get_num_threads()
        tokens, width = len(x), s.heads * s.head_dim
        table = self._table
        table[:, t.L_ROTARY] = [factors.data_ptr() for factors in cos_sin]
        table[:, t.L_CACHE] = [cache[0].data_ptr() for cache in caches]
        table[:, t.L_VALUES] = [cache[1].data_ptr() for cache in caches]
        rows_of, tables = self._rows_of(batch), batch.block_tables
        rows = torch.arange(tokens) if wanted is None else wanted
        private = (
            max(tokens * max(s.hidden, s.inner, width) * (GROUP + 1) // GROUP, batch.max_seq_len)
            + GROUP
        )
        scratch = self._room("scratch", threads, private)
        qkv, attended = (
            self._room("qkv", tokens, self._layers[0].qkv.padded),
            self._room("attended", tokens, width),
        )
        inner = self._layers[0].up.padded // 2
        gate, up = self._room("gate", tokens, inner), self._room("up", tokens, inner)
        logits = torch.empty(len(rows), self._head.padded)
        task = np.zeros(t.T_FIELDS, np.int64)
        task[: t.T_HEAD] = (
            len(table), table.ctypes.data, tokens, s.hidden, s.heads, s.kv_heads, s.head_dim, s.inner, caches[0].shape[3], x.data_ptr(),
            batch.positions.data_ptr(), rows_of.ctypes.data, tables.data_ptr(), tables.stride(0),
            batch.slot_mapping.data_ptr(), scratch.data_ptr(), 4 * private, qkv.data_ptr(), 4 * qkv.shape[1], attended.data_ptr(),
            gate.data_ptr(), up.data_ptr(), 4 * inner, int(caches[0].dtype == torch.bfloat16), int(s.gelu), self._norm.data_ptr(),
            rows.data_ptr(), len(rows), logits.data_ptr(), 4 * self._head.padded,
        )  # fmt: skip
        task[t.T_HEAD : t.T_HEAD + MATRIX_FIELDS] = self._head.fields
        task[t.T_HEAD + MATRIX_FIELDS] = float_bits(s.eps)
        cpu_native.run(self._run, task, threads)
        return logits[:, : self._head.rows]
