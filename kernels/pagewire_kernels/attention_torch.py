"""Paged attention in plain torch, for GPUs on which Triton's products have no tensor cores
(capability.py): torch's libraries do.

Keys and values of sequences that are alike are gathered from their blocks and go through one
product together, by torch's own attention where it can do it. How long sequences are is read once a
step, which waits for the device: such steps are not captured in CUDA graphs. Places that are hidden
repeat one that is seen, so that what others left in a block (a NaN) reaches nobody.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_torch_plan import Pieces, Shape, plan
from .batch import Batch
from .capability import attends_by_torch
from .kv_cache import UNSCALED, KVScales, quantized, raw


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether attention on this device is to be computed here."""
    return device.type == "cuda" and attends_by_torch(torch.cuda.get_device_capability(device))


@dataclass
class Group:
    """Pieces (see attention_torch_plan) that one product serves. tokens [B, n]: their new tokens;
    asking [B, n]: the positions of these; at [B, L]: the positions that may be seen; index [B, 1,
    L]: where these lie in a cache seen as rows of one head and place each, for the first KV
    head."""

    tokens: Tensor
    asking: Tensor
    at: Tensor
    index: Tensor
    window: int | None
    _mask: Tensor | None = None

    def visible(self) -> Tensor:
        """[B, n, L]."""
        at = self.at[:, None, :]
        asking = self.asking[:, :, None]
        return at <= asking if self.window is None else (at <= asking) & (at > asking - self.window)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[B, n, L] to be added to scores. Kept where it is small: the layers share it."""
        if self._mask is not None:
            return self._mask
        mask = torch.zeros((), dtype=dtype, device=self.at.device).where(
            self.visible(), float("-inf")
        )
        if self.asking.shape[1] == 1:
            self._mask = mask
        return mask


class Steps(NamedTuple):
    """What a step's layers share, kept on `batch.plan`: new tokens and lengths on the host, and the
    groups of each window."""

    query_start: Tensor
    lengths: Tensor
    groups: dict[int | None, list[Group]]


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
    """As reference.paged_attention; tokens of no sequence, and sequences of length 0, give
    zeros."""
    out = torch.zeros(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    codes = quantized(k_cache)
    if codes:
        scale = scale * kv_scales.k
    for group in _groups(batch, q.shape[1], k_cache, window):
        keys, values = (_gather(cache, group, q.dtype) for cache in (k_cache, v_cache))
        queries = _by_kv_head(q, group, keys.shape[1])
        if softcap is None and alibi_slopes is None:
            result = _plain(queries, keys, values, group, scale)
        else:
            result = _scored(queries, keys, values, group, scale, softcap, alibi_slopes)
        if codes:
            result = result * kv_scales.v
        out.index_copy_(
            0,
            group.tokens.flatten(),
            result.permute(0, 2, 1, 3, 4).reshape(group.tokens.numel(), -1),
        )
    return out


def _groups(batch: Batch, heads: int, cache: Tensor, window: int | None) -> list[Group]:
    _, kv_heads, block_size, size = cache.shape
    if batch.plan is None:
        rows = batch.seq_lens.shape[0]
        columns = torch.cat((batch.query_start, batch.seq_lens)).long().cpu()
        batch.plan = Steps(columns[: rows + 1], columns[rows + 1 :], {})
    steps: Steps = batch.plan
    if window not in steps.groups:
        planned = plan(
            steps.query_start.numpy(), steps.lengths.numpy(), Shape(heads, kv_heads, size), window
        )
        steps.groups[window] = [
            _group(pieces, batch.block_tables, kv_heads, block_size, window) for pieces in planned
        ]
    return steps.groups[window]


def _group(
    pieces: Pieces, tables: Tensor, kv_heads: int, block_size: int, window: int | None
) -> Group:
    columns = (pieces.rows, pieces.tokens, pieces.counts, pieces.starts, pieces.lows)
    rows, tokens, counts, starts, lows = torch.stack(
        [torch.from_numpy(column) for column in columns]
    ).to(tables.device)[:, :, None]
    nth = torch.arange(pieces.queries, device=tables.device).minimum(counts - 1)
    at = lows + torch.arange(pieces.span, device=tables.device)
    seen = at.minimum(starts + counts - 1)
    index = tables[rows, seen // block_size].long() * (kv_heads * block_size) + seen % block_size
    return Group(tokens + nth, starts + nth, at, index[:, None], window)


def _gather(cache: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """[B, Hkv, L, D] of `dtype`."""
    _, kv_heads, block_size, size = cache.shape
    heads = torch.arange(kv_heads, device=cache.device)[:, None] * block_size
    index = group.index + heads
    rows = raw(cache).view(-1, size).index_select(0, index.flatten()).view(*index.shape, size)
    return rows.view(cache.dtype).to(dtype) if quantized(cache) else rows


def _by_kv_head(q: Tensor, group: Group, kv_heads: int) -> Tensor:
    """[B, Hkv, n, G, D]: the query heads of one KV head side by side, so that its keys are read
    once."""
    count, queries = group.tokens.shape
    return (
        q[group.tokens.flatten()]
        .view(count, queries, kv_heads, -1, q.shape[2])
        .permute(0, 2, 1, 3, 4)
    )


def _plain(queries: Tensor, keys: Tensor, values: Tensor, group: Group, scale: float) -> Tensor:
    """queries [B, Hkv, n, G, D], keys and values [B, Hkv, L, D] -> [B, Hkv, n, G, D]."""
    count, kv_heads, n, heads, size = queries.shape
    mask = group.mask(queries.dtype)[:, None, :, None].expand(count, 1, n, heads, keys.shape[2])
    mask = mask.reshape(count, 1, n * heads, -1).expand(-1, kv_heads, -1, -1)
    asking = queries.reshape(count, kv_heads, n * heads, size)
    return F.scaled_dot_product_attention(asking, keys, values, mask, scale=scale).view(
        queries.shape
    )


def _scored(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    group: Group,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """The same with soft caps or ALiBi, which torch's attention does not know. Scores are float32:
    16 bits cannot hold a long distance, and float16 no large product either, so queries are scaled
    before."""
    count, kv_heads, n, heads, size = queries.shape
    asking = (queries * (scale / (softcap or 1.0))).reshape(count, kv_heads, n * heads, size)
    scores = (asking @ keys.mT).float().view(count, kv_heads, n, heads, -1)
    if softcap is not None:
        scores = scores.tanh_().mul_(softcap)
    if alibi_slopes is not None:
        apart = (group.at[:, None, :] - group.asking[:, :, None]).to(scores.dtype)
        scores.addcmul_(alibi_slopes.view(1, kv_heads, 1, heads, 1), apart[:, None, :, None])
    scores.add_(group.mask(queries.dtype)[:, None, :, None])
    shares = scores.softmax(-1).to(values.dtype).view(count, kv_heads, n * heads, -1)
    return (shares @ values).view(queries.shape)
