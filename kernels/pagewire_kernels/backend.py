"""The interface of a back end, and the way to get one by name.

`Ops` is what a model calls; what only some back ends have is in `FusedOps` and `QuantizedOps`,
which a back end names or says that it lacks. `reference` states what each operation computes; here
is what a caller may rely on. Sampling is not part of it: runners sample, models do not.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import Batch
from .kv_cache import UNSCALED, KVScales
from .quantized import Quantized
from .quantized_rows import QuantizedRows
from .routing import Routing

MODULES = {"cpu": "pagewire_kernels.cpu", "cuda": "pagewire_kernels.cuda"}
"""Each has `OPS`, the process's one set of operations for the device."""


class PackedQuantized(Protocol):
    """Quantized matrices side by side, in a back end's own layout, as `Ops.linear` takes them."""

    @property
    def machine_code(self) -> bool:
        """Whether machine code for whole layers reads them (cpu_decode)."""
        ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def nbytes(self) -> int: ...

    def embed(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] int64 of the first matrix, [T, K] float32."""
        ...


class QuantizedExpertOps(Protocol):
    """Of a back end whose kernels read the quantized matrices of all experts at once."""

    def pack_experts(self, experts: Sequence[Sequence[Quantized]]) -> Any | None:
        """The matrices of each expert that read the same input, gate and up or down, as
        `Ops.experts` takes them; None where they differ in form, or there is no kernel for it."""
        ...


class QuantizingOps(Protocol):
    """Of a back end with products of float8 rows, and with kernels that round to such rows what
    they compute, instead of a launch behind them. Results are those of `Ops` with `Ops.linear`
    behind them, bit for bit. group: inputs that share a scale, quantized_rows.ROW: a row's."""

    def group_of(self, weight: Any, rows: int, dtype: torch.dtype) -> int | None:
        """The group with which `Ops.linear` would round so many rows of this type for a packed
        weight; None: it would not."""
        ...

    def linear(self, x: QuantizedRows, weight: Any, bias: Tensor | None = None) -> Tensor:
        """`Ops.linear` of rows that are rounded as `group_of` says."""
        ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, group: int, keep: bool
    ) -> QuantizedRows:
        """keep: with the result in x's type, too."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: int, keep: bool
    ) -> tuple[QuantizedRows, Tensor]:
        """See rms_norm."""
        ...

    def silu_mul(self, gate_up: Tensor, group: int) -> QuantizedRows: ...

    def gelu_mul(self, gate_up: Tensor, group: int) -> QuantizedRows: ...


class QuantizedOps(Protocol):
    """Of a back end that multiplies with quantized matrices."""

    @property
    def quantizing(self) -> QuantizingOps | None:
        """None: activations are not rounded."""
        ...

    @property
    def experts(self) -> QuantizedExpertOps | None:
        """None: `Ops.experts` takes each expert's matrices by themselves."""
        ...

    def pack(self, parts: Sequence[Quantized], float32_output: bool) -> PackedQuantized | None:
        """Matrices [N, K] that read the same input, side by side, for `Ops.linear`; None where
        there is no kernel for them. float32_output: `linear` gives float32."""
        ...


