"""Oracles: every operation written for reading, in plain torch, for any dtype and device. Slow on
purpose; back ends are tested against them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Batch
from .kv_cache import UNSCALED, KVScales, dequantize, quantize, quantized
from .routing import LEAST_SUM, NO_EXPERT, Routing


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H] over its root mean square, computed in float32 (float64 stays), rounded to x's
    dtype, times weight [H]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [T, H] less its mean, over its standard deviation, computed in float32 (float64 stays),
    times weight [H], plus bias [H]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight
    return (normed if bias is None else normed + bias).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual)."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def all_reduce(parts: Sequence[Tensor]) -> Tensor:
    """The sum of all ranks' parts: in the order of the ranks in float32 (float64 stays), rounded
    once to their type."""
    total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


def all_reduce_add_norm(
    parts: Sequence[Tensor], residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """add_rms_norm of the sum of all ranks' parts [T, H]."""
    return add_rms_norm(all_reduce(parts), residual, weight, eps)


def reduce_scatter(parts: Sequence[Tensor], rank: int) -> Tensor:
    """A rank's share of the sum of parts [T, H]: its ceil(T / ranks) rows, zeros after the last."""
    total = all_reduce(parts)
    share = -(-len(total) // len(parts))
    padded = total.new_zeros(share * len(parts), total.shape[1])
    padded[: len(total)] = total
    return padded[rank * share : (rank + 1) * share]


def all_gather(parts: Sequence[Tensor], dim: int) -> Tensor:
    """All ranks' parts behind each other along `dim`, in the order of the ranks."""
    return torch.cat(list(parts), dim)


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution's share below x."""
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's approximation by a hyperbolic tangent (Hendrycks and Gimpel)."""
    return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def relu(x: Tensor) -> Tensor:
    """x, and 0 where it is negative."""
    return x.clamp(min=0)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2I] -> [T, I]: gelu_tanh of the first half times the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu_tanh(gate) * up


