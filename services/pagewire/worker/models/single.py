"""A layer of the sequential block as it runs for one row alone: five kernels instead of nine, six
with a mixture of experts, where the back end has them.

Holds no weights: it borrows those of the layer it stands for. What one kernel gives is whole
already, so no residual is handed on.
"""

from collections.abc import Callable, Sequence

from pagewire_kernels.backend import FusedOps, Ops
from pagewire_kernels.batch import Batch
from torch import Tensor

from .architecture import Architecture
from .blocks import Attention, Mixture, Mlp
from .layers import Linear, RmsNorm
from .native import SequentialLayer

FeedForward = Callable[[Tensor, Batch], Tensor]
"""x [1, H] -> x + mlp(norm(x)) [1, H]."""


def serves(arch: Architecture) -> bool:
    """Whether layers of `arch` can run so: the sequential block with RMSNorm, gated SiLU without a
    bias and rotary embedding."""
    return (
        arch.block == "sequential"
        and arch.norm == "rms"
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
    if len(layer.norms) != 2 or not _take_row(fused, attention.qkv, attention.output):
        return None
    first, second = layer.norms
    assert isinstance(first, RmsNorm) and isinstance(second, RmsNorm)
    feed_forward = _feed_forward(fused, second, layer.mlp)
    return None if feed_forward is None else SingleLayer(fused, attention, first, feed_forward)


def _take_row(fused: FusedOps, *matrices: Linear) -> bool:
    return all(fused.takes_row(linear.kernel_weight) for linear in matrices)


def _feed_forward(fused: FusedOps, norm: RmsNorm, mlp: Mlp | Mixture) -> FeedForward | None:
    if isinstance(mlp, Mlp):
        return SingleMlp(fused, norm, mlp) if _take_row(fused, mlp.up, mlp.down) else None
    # a shared expert's result would be a second sum to add
    if mlp.shared is not None or not fused.takes_router(mlp.router.kernel_weight):
        return None
    return SingleMixture(fused, norm, mlp)


class SingleMlp:
    """A FeedForward in two kernels."""

    def __init__(self, fused: FusedOps, norm: RmsNorm, mlp: Mlp) -> None:
        self._fused = fused
        self._norm = norm
        self._up = mlp.up
        self._down = mlp.down

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        norm = self._norm
        inner = self._fused.norm_gated(x, norm.weight, norm.eps, self._up.kernel_weight)
        return self._fused.linear_add(inner, self._down.kernel_weight, self._down.bias, x)


class SingleMixture:
    """A FeedForward in three kernels: the router with the norm, and both products of the experts;
    four where experts are quantized."""

    def __init__(self, fused: FusedOps, norm: RmsNorm, mixture: Mixture) -> None:
        self._fused = fused
        self._norm = norm
        self._router = mixture.router
        self._routing = mixture.routing
        self._correction_bias = mixture.correction_bias
        self._experts = mixture.experts.weight

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        norm = self._norm
        normed, top_k_ids, top_k_weights = self._fused.norm_route(
            x,
            norm.weight,
            norm.eps,
            self._router.kernel_weight,
            self._routing,
            self._correction_bias,
            batch.slot_mapping,
        )
        gate_up, down = self._experts.kernel_weights
        return self._fused.experts_add(normed, gate_up, down, top_k_ids, top_k_weights, x)


class SingleLayer:
    """Called like decoder.Layer, with one token."""

    def __init__(
        self, fused: FusedOps, attention: Attention, norm: RmsNorm, feed_forward: FeedForward
    ) -> None:
        """`norm`: of attention's input."""
        self._fused = fused
        self._attention = attention
        self._norm = norm
        self._qkv = attention.qkv
        self._output = attention.output
        self._feed_forward = feed_forward

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch
    ) -> tuple[Tensor, None]:
        """x [1, H] -> [1, H]; cache [2, blocks, Hkv, block_size, D]."""
        norm = self._norm
        qkv = self._fused.norm_linear(
            x, norm.weight, norm.eps, self._qkv.kernel_weight, self._qkv.bias
        )
        attended = self._attention.after_projection(qkv, cos_sin, cache, batch)
        output = self._output
        x = self._fused.linear_add(attended, output.kernel_weight, output.bias, x)
        return self._feed_forward(x, batch), None
