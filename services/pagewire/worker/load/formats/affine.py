"""Matrices whose weights are (code - zero) * scale, with a scale and a zero for each group of
inputs: what AWQ, GPTQ and most others are once they are unpacked."""

import torch
from pagewire_kernels.quantized import Quantized, quantize
from torch import Tensor

FOUR_BITS = 4
SIGN = 128


def affine(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int) -> Quantized:
    """codes uint8 [N, K], unsigned, of `bits` bits (1 to 8); zeros (integers) and scales [N, K /
    g].

    The minimum is -zero * scale. In float32 both products and their sum are exact for scales of 16
    bits, so a weight is (code - zero) * scale without a rounding."""
    scale = scales.float()
    shift = 0
    if bits > FOUR_BITS:
        # Quantized holds 8 bits with a sign.
        shift = SIGN
        codes = (codes.to(torch.int16) - SIGN).to(torch.int8)
    minimum = (shift - zeros.float()) * scale
    return Quantized(codes, scale, minimum if bool(minimum.any()) else None)


def dequantized(codes: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> Tensor:
    """float32 [N, K] where inputs are not in groups that follow each other: group_of [K] int64 is
    the group of each input; others as for `affine`."""
    return (codes.float() - zeros.float()[:, group_of]).mul_(scales.float()[:, group_of])


def rounded(weight: Tensor, bits: int, group_size: int) -> Tensor | Quantized:
    """A full matrix [N, K] in codes of 4 or 8 bits with a scale and a zero for each group, -1: one
    a row; full where groups do not divide K, or for other bits."""
    group = weight.shape[1] if group_size == -1 else group_size
    if weight.shape[1] % group or bits not in (FOUR_BITS, 2 * FOUR_BITS):
        return weight
    return quantize(weight, bits, group, whole_zeros=True)
