"""A layer of the sequential block as it runs for one row alone: five kernels instead of nine, where
the back end has them.

Holds no weights: it borrows those of the layer it stands for. What one kernel gives is whole
already, so no residual is handed on.
"""

from collections.abc import Sequence

from pagewire_kernels.backend import FusedOps, Ops
from pagewire_kernels.batch import Batch
from torch import Tensor

from .architecture import Architecture
from .blocks import Attention, Mlp
from .layers import Linear, Norm, RmsNorm
from .native import SequentialLayer


def serves(arch: Architecture) -> bool:
    """Whether layers of `arch` can run so: the sequential block with RMSNorm, gated SiLU without a
    bias and rotary embedding."""
    return (
        arch.block == "sequential"
        and arch.norm == "rms"
        and arch.moe is None
        and arch.gated
        and arch.activation == "silu"
        and not arch.mlp_bias
        and not arch.alibi_slopes
    )


def make(arch: Architecture, ops: Ops, layers: Sequence[SequentialLayer]) -> "list[SingleLayer]":
    """One for each of `layers`, whose weights are packed; none where the architecture, the back end
    or the format of a matrix does not allow it."""
    if ops.fused is None or not serves(arch):
        return []
    singles = [_single(ops.fused, layer) for layer in layers]
    whole = [single for single in singles if single is not None]
    return whole if len(whole) == len(layers) else []


def _single(fused: FusedOps, layer: SequentialLayer) -> "SingleLayer | None":
    attention = layer.attention
    mlp = layer.mlp
    norms = layer.norms
    if not isinstance(mlp, Mlp) or len(norms) != 2:
        return None
    matrices = (attention.qkv, attention.output, mlp.up, mlp.down)
    if not all(fused.takes_row(linear.kernel_weight) for linear in matrices):
        return None
    return SingleLayer(fused, attention, mlp, norms)


class SingleLayer:
    """Called like decoder.Layer, with one token."""

    def __init__(
        self, fused: FusedOps, attention: Attention, mlp: Mlp, norms: Sequence[Norm]
    ) -> None:
        first, second = norms
        assert isinstance(first, RmsNorm) and isinstance(second, RmsNorm)
        self._fused = fused
        self._attention = attention
        self._norms = (first, second)
        self._qkv = attention.qkv
        self._output = attention.output
        self._up = mlp.up
        self._down = mlp.down

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, None]:
        """x [1, H] -> [1, H]; cache [2, blocks, Hkv, block_size, D]."""
        first, second = self._norms
        qkv = self._fused.norm_linear(
            x, first.weight, first.eps, self._qkv.kernel_weight, self._qkv.bias
        )
        attended = self._attention.after_projection(qkv, cos_sin, cache, batch)
        x = self._add(self._output, attended, x)
        inner = self._fused.norm_gated(x, second.weight, second.eps, self._up.kernel_weight)
        return self._add(self._down, inner, x), None

    def _add(self, linear: Linear, x: Tensor, residual: Tensor) -> Tensor:
        return self._fused.linear_add(x, linear.kernel_weight, linear.bias, residual)
