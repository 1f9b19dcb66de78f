"""The CPU back end: the operations in few calls of plain torch, since at one token a call costs more than its arithmetic.

Weights are prepacked for oneDNN. What depends on the step alone (rotary factors, gather indices, masks) is derived once and kept on
`batch.plan` for all layers: see cpu_plan.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch
from .cpu_plan import Decode, Plan, Prefill, make_plan

PACKED_TYPES: Final = (torch.bfloat16, torch.float32)
PACK_ROWS: Final = 16
"""The batch size that weights are packed for. The layout oneDNN then picks serves 1 to 2048 rows equally; without a hint it does not."""
_packed_linear = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def pack_linear(weight: Tensor) -> Tensor:
    """weight [N, K] in oneDNN's blocked layout, or as it is where oneDNN has none for it."""
    if _packed_linear is None or weight.dtype not in PACKED_TYPES:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.is_mkldnn and _packed_linear is not None:
        return _packed_linear(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Overwrites `residual` with the sum."""
    residual.add_(x)
    return F.rms_norm(residual, weight.shape, weight, eps), residual


def silu_mul(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    return F.silu(gate_up[:, :half]).mul_(gate_up[:, half:])


def rope_and_cache(
    qkv: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
) -> Tensor:
    plan = batch.plan or make_plan(batch, k_cache)
    cos, sin, minus_sin = plan.rotary(cos_sin, qkv.dtype)
    size, half = k_cache.shape[3], k_cache.shape[3] // 2
    heads = qkv.shape[1] // size - 2 * plan.kv_heads
    parts = qkv.view(len(qkv), -1, size)
    mixed = parts[:, : heads + plan.kv_heads]
    if q_weight is not None and k_weight is not None:
        q, k = F.rms_norm(mixed[:, :heads], (size,), q_weight, eps), F.rms_norm(mixed[:, heads:], (size,), k_weight, eps)
        mixed = torch.cat((q, k), 1)
    turned = mixed * cos
    turned[..., :half].addcmul_(mixed[..., half:], minus_sin)
    turned[..., half:].addcmul_(mixed[..., :half], sin)
    k, v = turned[:, heads:], parts[:, heads + plan.kv_heads :]
    if plan.kept is not None:
        k, v = k[plan.kept], v[plan.kept]
    k_cache.view(-1, size).index_copy_(0, plan.cache_rows, k.reshape(-1, size))
    v_cache.view(-1, size).index_copy_(0, plan.cache_rows, v.reshape(-1, size))
    return turned[:, :heads]


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float, window: int | None, soft_cap: float | None = None
) -> Tensor:
    """Sequences with one new token go through batched products over gathered blocks, grouped by length; the others one by one."""
    plan: Plan = batch.plan or make_plan(batch, k_cache)
    decodes, prefills = plan.work(window, q.dtype)
    if len(decodes) == 1 and decodes[0].rows is None:
        return _decode(q, k_cache, v_cache, decodes[0], plan, scale, soft_cap)
    out = torch.zeros(len(q), q.shape[1] * q.shape[2], dtype=q.dtype)
    for group in decodes:
        out[group.rows] = _decode(q[group.rows], k_cache, v_cache, group, plan, scale, soft_cap)
    for item in prefills:
        out[item.first : item.last] = _prefill(q[item.first : item.last], k_cache, v_cache, item, plan, scale, soft_cap)
    return out


def _gather(cache: Tensor, index: Tensor, buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The (block, head) pairs of `index`, each block_size x D values in one piece, as `shape`."""
    torch.index_select(cache.view(-1, cache.shape[2] * cache.shape[3]), 0, index, out=buffer)
    return buffer.view(shape)


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: Decode, plan: Plan, scale: float, soft_cap: float | None) -> Tensor:
    """q [B, Hq, D] -> [B, Hq*D]. The query heads of a KV head are the rows of one product, so that keys are read once."""
    size, pairs = q.shape[2], group.size * plan.kv_heads
    shape = (pairs, group.length, size)
    queries = q.reshape(pairs, -1, size)
    keys = _gather(k_cache, group.index, group.k_buffer, shape).mT
    if soft_cap is not None:
        scores = torch.tanh(torch.bmm(queries, keys).mul_(scale / soft_cap)).mul_(soft_cap)
        scores = scores if group.mask is None else scores.add_(group.mask)
    elif group.mask is None:
        scores = torch.bmm(queries, keys).mul_(scale)
    else:
        scores = torch.baddbmm(group.mask, queries, keys, alpha=scale)
    values = _gather(v_cache, group.index, group.v_buffer, shape)
    return torch.bmm(torch.softmax(scores, -1), values).view(group.size, -1)


def _prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, item: Prefill, plan: Plan, scale: float, soft_cap: float | None) -> Tensor:
    """q [n, Hq, D] -> [n, Hq*D]."""
    shape = (plan.kv_heads, -1, q.shape[2])
    k = _gather(k_cache, item.index, item.k_buffer, shape)[:, : item.length]
    v = _gather(v_cache, item.index, item.v_buffer, shape)[:, : item.length]
    queries = q.transpose(0, 1)
    if soft_cap is not None:
        scores = torch.matmul(queries.unflatten(0, (plan.kv_heads, -1)), k.mT.unsqueeze(1)).float().mul_(scale / soft_cap)
        scores = torch.tanh(scores).mul_(soft_cap).add_(item.full_mask(q.dtype))
        out = torch.matmul(torch.softmax(scores, -1).to(v.dtype), v.unsqueeze(1)).flatten(0, 1)
    else:
        out = F.scaled_dot_product_attention(
            queries[None], k[None], v[None], attn_mask=item.mask, is_causal=item.mask is None, scale=scale, enable_gqa=True
        )[0]
    return out.transpose(0, 1).reshape(len(q), -1)