def route(
    logits: Tensor,
    routing: Routing,
    correction_bias: Tensor | None = None,
    slot_mapping: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(top_k_ids int32 [T, k], top_k_weights float32 [T, k]) of logits [T, E]; see Routing.
    correction_bias [E] is added for the choice only. Tokens whose slot_mapping [T] is negative are
    padding and choose NO_EXPERT, with weight 0."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.sigmoid() if routing.scoring_func == "sigmoid" else wide.softmax(-1)
    ids = torch.full((len(logits), routing.top_k), NO_EXPERT, dtype=torch.int32)
    weights = torch.zeros(len(logits), routing.top_k)
    for token, row in enumerate(scores):
        if slot_mapping is not None and slot_mapping[token] < 0:
            continue
        choice = row if correction_bias is None else row + correction_bias
        candidates = _in_best_groups(choice, routing, correction_bias is not None)
        best = sorted(candidates, key=lambda expert: (-choice[expert].item(), expert))
        chosen = torch.tensor(best[: routing.top_k])
        shares = row.cpu()[chosen]
        if routing.renormalize:
            shares = shares / (shares.sum() + LEAST_SUM)
        ids[token] = chosen
        weights[token] = shares * routing.routed_scaling_factor
    return ids.to(logits.device), weights.to(logits.device)


def _in_best_groups(choice: Tensor, routing: Routing, best_two: bool) -> list[int]:
    """The experts of the groups among which a token chooses."""
    groups = choice.view(routing.num_expert_group, -1)
    values = groups.topk(2).values.sum(-1) if best_two else groups.max(-1).values
    order = sorted(range(len(groups)), key=lambda group: (-values[group].item(), group))
    size = routing.group_size
    return [
        expert
        for group in order[: routing.topk_group]
        for expert in range(group * size, (group + 1) * size)
    ]


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, top_k_ids: Tensor, top_k_weights: Tensor
) -> Tensor:
    """x [T, H] through the experts top_k_ids [T, k] of each token, weighted by top_k_weights
    [T, k] float32; ids of NO_EXPERT add nothing. gate_up [E, 2I, H], down [E, H, I]."""
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for token, (ids, shares) in enumerate(zip(top_k_ids.tolist(), top_k_weights, strict=True)):
        for expert, share in zip(ids, shares, strict=True):
            if expert != NO_EXPERT:
                inner = silu_mul((gate_up[expert] @ x[token])[None])[0]
                out[token] += share * (down[expert] @ inner)
    return out.to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2I] -> [T, I]: silu of the first half times the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rope(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate x [T, heads, D] by position: dimension i turns with i + D/2 (the neox layout). cos_sin
    [max_pos, D]: cosines, then sines."""
    half = x.shape[-1] // 2
    cos, sin = cos_sin[positions].to(x.dtype)[:, None].split(half, dim=-1)
    first, second = x.split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_and_cache(
    qkv: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    kv_scales: KVScales = UNSCALED,
) -> Tensor:
    """Split qkv [T, (Hq+2Hkv)*D], normalise queries and keys by head where weights [D] are given,
    rotate both, write keys and values into the caches [blocks, Hkv, block_size, D] at
    `slot_mapping` (negative: nowhere), and return the queries [T, Hq, D]. `kv_scales`: of caches of
    8-bit codes."""
    kv_heads, block_size, size = k_cache.shape[1:]
    heads = qkv.shape[1] // size - 2 * kv_heads
    q, k, v = qkv.view(len(qkv), -1, size).split((heads, kv_heads, kv_heads), dim=1)
    if q_weight is not None and k_weight is not None:
        q = rms_norm(q, q_weight, eps)
        k = rms_norm(k, k_weight, eps)
    q = rope(q, cos_sin, batch.positions)
    k = rope(k, cos_sin, batch.positions)
    if quantized(k_cache):
        k = quantize(k, kv_scales.k)
        v = quantize(v, kv_scales.v)
    for token, slot in enumerate(batch.slot_mapping.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[token]
            v_cache[slot // block_size, :, slot % block_size] = v[token]
    return q


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """One sequence: q [n, Hq, D] are the last n of S positions, k and v [S, Hkv, D]; -> [n, Hq, D].
    Softmax in float32 or wider."""
    n = len(q)
    length = len(k)
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(group, 1).to(wide)
    v = v.repeat_interleave(group, 1).to(wide)
    scores = torch.einsum("nhd,shd->hns", q.to(wide), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(length - n, length, device=q.device)[:, None]
    j = torch.arange(length, device=q.device)[None]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes[:, None, None] * (j - i)
    hidden = (j > i) if window is None else (j > i) | (j <= i - window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hns,shd->nhd", weights, v).to(q.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    kv_scales: KVScales = UNSCALED,
) -> Tensor:
    """Causal attention of q [T, Hq, D] over each sequence's blocks -> [T, Hq*D]. A window w lets
    token i see j with i - w < j <= i. alibi_slopes float32 [Hq] (ALiBi): slope * (j - i) is added
    to the scaled, capped score. `kv_scales`: of caches of 8-bit codes."""
    if quantized(k_cache):
        k_cache = dequantize(k_cache, kv_scales.k)
        v_cache = dequantize(v_cache, kv_scales.v)
    block_size = k_cache.shape[2]
    out = torch.zeros_like(q)
    starts = batch.query_start.tolist()
    lengths = batch.seq_lens.tolist()
    for row, length in enumerate(lengths):
        first = starts[row]
        last = starts[row + 1]
        if first == last:
            continue
        blocks = batch.block_tables[row, : -(-length // block_size)].long()
        k, v = (
            cache[blocks].transpose(1, 2).flatten(0, 1)[:length] for cache in (k_cache, v_cache)
        )
        out[first:last] = attend(q[first:last], k, v, scale, window, softcap, alibi_slopes)
    return out.flatten(1)


def apply_token_masks(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """In place. logits [R, V] float32; rows int [G], indices into these; words int32 [G, ceil(V /
    32)]: where bit i % 32 of word i // 32 is not set, the logit of token i becomes minus
    infinity."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    bits = (words[:, :, None] >> shifts) & 1
    stays = bits.view(len(rows), -1)[:, : logits.shape[1]].bool()
    excluded = torch.full_like(logits[:1], float("-inf"))
    logits[rows] = torch.where(stays, logits[rows], excluded)
