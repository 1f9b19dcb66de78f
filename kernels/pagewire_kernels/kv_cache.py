"""The types that keys and values are kept in: that of the model's activations, or 8-bit floats
(e4m3) with one scale for a layer's keys and one for its values.

An 8-bit code stands for itself times the scale. Attention folds the scale of keys into that of the
scores and multiplies its results by the scale of values, so no element is scaled by itself.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

FP8: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0
"""The largest finite number of e4m3. Its conversion would make NaN of what is beyond."""


@dataclass(frozen=True)
class KVScales:
    """What the codes of a layer's keys and of its values are multiplied by. Without meaning for
    caches of other types."""

    k: float = 1.0
    v: float = 1.0


UNSCALED: Final = KVScales()


def quantize(x: Tensor, scale: float) -> Tensor:
    """x / scale as e4m3, in float32 and to the nearest code, ties to even; beyond +-448 it
    saturates. NaN stays NaN."""
    return (x.float() / scale).clamp_(-LARGEST, LARGEST).to(FP8)


def dequantize(cache: Tensor, scale: float) -> Tensor:
    """What codes stand for, in float32."""
    return cache.float() * scale


def quantized(cache: Tensor) -> bool:
    """Whether a cache holds 8-bit codes."""
    return cache.dtype == FP8


def raw(cache: Tensor) -> Tensor:
    """The cache as its bytes where it holds codes: torch copies bytes anywhere, 8-bit floats not.
    Shares the memory."""
    return cache.view(torch.uint8) if quantized(cache) else cache


class KernelCaches(NamedTuple):
    """Caches as the Triton kernels take them, codes as bytes. form: "full", elements are numbers;
    "e4m3", codes, which machine instructions turn into 16-bit floats; "e4m3_bits", codes, where
    there are none such. score_scale: the scale of scores with that of keys in it."""

    keys: Tensor
    values: Tensor
    form: str
    score_scale: float
    k_scale: float
    v_scale: float


def kernel_caches(
    keys: Tensor, values: Tensor, scales: KVScales, score_scale: float = 1.0
) -> KernelCaches:
    """Caches [blocks, Hkv, block_size, D] of one layer, for a kernel."""
    if not quantized(keys):
        return KernelCaches(keys, values, "full", score_scale, 1.0, 1.0)
    form = "e4m3_bits" if keys.device.type == "cpu" else "e4m3"
    return KernelCaches(raw(keys), raw(values), form, score_scale * scales.k, scales.k, scales.v)
