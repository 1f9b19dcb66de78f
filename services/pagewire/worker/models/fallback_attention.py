"""What stands in transformers' place for attention: a recorder of what a model asks for, and the
paged attention itself.

transformers finds a function by its name in a table of the whole process, so each instance enters
itself under a name of its own.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pagewire_kernels.backend import Ops
from pagewire_kernels.batch import Batch
from torch import Tensor
from torch.nn.functional import pad

_numbers = itertools.count()
KNOWN = {
    "dropout",
    "scaling",
    "sliding_window",
    "softcap",
    "is_causal",
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
}
KNOWN |= {
    "output_router_logits",
    "output_hidden_states",
    "logits_to_keep",
    "return_dict",
    "past_key_values",
    "position_embeddings",
}
"""Arguments that change nothing here, or are taken into account."""


@dataclass(frozen=True)
class Call:
    """What one layer asks for. size: of a head in the cache; value_size: of its values, which may
    be smaller."""

    heads: int
    kv_heads: int
    size: int
    value_size: int
    scale: float
    window: int | None
    softcap: float | None
    refused: str = ""
    """Why it cannot be done, if so."""


def _enter(function: Callable[..., Any]) -> str:
    from transformers import AttentionInterface

    name = f"pagewire-{next(_numbers)}"
    AttentionInterface.register(name, function)
    return name


class Recorder:
    """Stands in place of attention while a model runs without memory, and notes what is asked
    for."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.name = _enter(self)

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        size = query.shape[3]
        scale = more.get("scaling")
        self.calls.append(
            Call(
                heads=query.shape[1],
                kv_heads=key.shape[1],
                size=max(size, value.shape[3]),
                value_size=value.shape[3],
                scale=size**-0.5 if scale is None else float(scale),
                window=more.get("sliding_window"),
                softcap=more.get("softcap"),
                refused=_refused(module, attention_mask, more),
            )
        )
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _refused(module: Any, mask: Tensor | None, more: dict[str, Any]) -> str:
    if mask is not None:
        return "brings a mask of its own"
    if more.get("is_causal", getattr(module, "is_causal", True)) is False:
        return "is not causal"
    others = sorted(name for name, value in more.items() if name not in KNOWN and value is not None)
    return f"wants {', '.join(others)}, which the paged one does not know" if others else ""


class Attention:
    """Layers call it in their order, once each, in a forward pass within `running`."""

    def __init__(self, ops: Ops, calls: tuple[Call, ...], size: int, dtype: torch.dtype) -> None:
        """`size`: of all heads in the cache; smaller ones are padded with zeros, which changes no
        product. `dtype`: that attention is computed in."""
        self._ops = ops
        self._calls = calls
        self._size = size
        self._dtype = dtype
        self._layer = 0
        self._pass: tuple[list[Tensor], list[Tensor], Batch, Callable[[], None]] | None = None
        self.name = _enter(self)

    @contextmanager
    def running(
        self, cos_sin: list[Tensor], caches: list[Tensor], batch: Batch, tick: Callable[[], None]
    ) -> Iterator[None]:
        """Within: a forward pass of `batch` over these tables and caches, one each for every layer;
        `tick` is called after every layer."""
        self._pass = (cos_sin, caches, batch, tick)
        self._layer = 0
        try:
            yield
        finally:
            self._pass = None

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """query [1, Hq, T, D], rotated already -> [1, T, Hq, value size]."""
        assert self._pass is not None
        (cos_sin, caches, batch, tick), layer = self._pass, self._layer
        call = self._calls[layer]
        cache = caches[layer]
        self._layer += 1
        qkv = torch.cat([self._flat(part, self._dtype) for part in (query, key, value)], 1)
        q = self._ops.rope_and_cache(
            qkv, cos_sin[layer], None, None, 0.0, cache[0], cache[1], batch
        )
        out = self._ops.paged_attention(
            q, cache[0], cache[1], batch, call.scale, call.window, call.softcap
        )
        tick()
        return out.view(1, len(out), call.heads, self._size)[..., : call.value_size].to(
            query.dtype
        ), None

    def _flat(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """[1, H, T, d] -> [T, H * D]."""
        rows = part[0].transpose(0, 1).to(dtype)
        return pad(rows, (0, self._size - rows.shape[2])).flatten(1)
