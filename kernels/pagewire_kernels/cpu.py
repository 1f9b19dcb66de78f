"""The CPU back end: the operations in few calls of plain torch, since at one token a call costs
more than its arithmetic.

Weights are prepacked for oneDNN. What depends on the step alone (rotary factors, gather indices,
masks) is derived once and kept on `batch.plan` for all layers: see cpu_plan.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Ops
from .batch import Batch
from .cpu_plan import Group, Plan, make_plan
from .kv_cache import UNSCALED, KVScales, quantize, quantized, raw
from .quantized import Quantized
from .routing import LEAST_SUM, NO_EXPERT, Routing

if TYPE_CHECKING:
    from .cpu_linear import QuantizedLinear

PACKED_TYPES: Final = (torch.bfloat16, torch.float32)
PACK_ROWS: Final = 16
"""The batch size that weights are packed for. The layout oneDNN then picks serves 1 to 2048 rows
equally; without a hint it does not."""
HALVES: Final = (torch.bfloat16, torch.float16)
EXACT: Final = 8
"""How many of a row's logits are worth computing exactly."""
_packed_linear = (
    torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
)


@functools.cache
def _packable(dtype: torch.dtype) -> bool:
    """By trying: what oneDNN can do depends on the processor and on how torch was built."""
    if _packed_linear is None or dtype not in PACKED_TYPES:
        return False
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(
            torch.zeros(16, 16, dtype=dtype), PACK_ROWS
        )
        _packed_linear(torch.zeros(1, 16, dtype=dtype), packed, None, "none", [], "")
    except RuntimeError:
        return False
    return True


def pack_linear(weight: Tensor) -> Tensor:
    """weight [N, K] in oneDNN's blocked layout, or as it is where oneDNN has none for it."""
    if not _packable(weight.dtype):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)


