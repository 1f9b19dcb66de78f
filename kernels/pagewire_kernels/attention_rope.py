"""QK-norm and rotary embedding of the queries and of the key that come to decode attention as the
projection gave them."""

# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportArgumentType=false, reportCallIssue=false
# Values inside a kernel have types that only Triton's compiler knows.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Rope:
    """What comes before attention: cos_sin [positions, D] float32, cosines first; weights [D] of
    the QK-norm or None; its eps."""

    cos_sin: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    eps: float


@triton.jit
def _partners(d, D: tl.constexpr):
    """The place of each element's partner in the rotary embedding (neox halves)."""
    return tl.where(d < D // 2, d + D // 2, d - D // 2)


@triton.jit
def rotation(cos_sin, position, d, D: tl.constexpr):
    """Cosines and sines [D_PAD] of a position; sines with the sign they have for each element."""
    HALF: tl.constexpr = D // 2
    factors = cos_sin + position.to(tl.int64) * D + d % HALF
    cos = tl.load(factors, mask=d < D, other=1.0)
    sin = tl.load(factors + HALF, mask=d < D, other=0.0)
    return cos, tl.where(d < HALF, -1.0, 1.0) * sin


@triton.jit
def norm_weights(weight, d, D: tl.constexpr, NORM: tl.constexpr):
    """Of the QK-norm, and of each element's partner: float32 [1, D_PAD]."""
    own = d.to(tl.float32)
    partner = own
    if NORM:
        own = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        partner = tl.load(weight + _partners(d, D), mask=d < D, other=0.0).to(tl.float32)
    return own[None, :], partner[None, :]


@triton.jit
def roped(x, own, partner, cos, sin, d, inside, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Rows of heads at the addresses x [M, 1], after QK-norm and rotary embedding: float32 [M,
    D_PAD]. own, partner: as norm_weights gives them, for each row or for all.

    Each element is loaded with its partner in the other half, so no tile is taken apart or
    joined."""
    a = tl.load(x + d[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + _partners(d, D)[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(a * a, 1) / D + eps)[:, None]
        a = a * factor * own
        b = b * factor * partner
    return a * cos[None, :] + sin[None, :] * b
