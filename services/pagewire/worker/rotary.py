"""The table of rotary factors: RoPE with no, linear or Llama 3 scaling.

Llama 3's rule keeps fast frequencies, divides slow ones by `factor` and blends between (`apply_scaling` in Meta's llama-models).
"""

import math

import torch
from torch import Tensor

from .architecture import Rope


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[D/2] float32, radians per position."""
    base = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.divisors:
        return base / torch.tensor(rope.divisors, dtype=torch.float32)
    if rope.kind == "linear":
        return base / rope.factor
    return _llama3(base, rope) if rope.kind == "llama3" else base


def _llama3(base: Tensor, rope: Rope) -> Tensor:
    turns = rope.original_max_position / (2 * math.pi / base)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * base / rope.factor + blend * base
    scaled = torch.where(turns < rope.low_freq_factor, base / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, base, scaled)


def table(rope: Rope, head_dim: int, positions: int) -> Tensor:
    """[positions, D] float32: cosines in the first half of a row, sines in the second."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies(rope, head_dim)[None]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
