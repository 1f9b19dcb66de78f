"""AWQ as AutoAWQ saves it (awq/modules/linear/gemm.py and gemv.py, awq/utils/packing_utils.py).

gemm: qweight int32 [K, N / 8], eight outputs in a word in the order ORDER; qzeros int32 [K / g,
N / 8] alike; scales float16 [K / g, N]. gemv: qweight int32 [N, K / 8] in plain order; qzeros
[N, >= K / g / 8]; scales [N, >= K / g], padded. w = (q - zero) * scale, with zero 8 where there are
no zeros.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from pagewire_kernels.quantized import Quantized
from torch import Tensor

from ...models.architecture import Unsupported
from . import affine
from .base import CheckpointFormat, Extent, Parts, check_shape, required, whole_number
from .packing import unpack_words

BITS: Final = 4
IN_A_WORD: Final = 8
ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output 0 of a word of the gemm layout is its nibble 0, output 1 its nibble 4, and so on."""
SYMMETRIC_ZERO: Final = 8


@dataclass(frozen=True)
class Awq(CheckpointFormat):
    """group_size -1: one group of all inputs."""

    name: ClassVar[str] = "awq"
    endings: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    group_size: int
    version: str

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Awq":
        """Raises Unsupported for what AutoAWQ has not."""
        bits = whole_number(config, "bits", "w_bit")
        if bits != BITS:
            raise Unsupported(f"AWQ weights of {bits} bits are not supported; only {BITS} are")
        version = str(config.get("version") or "gemm").lower()
        if version not in ("gemm", "gemv", "gemv_fast"):
            raise Unsupported(f"AWQ version {version!r} is not supported; gemm and gemv are")
        if version == "gemv_fast":
            raise Unsupported("AWQ version 'gemv_fast' is not supported; gemm and gemv are")
        return cls(whole_number(config, "group_size", "q_group_size", default=128), version)

    def title(self) -> str:
        """See CheckpointFormat."""
        return f"awq ({self.version}, 4 bits, {groups_of(self.group_size)})"

    def matrix(self, module: str, parts: Parts) -> Tensor | Quantized:
        """See CheckpointFormat."""
        qweight = required(module, parts, "qweight")
        scales = required(module, parts, "scales")
        qzeros = parts.get("qzeros")
        if self.version == "gemv":
            return self._gemv(module, qweight, qzeros, scales)
        in_features = qweight.shape[0]
        out_features = qweight.shape[1] * IN_A_WORD
        groups = num_groups(module, in_features, self.group_size)
        check_shape(module, "scales", scales, groups, out_features)
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
        if qzeros is not None:
            check_shape(module, "qzeros", qzeros, groups, out_features // IN_A_WORD)
            zeros = _in_order(unpack_words(qzeros, BITS, out_features))
        codes = _in_order(unpack_words(qweight, BITS, out_features))
        return affine.affine(codes.T.contiguous(), zeros.T, scales.T.contiguous(), BITS)

    def _gemv(
        self, module: str, qweight: Tensor, qzeros: Tensor | None, scales: Tensor
    ) -> Quantized:
        out_features = qweight.shape[0]
        in_features = qweight.shape[1] * IN_A_WORD
        groups = num_groups(module, in_features, self.group_size)
        if scales.shape[0] != out_features or scales.shape[1] < groups:
            check_shape(module, "scales", scales, out_features, groups)
        scales = scales[:, :groups]
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
        if qzeros is not None:
            words = -(-groups // IN_A_WORD)
            if qzeros.shape[0] != out_features or qzeros.shape[1] < words:
                check_shape(module, "qzeros", qzeros, out_features, words)
            zeros = unpack_words(qzeros, BITS, groups)
        codes = unpack_words(qweight, BITS, in_features)
        return affine.affine(codes, zeros, scales, BITS)

    def rounded(self, weight: Tensor) -> Tensor | Quantized:
        """See CheckpointFormat."""
        return affine.rounded(weight, BITS, self.group_size)

    def extent(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Extent:
        """See CheckpointFormat."""
        first, second = shapes["qweight"]
        if self.version == "gemv":
            return Extent(first, second * IN_A_WORD, BITS)
        return Extent(second * IN_A_WORD, first, BITS)


def _in_order(codes: Tensor) -> Tensor:
    """[R, N] with the outputs of each word in their order."""
    return codes.unflatten(1, (-1, IN_A_WORD))[:, :, list(ORDER)].flatten(1)


def num_groups(module: str, in_features: int, group_size: int) -> int:
    """Groups of a matrix. Raises Unsupported for inputs that are not whole groups."""
    group = in_features if group_size == -1 else group_size
    if group < 1 or in_features % group:
        raise Unsupported(
            f"{module} has {in_features:,} inputs, no multiple of its groups of {group}"
        )
    return in_features // group


def groups_of(group_size: int) -> str:
    """For a title."""
    return "one group a row" if group_size == -1 else f"groups of {group_size}"
