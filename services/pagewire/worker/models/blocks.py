"""What the layers of a decoder are made of: attention, MLP, mixture of experts. Everything that
differs between models is chosen when a part is made; a call takes no decisions."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from pagewire_kernels.batch import Batch
from torch import Tensor

from .architecture import Architecture
from .layers import Build, LayerNorm, Linear, Norm, Part, Places, RmsNorm


def make_norm(arch: Architecture, build: Build, name: str) -> Norm:
    if arch.norm == "layer":
        return LayerNorm(build, name, arch.hidden_size, arch.norm_eps, arch.norm_bias)
    return RmsNorm(build, name, arch.hidden_size, arch.norm_eps, arch.fp32_norm)


class Attention:
    def __init__(self, arch: Architecture, build: Build, name: str, index: int) -> None:
        size, kv = arch.head_dim, arch.num_kv_heads * arch.head_dim
        qkv = {f"{name}.q_proj": arch.num_heads * size, f"{name}.k_proj": kv, f"{name}.v_proj": kv}
        self._ops, self._eps, self.window = build.ops, arch.norm_eps, arch.windows[index]
        self.scale = arch.scales[index] if arch.scales else size**-0.5
        self.qkv = Linear(build, qkv, arch.hidden_size, arch.qkv_bias)
        self.output = Linear(
            build, {f"{name}.o_proj": arch.hidden_size}, arch.num_heads * size, arch.output_bias
        )
        self._norms = (
            [RmsNorm(build, f"{name}.{x}_norm", size, arch.norm_eps, arch.fp32_norm) for x in "qk"]
            if arch.qk_norm
            else []
        )
        self.q_weight, self.k_weight = [norm.weight for norm in self._norms] or (None, None)
        self._more: tuple[Any, ...] = (
            () if arch.attn_logit_softcapping is None else (arch.attn_logit_softcapping,)
        )
        self._fused = hasattr(build.ops, "rope_attention") and not arch.alibi_slopes
        if arch.alibi_slopes:
            self._more = (
                arch.attn_logit_softcapping,
                torch.tensor(arch.alibi_slopes, dtype=torch.float32, device=build.device),
            )

    def parts(self) -> list[Part]:
        return [self.qkv, self.output, *self._norms]

    def __call__(self, x: Tensor, cos_sin: Tensor, cache: Tensor, batch: Batch) -> Tensor:
        """x [T, H] -> [T, H]; cache [2, blocks, Hkv, block_size, D]."""
        if self._fused:
            return self.output(self.after_projection(self.qkv(x), cos_sin, cache, batch))
        keys, values = cache[0], cache[1]
        q = self._ops.rope_and_cache(
            self.qkv(x), cos_sin, self.q_weight, self.k_weight, self._eps, keys, values, batch
        )
        return self.output(
            self._ops.paged_attention(q, keys, values, batch, self.scale, self.window, *self._more)
        )

    def after_projection(self, qkv: Tensor, cos_sin: Tensor, cache: Tensor, batch: Batch) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) * D] -> [T, Hq * D], for back ends that do all of it in one."""
        ops: Any = self._ops
        rope = ops.Rope(cos_sin, self.q_weight, self.k_weight, self._eps)
        return ops.rope_attention(
            qkv, rope, cache[0], cache[1], batch, self.scale, self.window, *self._more
        )


class Mlp:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, arch: Architecture, build: Build, name: str, inner: int) -> None:
        ops = build.ops
        names = [f"{name}.gate_proj", f"{name}.up_proj"] if arch.gated else [f"{name}.up_proj"]
        self.up = Linear(build, dict.fromkeys(names, inner), arch.hidden_size, arch.mlp_bias)
        self.down = Linear(build, {f"{name}.down_proj": arch.hidden_size}, inner, arch.mlp_bias)
        gated = {"silu": ops.silu_mul, "gelu_tanh": ops.gelu_mul}
        plain = {"gelu": ops.gelu, "gelu_tanh": ops.gelu_tanh, "relu": ops.relu}
        self._activation = (gated if arch.gated else plain)[arch.activation]

    def parts(self) -> list[Part]:
        return [self.up, self.down]

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self._activation(self.up(x)))


class Experts:
    """The matrices of all experts: gate and up [E, 2I, H], down [E, H, I]."""

    def __init__(
        self, arch: Architecture, build: Build, name: str, experts: int, inner: int
    ) -> None:
        self._ops, self._name, self._inner = build.ops, name, inner
        self._linears: list[tuple[Linear, Linear]] = []
        self._up: Any
        self._down: Any
        if build.quantized:
            self._linears = [
                _quantized_expert(build, f"{name}.{expert}", arch.hidden_size, inner)
                for expert in range(experts)
            ]
            return
        self._up, self._down = (
            build.empty(experts, 2 * inner, arch.hidden_size),
            build.empty(experts, arch.hidden_size, inner),
        )

    def places(self) -> Places:
        for linear in (part for pair in self._linears for part in pair):
            yield from linear.places()
        if self._linears:
            return
        for expert, (up, down) in enumerate(zip(self._up, self._down, strict=True)):
            yield f"{self._name}.{expert}.gate_proj.weight", up[: self._inner]
            yield f"{self._name}.{expert}.up_proj.weight", up[self._inner :]
            yield f"{self._name}.{expert}.down_proj.weight", down

    def pack(self) -> None:
        if self._linears:
            for linear in (part for pair in self._linears for part in pair):
                linear.pack()
            self._up, self._down = (
                [up.weight for up, _ in self._linears],
                [down.weight for _, down in self._linears],
            )
            return
        self._up, self._down = self._ops.pack_experts(self._up), self._ops.pack_experts(self._down)

    def packed(self) -> Iterator[Any]:
        yield from (*self._up, *self._down)

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self._ops.experts(x, self._up, self._down, chosen, weights)


def _quantized_expert(build: Build, name: str, hidden: int, inner: int) -> tuple[Linear, Linear]:
    """(gate and up, down) of an expert whose matrices may stay quantized."""
    up = Linear(
        build, dict.fromkeys((f"{name}.gate_proj", f"{name}.up_proj"), inner), hidden, False
    )
    return up, Linear(build, {f"{name}.down_proj": hidden}, inner, False)


class Mixture:
    """Each token goes through the experts that a router chooses for it, weighted; where there is a
    shared expert, through that one too."""

    def __init__(self, arch: Architecture, build: Build, name: str) -> None:
        moe = arch.moe
        assert moe is not None
        self._chosen, self._normalise = moe.top_k, moe.renormalize
        self._router = Linear(
            replace(build, quantize_to=0),
            {f"{name}.gate": moe.num_experts},
            arch.hidden_size,
            False,
        )
        self._experts = Experts(
            arch, build, f"{name}.experts", moe.num_experts, moe.intermediate_size
        )
        self._shared = (
            Mlp(arch, build, f"{name}.shared_expert", moe.shared_size) if moe.shared_size else None
        )
        self._gate = (
            Linear(build, {f"{name}.shared_expert_gate": 1}, arch.hidden_size, False)
            if moe.shared_size
            else None
        )

    def parts(self) -> list[Part]:
        shared = (
            []
            if self._shared is None or self._gate is None
            else [*self._shared.parts(), self._gate]
        )
        return [self._router, self._experts, *shared]

    def __call__(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(
            torch.softmax(self._router(x), -1, dtype=torch.float32), self._chosen, dim=-1
        )
        if self._normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = self._experts(x, chosen, weights)
        if self._shared is None or self._gate is None:
            return out
        return out.addcmul_(torch.sigmoid(self._gate(x)), self._shared(x))