class FusedOps(Protocol):
    """Of a back end that has several operations in one kernel."""

    def rope_attention(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        kv_scales: KVScales = UNSCALED,
        reads_ahead: bool = True,
    ) -> Tensor:
        """rope_and_cache and paged_attention in one: qkv [T, (Hq + 2 Hkv) * D] -> [T, Hq * D].
        reads_ahead: of few rows, older keys and values are read while the kernel before still runs,
        and the next one is let in at once: faster unless these two read large matrices."""
        ...

    def takes_row(self, weight: Any) -> bool:
        """Whether the three products below take a packed weight."""
        ...

    def norm_linear(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weight: Any,
        bias: Tensor | None = None,
    ) -> Tensor:
        """linear(rms_norm(x), weight, bias) of one row: x [1, K], norm [K], weight [N, K] -> [1,
        N]."""
        ...

    def norm_gated(self, x: Tensor, norm: Tensor, eps: float, weight: Any) -> Tensor:
        """silu_mul(linear(rms_norm(x), weight)) of one row: weight [2I, K] -> [1, I]."""
        ...

    def linear_add(self, x: Tensor, weight: Any, bias: Tensor | None, residual: Tensor) -> Tensor:
        """linear(x, weight, bias) + residual of one row."""
        ...

    def takes_router(self, weight: Any) -> bool:
        """Whether norm_route takes a packed weight."""
        ...

    def norm_route(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weight: Any,
        routing: Routing,
        correction_bias: Tensor | None = None,
        slot_mapping: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(normed, *route(linear(normed, weight), ...)) of one row, normed = rms_norm(x): x [1, K],
        norm [K], weight [E, K]."""
        ...

    def experts_add(
        self,
        x: Tensor,
        gate_up: Any,
        down: Any,
        top_k_ids: Tensor,
        top_k_weights: Tensor,
        residual: Tensor,
    ) -> Tensor:
        """experts(x, gate_up, down, top_k_ids, top_k_weights) + residual of one row, with ids and
        weights from norm_route."""
        ...


class Ops(Protocol):
    """T tokens, H hidden size, I intermediate size, Hq and Hkv query and KV heads of size D; caches
    [blocks, Hkv, block_size, D], of the activations' type or of 8-bit codes, which `kv_scales`
    belong to."""

    @property
    def fused(self) -> FusedOps | None:
        """Kernels that do several operations at once; None: the back end has none."""
        ...

    @property
    def quantized(self) -> QuantizedOps | None:
        """Products with quantized matrices; None: the back end has none."""
        ...

    def pack_linear(self, weight: Tensor) -> Any:
        """weight [N, K] in whatever form `linear` is fastest with. The caller drops its own
        reference."""
        ...

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """x [T, K] times a packed weight's transpose, plus bias [N] -> [T, N]."""
        ...

    def tied_logits(self, x: Tensor, packed: Any, weight: Tensor) -> Tensor:
        """x [T, H] times the embedding's weight [V, H], which is given packed as well -> [T, V], in
        x's type or float32."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, H] over the root of its mean square, times weight [H]."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); either input may be overwritten."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """x [T, H] less its mean, over its standard deviation, times weight [H], plus bias [H]."""
        ...

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(layer_norm(x + residual), x + residual); either input may be overwritten."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2I] -> [T, I]: SiLU of the first half times the second."""
        ...

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2I] -> [T, I]: tanh-GELU of the first half times the second."""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """GELU."""
        ...

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """GELU with its tanh approximation."""
        ...

    def relu(self, x: Tensor) -> Tensor:
        """max(x, 0)."""
        ...

    def pack_experts(self, weight: Tensor) -> Any:
        """weight [E, N, K] in whatever form `experts` is fastest with. The caller drops its own
        reference."""
        ...

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, top_k_ids: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """x [T, H] -> [T, H]; top_k_ids [T, k] of any integer type, routing.NO_EXPERT for none,
        top_k_weights [T, k] float32; gate_up [E, 2I, H] and down [E, H, I] are packed."""
        ...

    def route(
        self,
        logits: Tensor,
        routing: Routing,
        correction_bias: Tensor | None = None,
        slot_mapping: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(top_k_ids int32 [T, k], top_k_weights float32 [T, k]) of a router's logits [T, E].
        correction_bias [E] float32 is added for the choice only. Tokens whose slot_mapping [T] is
        negative are padding and choose no expert."""
        ...

    def rope_and_cache(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
        kv_scales: KVScales = UNSCALED,
    ) -> Tensor:
        """Queries [T, Hq, D]; qkv may be overwritten."""
        ...

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        kv_scales: KVScales = UNSCALED,
    ) -> Tensor:
        """softcap c holds scores within +-c (c * tanh(score / c)); alibi_slopes (ALiBi) float32
        [Hq]."""
        ...


@functools.cache
def backend(name: str) -> Ops:
    """The operations for device `name`, imported on first use; the same object for everybody in
    this process. Raises ValueError for a name without a back end."""
    if name not in MODULES:
        raise ValueError(
            f"no kernels for device {name!r}; there are kernels for {', '.join(MODULES)}"
        )
    return importlib.import_module(MODULES[name]).OPS
