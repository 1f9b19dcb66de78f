"""The norms in front of attention and MLP, which know what reads their result."""

from collections.abc import Sequence

from pagewire_kernels.backend import Ops, QuantizingOps
from pagewire_kernels.quantized_rows import Activations
from torch import Tensor

from .layers import Norm, RmsNorm
from .linear_method import InputReader


class InputNorm:
    """A norm in front of attention or MLP, with the addition before it. Where `readers`, all that
    read its result, would round that to float8 alike, it comes rounded from the same kernel, and in
    full besides where some would not. Holds no weights: it borrows the norm's."""

    def __init__(self, ops: Ops, norm: Norm, readers: Sequence[InputReader]) -> None:
        self._norm = norm
        self._readers = readers
        self._quantizing: tuple[QuantizingOps, RmsNorm] | None = None
        quantized = ops.quantized
        # ranks that add and norm in one kernel round in another one
        if quantized is not None and quantized.quantizing is not None and isinstance(norm, RmsNorm):
            self._quantizing = (quantized.quantizing, norm)

    def _rounding(self, x: Tensor) -> tuple[int, bool] | None:
        """(group, whether the result is wanted in full too), None: only that is."""
        groups = {reader.input_group(len(x), x.dtype) for reader in self._readers}
        keep = None in groups
        groups.discard(None)
        group = groups.pop() if len(groups) == 1 else None
        return None if group is None else (group, keep)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Activations, Tensor]:
        """(norm(x + residual), x + residual), both [T, H]; either input may be overwritten. A
        residual of None: there is nothing to be added to yet."""
        rounding = None if self._quantizing is None else self._rounding(x)
        if self._quantizing is None or rounding is None:
            return (self._norm(x), x) if residual is None else self._norm.add(x, residual)
        ops, norm = self._quantizing
        if residual is None:
            return ops.rms_norm(x, norm.weight, norm.eps, *rounding), x
        return ops.add_rms_norm(x, residual, norm.weight, norm.eps, *rounding)
