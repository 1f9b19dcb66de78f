"""The tables of rotary factors, and the order of a head's dimensions that goes with them.

The kernels know one layout: all D dimensions turn, i with i + D/2. Whatever else a model wants is
brought to it once, at loading: the rows of its query and key weights are put in `order`, which
changes no product of the two, and pairs that do not turn get an angle of zero. Sources: Llama 3's
rule is `apply_scaling` in Meta's llama-models; YaRN is arXiv 2309.00071; LongRoPE is arXiv
2402.13753.
"""

import math

import torch
from torch import Tensor

from .rope import Rope


def order(rope: Rope, head_dim: int) -> list[int] | None:
    """Which dimension of the checkpoint's heads comes at each place of ours; None where they are
    the same."""
    turning = range(rope.size)
    rest = list(range(rope.size, head_dim))
    half = rope.size // 2
    kept = len(rest) // 2
    first, second = (
        (turning[::2], turning[1::2]) if rope.interleaved else (turning[:half], turning[half:])
    )
    found = [*first, *rest[:kept], *second, *rest[kept:]]
    return None if found == list(range(head_dim)) else found


def table(rope: Rope, head_dim: int, positions: int) -> Tensor:
    """[positions, D] float32: cosines in the first half of a row, sines in the second. Scaling that
    depends on a sequence's length is chosen once, for the longest one served: cached keys must
    serve short and long requests alike."""
    angles = torch.zeros(positions, head_dim // 2)
    size = torch.ones(head_dim // 2)
    if rope.size:
        half = rope.size // 2
        angles[:, :half] = (
            torch.arange(positions, dtype=torch.float32)[:, None]
            * frequencies(rope, positions)[None]
        )
        size[:half] = rope.magnitude
    return torch.cat((angles.cos() * size, angles.sin() * size), dim=-1)


def frequencies(rope: Rope, positions: int) -> Tensor:
    """[size / 2] float32, radians per position."""
    theta = rope.theta
    size = rope.size
    if rope.kind == "dynamic" and positions > rope.original_max_position:
        stretch = rope.factor * positions / rope.original_max_position - (rope.factor - 1)
        theta *= stretch ** (size / (size - 2))
    base = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    if rope.divisors:
        return base / torch.tensor(rope.divisors, dtype=torch.float32)
    if rope.kind == "longrope":
        long = positions > rope.original_max_position
        return base / torch.tensor(
            rope.long_factors if long else rope.short_factors, dtype=torch.float32
        )
    scaled = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}.get(rope.kind)
    return scaled(base, rope) if scaled else base


def _linear(base: Tensor, rope: Rope) -> Tensor:
    return base / rope.factor


def _llama3(base: Tensor, rope: Rope) -> Tensor:
    """Fast frequencies stay, slow ones are divided by `factor`, those between are blended."""
    turns = rope.original_max_position / (2 * math.pi / base)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * base / rope.factor + blend * base
    scaled = torch.where(turns < rope.low_freq_factor, base / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, base, scaled)


def _yarn(base: Tensor, rope: Rope) -> Tensor:
    """A linear ramp over the dimensions that turn between `beta_fast` and `beta_slow` times within
    the original context."""

    def dimension(turns: float) -> float:
        return (
            rope.size
            * math.log(rope.original_max_position / (turns * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low = dimension(rope.beta_fast)
    high = dimension(rope.beta_slow)
    if rope.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, rope.size - 1)
    ramp = (
        (torch.arange(rope.size // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    ).clamp(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)
