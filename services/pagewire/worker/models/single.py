"""A layer of the sequential block as it runs for one row alone: five kernels instead of nine, where
the back end has them.

Holds no weights: it borrows those of the layer it stands for. What one kernel gives is whole
already, so no residual is handed on.
"""

from typing import Any

from pagewire_kernels.batch import Batch
from torch import Tensor

from .architecture import Architecture
from .blocks import Attention, Mlp
from .layers import Linear, RmsNorm


def serves(arch: Architecture, ops: Any) -> bool:
    """Whether layers of `arch` can run so: RMSNorm, gated SiLU without a bias, rotary embedding;
    and `ops` has the kernels."""
    plain = arch.block == "sequential" and arch.norm == "rms" and arch.moe is None
    return (
        plain
        and arch.gated
        and arch.activation == "silu"
        and not arch.mlp_bias
        and not arch.alibi_slopes
        and hasattr(ops, "norm_linear")
    )


class SingleLayer:
    """Made when the weights are in their final place."""

    def __init__(
        self, ops: Any, attention: Attention, mlp: Mlp, norms: tuple[RmsNorm, RmsNorm]
    ) -> None:
        self._ops, self._attention, self._norms = ops, attention, norms
        self._qkv, self._output = attention.qkv, attention.output
        self._up, self._down = mlp.up, mlp.down

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, None]:
        """x [1, H] -> [1, H]; cache [2, blocks, Hkv, block_size, D]."""
        ops, (first, second) = self._ops, self._norms
        qkv = ops.norm_linear(x, first.weight, first.eps, self._qkv.weight, self._qkv.bias)
        x = self._add(self._output, self._attention.after_projection(qkv, cos_sin, cache, batch), x)
        inner = ops.norm_gated(x, second.weight, second.eps, self._up.weight)
        return self._add(self._down, inner, x), None

    def _add(self, linear: Linear, x: Tensor, residual: Tensor) -> Tensor:
        return self._ops.linear_add(x, linear.weight, linear.bias, residual)