def linear(x: Tensor, weight: "Tensor | QuantizedLinear", bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Tensor):
        return weight(x, bias)
    if weight.is_mkldnn and _packed_linear is not None:
        return _packed_linear(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def tied_logits(x: Tensor, packed: Tensor, weight: Tensor) -> Tensor:
    """Logits of x [T, H] by the embedding's weight [V, H], given packed too. From bfloat16 the most
    likely ones come out in float32: rounded to eight bits, the first few of a row are often equal,
    and greedy decoding would take the one with the lowest id."""
    logits = linear(x, packed)
    if logits.dtype not in HALVES or not len(x):
        return logits
    ids = torch.topk(logits, min(EXACT, logits.shape[1]), sorted=False).indices
    exact = torch.bmm(weight[ids].float(), x.float()[:, :, None])[:, :, 0]
    return logits.float().scatter_(1, ids, exact)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.dtype != x.dtype:  # weights kept in float32
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum is kept in float32, whatever x is: rounding it in every layer is most of the error of
    a bfloat16 model, and here it costs nothing. Overwrites `residual` unless it is of a 16-bit
    type."""
    total = residual.float() if residual.dtype in HALVES else residual
    total.add_(x)
    normed = F.rms_norm(total, weight.shape, weight.to(total.dtype), eps)
    return normed.to(x.dtype), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    dtype = x.dtype
    return F.layer_norm(
        x, weight.shape, weight.to(dtype), None if bias is None else bias.to(dtype), eps
    )


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum is kept in float32, as by `add_rms_norm`."""
    total = residual.float() if residual.dtype in HALVES else residual
    total.add_(x)
    return layer_norm(total, weight, bias, eps).to(x.dtype), total


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def gelu_mul(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    return F.gelu(gate_up[:, :half], approximate="tanh").mul_(gate_up[:, half:])


def pack_experts(weight: Tensor) -> list[Tensor]:
    """weight [E, N, K], each expert's matrix packed by itself."""
    return [pack_linear(matrix) for matrix in weight]


def route(
    logits: Tensor,
    routing: Routing,
    correction_bias: Tensor | None = None,
    slot_mapping: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See backend.Ops."""
    wide = logits.float()
    scores = wide.sigmoid() if routing.scoring_func == "sigmoid" else wide.softmax(-1)
    choice = scores if correction_bias is None else scores + correction_bias
    if routing.num_expert_group > 1:
        choice = _within_groups(choice, routing, correction_bias is not None)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    weights = scores.gather(1, ids)
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST_SUM)
    if routing.routed_scaling_factor != 1:
        weights = weights * routing.routed_scaling_factor
    ids = ids.int()
    if slot_mapping is not None:
        padding = (slot_mapping < 0)[:, None]
        ids = ids.masked_fill(padding, NO_EXPERT)
        weights = weights.masked_fill(padding, 0.0)
    return ids, weights


def _within_groups(choice: Tensor, routing: Routing, best_two: bool) -> Tensor:
    """choice [T, E] with -inf for the experts of groups that a token does not choose among."""
    groups = choice.view(len(choice), routing.num_expert_group, -1)
    values = groups.topk(2).values.sum(-1) if best_two else groups.amax(-1)
    order = values.sort(dim=-1, descending=True, stable=True).indices
    closed = torch.ones_like(values, dtype=torch.bool)
    closed.scatter_(1, order[:, : routing.topk_group], False)
    return groups.masked_fill(closed[:, :, None], float("-inf")).flatten(1)


def experts(
    x: Tensor, gate_up: list[Tensor], down: list[Tensor], top_k_ids: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Expert by expert over the tokens that chose it, so that each matrix is read once; sums in
    float32."""
    expert, order = top_k_ids.flatten().sort(stable=True)
    tokens = order // top_k_ids.shape[1]
    shares = top_k_weights.flatten()[order, None]
    used, counts = expert.unique_consecutive(return_counts=True)
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    first = 0
    for index, count in zip(used.tolist(), counts.tolist(), strict=True):
        rows = tokens[first : first + count]
        if index != NO_EXPERT:
            part = linear(silu_mul(linear(x[rows], gate_up[index])), down[index])
            out.index_add_(0, rows, part * shares[first : first + count])
        first += count
    return out.to(x.dtype)


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
    kv_scales: KVScales = UNSCALED,
) -> Tensor:
    plan = batch.plan or make_plan(batch, k_cache, qkv.dtype)
    cos, sin, minus_sin = plan.rotary(cos_sin, qkv.dtype)
    size = k_cache.shape[3]
    half = k_cache.shape[3] // 2
    heads = qkv.shape[1] // size - 2 * plan.kv_heads
    parts = qkv.view(len(qkv), -1, size)
    mixed = parts[:, : heads + plan.kv_heads]
    if q_weight is not None and k_weight is not None:
        mixed = torch.cat(
            (rms_norm(mixed[:, :heads], q_weight, eps), rms_norm(mixed[:, heads:], k_weight, eps)),
            1,
        )
    turned = mixed * cos
    turned[..., :half].addcmul_(mixed[..., half:], minus_sin)
    turned[..., half:].addcmul_(mixed[..., :half], sin)
    k = turned[:, heads:]
    v = parts[:, heads + plan.kv_heads :]
    if plan.kept is not None:
        k = k[plan.kept]
        v = v[plan.kept]
    if quantized(k_cache):
        k = raw(quantize(k, kv_scales.k))
        v = raw(quantize(v, kv_scales.v))
    raw(k_cache).view(-1, size).index_copy_(0, plan.cache_rows, k.reshape(-1, size))
    raw(v_cache).view(-1, size).index_copy_(0, plan.cache_rows, v.reshape(-1, size))
    return turned[:, :heads]


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
    """Sequences that are alike (by length when decoding, by position in prompts) go through one
    batched product over gathered blocks."""
    plan: Plan = batch.plan or make_plan(batch, k_cache, q.dtype)
    codes = quantized(k_cache)
    if codes:
        scale = scale * kv_scales.k
    groups = plan.work(window)
    if len(groups) == 1 and groups[0].tokens is None:
        out = _attend(q, k_cache, v_cache, groups[0], scale, softcap, alibi_slopes)
        return out.mul_(kv_scales.v) if codes else out
    out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype)
    for group in groups:
        out[group.tokens] = _attend(
            q[group.tokens], k_cache, v_cache, group, scale, softcap, alibi_slopes
        )
    return out.mul_(kv_scales.v) if codes else out


def _gather(cache: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """[size * Hkv, length, D] of `dtype`: the group's blocks, which lie by head already, each
    block_size x D values in one piece."""
    kv_heads, block_size, size = cache.shape[1:]
    blocks = torch.index_select(raw(cache).view(-1, block_size * size), 0, group.index)
    found = blocks.view(group.size * kv_heads, -1, size)[:, : group.length]
    return found.view(cache.dtype).to(dtype)


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group: Group,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """q [size * queries, Hq, D] -> [size * queries, Hq*D]. The query heads of a KV head are rows of
    one product: keys are read once."""
    kv_heads = k_cache.shape[1]
    size = q.shape[2]
    dtype = q.dtype
    pairs = group.size * kv_heads
    heads = q.view(group.size, group.queries, kv_heads, -1, size)
    queries = heads.permute(0, 2, 1, 3, 4) if group.queries > 1 else heads
    queries = queries.reshape(pairs, -1, size)
    queries = queries.float() if group.wide else queries
    scores = _scores(queries, _gather(k_cache, group, queries.dtype).mT, group, scale, softcap)
    shares = torch.softmax(
        scores if alibi_slopes is None else _sloped(scores, group, alibi_slopes, kv_heads), -1
    )
    if alibi_slopes is not None:
        shares = shares.to(queries.dtype)
    out = torch.bmm(shares, _gather(v_cache, group, queries.dtype)).to(dtype)
    if group.queries > 1:
        out = out.view(group.size, kv_heads, group.queries, -1, size).transpose(1, 2)
    return out.reshape(len(q), -1)


def _sloped(scores: Tensor, group: Group, alibi_slopes: Tensor, kv_heads: int) -> Tensor:
    """With ALiBi, in float32: 16 bits cannot hold a long distance."""
    parted = scores.float().view(group.size, kv_heads, group.queries, -1, scores.shape[-1])
    return parted.addcmul_(
        alibi_slopes.view(1, kv_heads, 1, -1, 1), group.distances[:, None, :, None]
    ).view(scores.shape)


def _scores(
    queries: Tensor, keys: Tensor, group: Group, scale: float, softcap: float | None
) -> Tensor:
    """queries [pairs, queries * heads, D] times keys [pairs, D, length], scaled, capped and
    masked."""
    mask = group.mask
    if mask is not None and group.queries > 1:
        mask = mask.repeat_interleave(queries.shape[1] // group.queries, 1)
    if softcap is not None:
        scores = torch.tanh(torch.bmm(queries, keys).mul_(scale / softcap)).mul_(softcap)
        return scores if mask is None else scores.add_(mask)
    return (
        torch.bmm(queries, keys).mul_(scale)
        if mask is None
        else torch.baddbmm(mask, queries, keys, alpha=scale)
    )


class CpuQuantized:
    """See backend.QuantizedOps: machine code of our own (cpu_linear.py)."""

    experts = None
    quantizing = None

    def pack(self, parts: Sequence[Quantized], float32_output: bool) -> "QuantizedLinear | None":
        """Matrices that read the same input, side by side; None where there is no kernel for
        them."""
        from .cpu_linear import QuantizedLinear

        if any(part.is_float or part.table is not None for part in parts):
            return None
        try:
            return QuantizedLinear(parts, float32_output)
        except ValueError:
            return None


class CpuOps:
    """See backend.Ops."""

    fused = None
    quantized = CpuQuantized()
    pack_linear = staticmethod(pack_linear)
    linear = staticmethod(linear)
    tied_logits = staticmethod(tied_logits)
    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    layer_norm = staticmethod(layer_norm)
    add_layer_norm = staticmethod(add_layer_norm)
    silu_mul = staticmethod(silu_mul)
    gelu_mul = staticmethod(gelu_mul)
    gelu = staticmethod(gelu)
    gelu_tanh = staticmethod(gelu_tanh)
    relu = staticmethod(relu)
    pack_experts = staticmethod(pack_experts)
    experts = staticmethod(experts)
    route = staticmethod(route)
    rope_and_cache = staticmethod(rope_and_cache)
    paged_attention = staticmethod(paged_attention)


OPS: Final = CpuOps()
"""This process's."""
_complete: Ops = OPS
