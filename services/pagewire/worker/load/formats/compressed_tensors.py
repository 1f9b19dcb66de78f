"""compressed-tensors, as LLM Compressor saves it (its compressors' `pack_quantized`,
`int_quantized` and `float_quantized`).

pack-quantized: weight_packed int32 [N, K * bits / 32], the codes of each output a stream along the
inputs, stored with 2^(bits - 1) added; weight_scale [N, groups]; weight_zero_point, where there is
one, int32 [N * bits / 32, groups], a stream along the outputs; weight_shape [2]; weight_g_idx [K]
where groups do not follow each other. int-quantized: weight int8 [N, K]. float-quantized: weight
float8_e4m3fn [N, K], weight_scale [1], [N, 1] or one for each block. w = (q - zero) * scale.
Where the configuration rounds activations to float8 (`input_activations`), products on a GPU may;
those of int8 stay in 16 bits, which is no less exact.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from pagewire_kernels.quantized import Quantized
from torch import Tensor

from ...models.architecture import Unsupported
from . import affine, fp8
from .base import CheckpointFormat, Extent, Parts, check_shape, required, whole_number
from .packing import BITS_A_WORD, unpack_words, words_for

LAYOUTS: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
MIXED: Final = "mixed-precision"
"""Each group of modules has a format of its own."""
LINEAR: Final = "Linear"
"""A target that means every linear layer."""
INT8: Final = 8


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are quantized. targets: names, `re:` expressions, Linear.
    block: rows and columns that share a scale, where it is one for each block."""

    targets: tuple[str, ...]
    bits: int
    is_float: bool
    quantize_inputs: bool = False
    block: tuple[int, int] | None = None

    @classmethod
    def read(cls, group: Mapping[str, Any]) -> "Scheme":
        """Of one of `config_groups`. Raises Unsupported."""
        weights = group.get("weights") or {}
        bits = whole_number(weights, "num_bits")
        is_float = weights.get("type", "int") == "float"
        if is_float and bits != INT8:
            raise Unsupported(
                f"compressed-tensors weights of type float and {bits} bits are not supported; "
                f"float of 8 bits and int of 1 to 8 are"
            )
        if not 1 <= bits <= INT8:
            raise Unsupported(f"compressed-tensors weights of {bits} bits are not supported")
        targets = tuple(group.get("targets") or (LINEAR,))
        quantize_inputs = bool(group.get("input_activations"))
        return cls(targets, bits, is_float, quantize_inputs, _block(weights))

    def names(self, module: str) -> bool:
        """Whether a target names this module, other than by its class."""
        return any(
            re.match(target[3:], module) if target.startswith("re:") else module.endswith(target)
            for target in self.targets
            if target != LINEAR
        )


