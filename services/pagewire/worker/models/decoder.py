"""The decoder that all families share: embedding, layers of attention and gated MLP, final norm, head. Knows no checkpoint format."""

from collections.abc import Callable, Iterator

import torch
from pagewire_kernels.backend import Ops
from pagewire_kernels.batch import Batch
from torch import Tensor

from ..architecture import Architecture
from ..layers import Embedding, Linear, Norm, Places, TiedHead

Tap = Callable[[Callable[[Tensor], Tensor]], None]


class Layer:
    def __init__(self, arch: Architecture, index: int, ops: Ops, dtype: torch.dtype, device: str) -> None:
        self._ops, self._eps, self._scale, self._window = ops, arch.rms_norm_eps, arch.head_dim**-0.5, arch.windows[index]
        hidden, inner, size = arch.hidden_size, arch.intermediate_size, arch.head_dim
        name = f"model.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        kv = arch.num_kv_heads * size
        qkv = {f"{attention}.q_proj": arch.num_heads * size, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}
        self.input_norm = Norm(f"{name}.input_layernorm", hidden, dtype, device)
        self.qkv = Linear(ops, qkv, hidden, arch.qkv_bias, dtype, device)
        self.output = Linear(ops, {f"{attention}.o_proj": hidden}, arch.num_heads * size, arch.output_bias, dtype, device)
        self.mlp_norm = Norm(f"{name}.post_attention_layernorm", hidden, dtype, device)
        self.gate_up = Linear(ops, {f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner}, hidden, arch.mlp_bias, dtype, device)
        self.down = Linear(ops, {f"{mlp}.down_proj": hidden}, inner, arch.mlp_bias, dtype, device)
        self.head_norms = [Norm(f"{attention}.{x}_norm", size, dtype, device) for x in "qk"] if arch.qk_norm else []
        self._q_weight, self._k_weight = [norm.weight for norm in self.head_norms] or (None, None)

    def linears(self) -> list[Linear]:
        return [self.qkv, self.output, self.gate_up, self.down]

    def places(self) -> Places:
        for part in (*self.linears(), self.input_norm, self.mlp_norm, *self.head_norms):
            yield from part.places()

    def __call__(self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, cache: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x [T, H] is the last layer's output, still to be added to `residual`; cache [2, blocks, Hkv, block_size, D]."""
        ops, eps = self._ops, self._eps
        if residual is None:
            x, residual = ops.rms_norm(x, self.input_norm.weight, eps), x
        else:
            x, residual = ops.add_rms_norm(x, residual, self.input_norm.weight, eps)
        q = ops.rope_and_cache(self.qkv(x), cos_sin, self._q_weight, self._k_weight, eps, cache[0], cache[1], batch)
        x = self.output(ops.paged_attention(q, cache[0], cache[1], batch, self._scale, self._window))
        x, residual = ops.add_rms_norm(x, residual, self.mlp_norm.weight, eps)
        return self.down(ops.silu_mul(self.gate_up(x))), residual


class Decoder:
    """Weights are uninitialised until every one of `places` is filled; `pack` then makes the model ready to run."""

    def __init__(self, arch: Architecture, ops: Ops, dtype: torch.dtype, device: str) -> None:
        self.arch, self._ops = arch, ops
        self.embedding = Embedding("model.embed_tokens", arch.vocab_size, arch.hidden_size, dtype, device)
        self.layers = [Layer(arch, i, ops, dtype, device) for i in range(arch.num_layers)]
        self.norm = Norm("model.norm", arch.hidden_size, dtype, device)
        self.head: Linear | TiedHead = (
            TiedHead(ops, self.embedding)
            if arch.tied
            else Linear(ops, {"lm_head": arch.vocab_size}, arch.hidden_size, False, dtype, device)
        )

    def places(self) -> Places:
        """Every checkpoint tensor the model wants, with the memory it goes to."""
        for part in (self.embedding, *self.layers, self.norm, self.head):
            yield from part.places()

    def pack(self) -> Iterator[float]:
        """Put each matrix into the back end's layout; yields the share done."""
        linears = [linear for layer in self.layers for linear in layer.linears()]
        for done, part in enumerate((*linears, self.head)):
            part.pack()
            yield done / len(linears)

    def __call__(
        self,
        ids: Tensor,
        cos_sin: Tensor,
        caches: list[Tensor],
        batch: Batch,
        wanted: Tensor | None,
        tick: Callable[[], None],
        tap: Tap | None = None,
    ) -> Tensor:
        """ids [T] int64 -> logits [R, V] of the tokens `wanted` [R] int64 (None: of all). `tick` is called after every layer; `tap`, before
        the end, with a function from such a `wanted` to logits, for those who look at many tokens, a few at a time."""
        x, residual = self.embedding(ids), None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, cos_sin, cache, batch)
            tick()
        if tap is not None:
            hidden, rest = x, residual
            tap(lambda rows: self._logits(hidden, rest, rows))
        return self._logits(x, residual, wanted)

    def _logits(self, x: Tensor, residual: Tensor | None, wanted: Tensor | None) -> Tensor:
        if wanted is not None:
            x, residual = x[wanted], residual[wanted] if residual is not None else None
        if residual is not None:
            x, _ = self._ops.add_rms_norm(x, residual, self.norm.weight, self.arch.rms_norm_eps)
        return self.head(x)
