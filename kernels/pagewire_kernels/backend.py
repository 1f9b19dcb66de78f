"""The interface of a back end, and the way to get one by name.

A back end is a module with the functions of `Ops`. `reference` states what each computes; here is
what a caller may rely on.
"""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor

from .batch import Batch
from .quantized import Quantized

MODULES = {"cpu": "pagewire_kernels.cpu", "cuda": "pagewire_kernels.cuda"}


class Ops(Protocol):
    """T tokens, H hidden size, I intermediate size, Hq and Hkv query and KV heads of size D; caches
    [blocks, Hkv, block_size, D]."""

    def pack_linear(self, weight: Tensor) -> Any:
        """weight [N, K] in whatever form `linear` is fastest with. The caller drops its own
        reference."""
        ...

    def pack_quantized(self, parts: Sequence[Quantized], wide: bool) -> Any:
        """Matrices [N, K] that read the same input, side by side and still quantized, for `linear`;
        None where there is no kernel for them. wide: `linear` gives float32. On the CPU only."""
        ...

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """x [T, K] times a packed weight's transpose, plus bias [N] -> [T, N]."""
        ...

    def tied_logits(self, x: Tensor, packed: Any, weight: Tensor) -> Tensor:
        """x [T, H] times the embedding's weight [V, H], which is given packed as well -> [T, V], in
        x's type or float32."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); either input may be overwritten."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor: ...

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(layer_norm(x + residual), x + residual); either input may be overwritten."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def gelu_mul(self, gate_up: Tensor) -> Tensor: ...

    def gelu(self, x: Tensor) -> Tensor: ...

    def gelu_tanh(self, x: Tensor) -> Tensor: ...

    def relu(self, x: Tensor) -> Tensor: ...

    def pack_experts(self, weight: Tensor) -> Any:
        """weight [E, N, K] in whatever form `experts` is fastest with. The caller drops its own
        reference."""
        ...

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, top_k_ids: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """x [T, H] -> [T, H]; top_k_ids [T, k] int64, top_k_weights [T, k] float32; gate_up [E, 2I, H] and
        down [E, H, I] are packed."""
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
    ) -> Tensor:
        """softcap c holds scores within +-c (c * tanh(score / c)); alibi_slopes (ALiBi) float32 [Hq]."""
        ...


def backend(name: str) -> Ops:
    """The operations for device `name`, imported on first use. Raises ValueError for a name without
    a back end."""
    if name not in MODULES:
        raise ValueError(
            f"no kernels for device {name!r}; there are kernels for {', '.join(MODULES)}"
        )
    return cast(Ops, importlib.import_module(MODULES[name]))
