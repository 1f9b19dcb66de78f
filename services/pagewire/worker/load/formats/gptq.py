"""GPTQ as AutoGPTQ and GPTQModel save it.

qweight int32 [K * bits / 32, N], the codes of each output a stream along the inputs, lowest bits
first (3 bits straddle words); qzeros int32 [groups, N * bits / 32], a stream along the outputs;
scales float16 [groups, N]; g_idx int32 [K], the group of each input. w = (q - zero) * scale.
checkpoint_format "gptq" (version 1) stores zero - 1; "gptq_v2" stores zero. AutoGPTQ adds the 1 and
then keeps the lowest bits, so that a stored 15 of 4 bits is zero 0.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
from pagewire_kernels.quantized import Quantized
from torch import Tensor

from ...models.architecture import Unsupported
from . import affine
from .awq import groups_of
from .base import CheckpointFormat, Extent, Parts, check_shape, required, whole_number
from .packing import BITS_A_WORD, unpack_words, words_for

SUPPORTED_BITS: Final = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq(CheckpointFormat):
    """group_size -1: one group of all inputs. `dynamic`: settings of single modules, by regular
    expressions of their names (GPTQModel's)."""

    name: ClassVar[str] = "gptq"
    endings: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    bits: int
    group_size: int
    stored_zero_offset: int
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    act_order: bool = False
    """Inputs that share a scale do not follow each other."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Gptq":
        """Raises Unsupported for what is not GPTQ's."""
        version = str(config.get("checkpoint_format") or "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise Unsupported(
                f"GPTQ checkpoint_format {version!r} is not supported; gptq and gptq_v2 are"
            )
        bits = whole_number(config, "bits")
        _check_bits(bits, "")
        return cls(
            bits,
            whole_number(config, "group_size", default=128),
            1 if version == "gptq" else 0,
            config.get("dynamic") or {},
            bool(config.get("desc_act")),
        )

    def title(self) -> str:
        """See CheckpointFormat."""
        return f"gptq ({self.bits} bits, {groups_of(self.group_size)})"

    def matrix(self, module: str, parts: Parts) -> Tensor | Quantized:
        """See CheckpointFormat."""
        bits, group_size = self._settings(module)
        qweight = required(module, parts, "qweight")
        scales = required(module, parts, "scales")
        qzeros = required(module, parts, "qzeros")
        out_features = qweight.shape[1]
        in_features = qweight.shape[0] * BITS_A_WORD // bits
        group = in_features if group_size == -1 else group_size
        groups = -(-in_features // group)
        check_shape(module, "scales", scales, groups, out_features)
        check_shape(module, "qzeros", qzeros, groups, words_for(out_features, bits))
        codes = unpack_words(qweight.T.contiguous(), bits, in_features)
        stored = unpack_words(qzeros, bits, out_features).to(torch.int16)
        zeros = ((stored + self.stored_zero_offset) & ((1 << bits) - 1)).T
        in_turn = torch.arange(in_features, device=qweight.device) // group
        group_of = parts["g_idx"].long() if "g_idx" in parts else in_turn
        check_shape(module, "g_idx", group_of, in_features)
        if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
            raise Unsupported(f"{module}.g_idx names group {int(group_of.max())} of {groups}")
        if torch.equal(group_of, in_turn) and in_features % group == 0:
            return affine.affine(codes, zeros, scales.T.contiguous(), bits)
        return affine.dequantized(codes, zeros, scales.T, group_of)

    def rounded(self, weight: Tensor) -> Tensor | Quantized:
        """See CheckpointFormat."""
        return affine.rounded(weight, self.bits, self.group_size)

    def extent(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Extent:
        """See CheckpointFormat."""
        bits, _ = self._settings(module)
        words, rows = shapes["qweight"]
        return Extent(rows, words * BITS_A_WORD // bits, 0 if self.act_order else bits)

    def _settings(self, module: str) -> tuple[int, int]:
        """(bits, group size) of a module. The first expression that fits its name counts."""
        for pattern, overrides in self.dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                bits = whole_number(overrides, "bits", default=self.bits)
                _check_bits(bits, module)
                return bits, whole_number(overrides, "group_size", default=self.group_size)
        return self.bits, self.group_size


def _check_bits(bits: int, module: str) -> None:
    if bits not in SUPPORTED_BITS:
        where = f" of {module}" if module else ""
        raise Unsupported(
            f"GPTQ weights{where} of {bits} bits are not supported; 2, 3, 4 and 8 are"
        )
