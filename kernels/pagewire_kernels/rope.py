"""Between the QKV projection and attention, in one launch: QK-norm, rotary embedding (neox halves),
keys and values into their pages.

One program handles some heads of one token; q, k and v heads differ only by masks. Arithmetic is
float32, rounded once at the end.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_common import kept
from .kv_cache import UNSCALED, KVScales, kernel_caches
from .workspace import overlap


@triton.jit
def _norm_factor(x1, x2, eps, D: tl.constexpr):
    return tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)


@triton.jit
def _normed(x1, x2, q_weight, k_weight, is_q, is_v, i, inside, eps, D: tl.constexpr):
    """QK-norm of the q and k heads; v heads pass unchanged."""
    factor = tl.where(is_v, 1.0, _norm_factor(x1, x2, eps, D))[:, None]
    q1 = tl.load(q_weight + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    q2 = tl.load(q_weight + D // 2 + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    k1 = tl.load(k_weight + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    k2 = tl.load(k_weight + D // 2 + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    w1 = tl.where(is_v[:, None], 1.0, tl.where(is_q[:, None], q1, k1))
    w2 = tl.where(is_v[:, None], 1.0, tl.where(is_q[:, None], q2, k2))
    return x1 * factor * w1, x2 * factor * w2


@triton.jit
def _rope_and_cache(qkv, cos_sin, q_weight, k_weight, q_out, k_cache, v_cache, positions, slots, eps, k_scale, v_scale, qkv_stride,
                    block_stride,
                    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
                    NORM: tl.constexpr, FORM: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    inside = i < D // 2
    both = (head < HQ + 2 * HKV)[:, None] & inside[None, :]
    is_q = head < HQ
    is_v = head >= HQ + HKV
    pointers = qkv + token.to(tl.int64) * qkv_stride + head[:, None] * D + i[None, :]
    x1 = tl.load(pointers, mask=both, other=0.0).to(tl.float32)
    x2 = tl.load(pointers + D // 2, mask=both, other=0.0).to(tl.float32)
    position = tl.load(positions + token).to(tl.int64)
    cos = tl.load(cos_sin + position * D + i, mask=inside, other=1.0)[None, :]
    sin = tl.load(cos_sin + position * D + D // 2 + i, mask=inside, other=0.0)[None, :]
    if NORM:
        x1, x2 = _normed(x1, x2, q_weight, k_weight, is_q, is_v, i, inside, eps, D)
    y1 = tl.where(is_v[:, None], x1, x1 * cos - x2 * sin).to(q_out.dtype.element_ty)
    y2 = tl.where(is_v[:, None], x2, x2 * cos + x1 * sin).to(q_out.dtype.element_ty)
    q_at = q_out + (token.to(tl.int64) * HQ + head)[:, None] * D + i[None, :]
    tl.store(q_at, y1, mask=both & is_q[:, None])
    tl.store(q_at + D // 2, y2, mask=both & is_q[:, None])
    slot = tl.load(slots + token).to(tl.int64)
    kv_head = tl.where(is_v, head - HQ - HKV, head - HQ)
    cache_at = (
        slot // PAGE * block_stride + (kv_head[:, None] * PAGE + slot % PAGE) * D + i[None, :]
    )
    is_k = (head >= HQ) & (head < HQ + HKV) & (slot >= 0)
    scale = tl.where(is_v, v_scale, k_scale)[:, None]
    y1 = kept(y1, scale, k_cache, FORM)
    y2 = kept(y2, scale, k_cache, FORM)
    tl.store(k_cache + cache_at, y1, mask=both & is_k[:, None])
    tl.store(k_cache + cache_at + D // 2, y2, mask=both & is_k[:, None])
    tl.store(v_cache + cache_at, y1, mask=both & (is_v & (slot >= 0))[:, None])
    tl.store(v_cache + cache_at + D // 2, y2, mask=both & (is_v & (slot >= 0))[:, None])


def rope_and_cache(qkv: torch.Tensor, cos_sin: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, eps: float,
                   k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Any, kv_scales: KVScales = UNSCALED) -> torch.Tensor:  # fmt: skip
    """q [T, Hq, D]; k and v go to the slots of `batch` (fields positions, slot_mapping, both int64
    [T]; a slot of -1 is padding).

    qkv [T, (Hq + 2 Hkv) * D]; cos_sin [positions, D] float32, cosines in the first half of D, sines
    in the second; both weights [D] or None. `kv_scales`: of caches of 8-bit codes.
    """
    _, hkv, page, dim = k_cache.shape
    tokens = qkv.shape[0]
    heads = qkv.shape[1] // dim
    hq = heads - 2 * hkv
    q = torch.empty(tokens, hq, dim, dtype=qkv.dtype, device=qkv.device)
    per_program = 4 if tokens <= 64 else 16
    caches = kernel_caches(k_cache, v_cache, kv_scales)
    if tokens:
        _rope_and_cache[(tokens, triton.cdiv(heads, per_program))](
            qkv, cos_sin, q_weight, k_weight, q, caches.keys, caches.values, batch.positions, batch.slot_mapping, eps,
            caches.k_scale, caches.v_scale, qkv.stride(0), k_cache.stride(0),
            HQ=hq, HKV=hkv, D=dim, HALF=triton.next_power_of_2(dim // 2), PAGE=page, HEADS=per_program, NORM=q_weight is not None,
            FORM=caches.form, num_warps=1 if per_program == 4 else 4, **overlap(qkv.device))  # fmt: skip
    return q