@dataclass(frozen=True)
class CompressedTensors(CheckpointFormat):
    """With the schemes in the order of the configuration."""

    name: ClassVar[str] = "compressed-tensors"
    endings: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )
    markers: ClassVar[tuple[str, ...]] = ("weight_scale",)
    unused: ClassVar[tuple[str, ...]] = (
        ".input_scale",
        ".input_zero_point",
        ".output_scale",
    )
    layout: str
    schemes: tuple[Scheme, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "CompressedTensors":
        """Raises Unsupported for formats that are not built, by name."""
        groups = (config.get("config_groups") or {}).values()
        layout = _layout(config.get("format"), groups)
        schemes = tuple(map(Scheme.read, groups))
        sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise Unsupported(
                f"compressed-tensors sparsity {sparsity!r} is not supported; dense weights are"
            )
        if not schemes:
            raise Unsupported(
                "compressed-tensors without config_groups says nothing of its weights"
            )
        return cls(layout, schemes)

    def title(self) -> str:
        """See CheckpointFormat."""
        kinds = sorted(
            {f"{'float' if scheme.is_float else 'int'} {scheme.bits}" for scheme in self.schemes}
        )
        return f"compressed-tensors ({self.layout}, {', '.join(kinds)} bits)"

    def matrix(self, module: str, parts: Parts) -> Tensor | Quantized:
        """See CheckpointFormat."""
        if "weight_packed" in parts:
            return self._packed(module, parts)
        weight = required(module, parts, "weight")
        scale = required(module, parts, "weight_scale")
        if weight.dtype.is_floating_point:
            scheme = self._scheme(module)
            return fp8.quantized(module, weight, scale, scheme.block, scheme.quantize_inputs)
        if weight.dtype != torch.int8:
            raise Unsupported(f"{module}.weight is {weight.dtype}, where int8 is expected")
        scale = _scales(module, scale, weight.shape)
        zero = parts.get("weight_zero_point")
        zeros = torch.zeros_like(scale) if zero is None else zero.reshape(scale.shape).float()
        minimum = -zeros * scale.float()
        return Quantized(weight, scale.float(), minimum if bool(minimum.any()) else None)

    def _packed(self, module: str, parts: Parts) -> Tensor | Quantized:
        packed = parts["weight_packed"]
        scale = required(module, parts, "weight_scale")
        rows, columns = (int(size) for size in required(module, parts, "weight_shape"))
        bits = self._scheme(module).bits
        check_shape(module, "weight_packed", packed, rows, words_for(columns, bits))
        offset = 1 << (bits - 1)
        codes = unpack_words(packed, bits, columns)
        scale = _scales(module, scale, torch.Size((rows, columns)))
        groups = scale.shape[1]
        # Codes are stored with the offset, and zero points as well.
        zeros = torch.full_like(scale, offset, dtype=torch.float32)
        if "weight_zero_point" in parts:
            stored = parts["weight_zero_point"]
            check_shape(module, "weight_zero_point", stored, words_for(rows, bits), groups)
            zeros = unpack_words(stored.T.contiguous(), bits, rows).T.float()
        group = -(-columns // groups)
        in_turn = torch.arange(columns, device=packed.device) // group
        group_of = parts.get("weight_g_idx", in_turn).long()
        # Some versions write -1 for each input where the groups follow each other.
        if bool((group_of < 0).all()):
            group_of = in_turn
        if torch.equal(group_of, in_turn) and columns % groups == 0:
            return affine.affine(codes, zeros, scale, bits)
        return affine.dequantized(codes, zeros, scale, group_of)

    def extent(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Extent:
        """See CheckpointFormat."""
        if "weight_packed" in shapes:
            bits = self._scheme(module).bits
            rows, words = shapes["weight_packed"]
            return Extent(rows, words * BITS_A_WORD // bits, bits)
        rows, columns = shapes["weight"]
        is_float = self._scheme(module).is_float
        return Extent(rows, columns, 0 if is_float else INT8, is_float)

    def _scheme(self, module: str) -> Scheme:
        """One that names the module, else the one for linear layers."""
        by_name = [scheme for scheme in self.schemes if scheme.names(module)]
        by_class = [scheme for scheme in self.schemes if LINEAR in scheme.targets]
        schemes = by_name or by_class
        if not schemes:
            raise Unsupported(f"no config group of the quantization names {module}")
        return schemes[0]


def _layout(layout: object, groups: Iterable[Mapping[str, Any]]) -> str:
    """The format of the whole checkpoint, or, where that is mixed or missing, those of its groups.
    Raises Unsupported."""
    names = [str(layout)]
    if layout in (None, MIXED):
        names = sorted({str(group["format"]) for group in groups if group.get("format")}) or names
    for name in names:
        if name not in LAYOUTS:
            raise Unsupported(
                f"compressed-tensors format {name!r} is not supported; {', '.join(LAYOUTS)} are"
            )
    return ", ".join(names)


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """`block_structure`, two sizes, or "128x128" as first versions wrote it; None where there is
    none, or scales are not for blocks. Raises Unsupported."""
    block: Any = weights.get("block_structure")
    if block is None or weights.get("strategy", "block") != "block":
        return None
    if isinstance(block, str):
        block = [int(size) for size in block.split("x") if size.isdigit()]
    return fp8.block_sizes("block_structure", block)


def _scales(module: str, scale: Tensor, shape: torch.Size) -> Tensor:
    """[N, groups] of scales for a tensor, a channel or groups."""
    rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1)
    if scale.dim() == 1:
        scale = scale[:, None]
    if scale.dim() != len(shape) or scale.shape[0] != rows or scale.shape[1] > columns:
        check_shape(module, "weight_scale", scale, rows, 1)
    return scale
