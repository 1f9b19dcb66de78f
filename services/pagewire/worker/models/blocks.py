"""What the layers of a decoder are made of: attention, MLP, mixture of experts. Everything that
differs between models is chosen when a part is made; a call takes no decisions."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pagewire_kernels.batch import Batch
from pagewire_kernels.communicator import NormingCommunicator
from pagewire_kernels.kv_cache import UNSCALED
from pagewire_kernels.quantized_rows import Activations, QuantizedRows, full_rows
from torch import Tensor

from . import rotary
from .architecture import Architecture
from .layers import (
    AddNormOfSum,
    Build,
    CorrectionBias,
    FusedAddNormOfSum,
    LayerNorm,
    Norm,
    NormOfSum,
    Part,
    RmsNorm,
)
from .linear_method import InputReader

SumInput = Literal["call", "add", "none"]
"""Which input of a norm is the sum of what attention or MLP gave on each rank: that of `__call__`,
x of `add`, or neither."""


def make_norm(arch: Architecture, build: Build, name: str, sums: SumInput = "none") -> Norm:
    """The architecture's kind of norm over the hidden size; `name` without a suffix."""
    norm: RmsNorm | LayerNorm
    if arch.norm == "layer":
        norm = LayerNorm(build, name, arch.hidden_size, arch.norm_eps, arch.norm_bias)
    else:
        norm = RmsNorm(build, name, arch.hidden_size, arch.norm_eps, arch.fp32_norm)
    if build.shard.whole or sums == "none":
        return norm
    communicator = build.communicator
    if sums == "call":
        return NormOfSum(norm, communicator)
    if isinstance(communicator, NormingCommunicator):
        return FusedAddNormOfSum(norm, communicator, communicator)
    return AddNormOfSum(norm, communicator)


class Attention:
    """Queries, keys and values from one matrix, rotation, attention over the paged cache, and the
    output's matrix."""

    def __init__(self, arch: Architecture, build: Build, name: str, index: int) -> None:
        """`name` without a suffix; `index`: of the layer."""
        size = arch.head_dim
        order = rotary.order(arch.rope, size)
        row_order = None if order is None else torch.tensor(order)
        qkv = [
            build.column_part(f"{name}.q_proj", arch.num_heads, size, row_order),
            build.column_part(f"{name}.k_proj", arch.num_kv_heads, size, row_order),
            build.column_part(f"{name}.v_proj", arch.num_kv_heads, size),
        ]
        self.qkv = build.column_parallel(qkv, arch.hidden_size, arch.qkv_bias)
        self.output = build.row_parallel(
            f"{name}.o_proj", arch.hidden_size, arch.num_heads, arch.output_bias, size
        )
        self._norms = [
            RmsNorm(build, f"{name}.{x}_norm", size, arch.norm_eps, arch.fp32_norm, row_order)
            for x in ("qk" if arch.qk_norm else "")
        ]
        self.q_weight, self.k_weight = [norm.weight for norm in self._norms] or (None, None)
        self.scale = arch.scales[index] if arch.scales else size**-0.5
        self.window = arch.windows[index]
        self.kv_scales = build.kv_scales[index] if build.kv_scales else UNSCALED
        self._eps = arch.norm_eps
        self._softcap = arch.attn_logit_softcapping
        self._alibi_slopes = None
        if arch.alibi_slopes:
            heads = build.shard.split(arch.num_heads, 0)
            slopes = torch.tensor(arch.alibi_slopes, dtype=torch.float32, device=build.device)
            held = slopes if heads is None else slopes.narrow(0, heads.start, heads.length)
            self._alibi_slopes = held
        self._ops = build.ops
        # the fused kernel knows no ALiBi
        self._fused = None if arch.alibi_slopes else build.ops.fused

    def parts(self) -> Sequence[Part]:
        """Those with weights."""
        return [self.qkv, self.output, *self._norms]

    @property
    def readers(self) -> Sequence[InputReader]:
        """What reads its input."""
        return [self.qkv]

    @property
    def _reads_ahead(self) -> bool:
        """As it was measured (docs/performance.md): with QK-norm, whose reductions take long, and
        between quantized matrices, which are read soon."""
        return self.q_weight is not None or not isinstance(self.output.kernel_weight, Tensor)

    def __call__(self, x: Activations, cos_sin: Tensor, cache: Tensor, batch: Batch) -> Tensor:
        """x [T, H] -> [T, H], of several ranks to be added up; cache [2, blocks, Hkv, block_size,
        D]."""
        qkv = self.qkv(x, batch)
        return self.output(self.after_projection(qkv, cos_sin, cache, batch), batch)

    def after_projection(self, qkv: Tensor, cos_sin: Tensor, cache: Tensor, batch: Batch) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) * D] -> [T, Hq * D]: what lies between the two matrices."""
        keys = cache[0]
        values = cache[1]
        weights = (self.q_weight, self.k_weight, self._eps)
        if self._fused is not None:
            return self._fused.rope_attention(
                qkv,
                cos_sin,
                *weights,
                keys,
                values,
                batch,
                self.scale,
                self.window,
                self._softcap,
                self.kv_scales,
                self._reads_ahead,
            )
        q = self._ops.rope_and_cache(qkv, cos_sin, *weights, keys, values, batch, self.kv_scales)
        return self._ops.paged_attention(
            q,
            keys,
            values,
            batch,
            self.scale,
            self.window,
            self._softcap,
            self._alibi_slopes,
            self.kv_scales,
        )


class Mlp:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, arch: Architecture, build: Build, name: str, inner: int) -> None:
        """`name` without a suffix; `inner`: the intermediate size."""
        ops = build.ops
        names = [f"{name}.gate_proj", f"{name}.up_proj"] if arch.gated else [f"{name}.up_proj"]
        parts = [build.column_part(part, inner) for part in names]
        self.up = build.column_parallel(parts, arch.hidden_size, arch.mlp_bias)
        self.down = build.row_parallel(f"{name}.down_proj", arch.hidden_size, inner, arch.mlp_bias)
        gated = {"silu": ops.silu_mul, "gelu_tanh": ops.gelu_mul}
        plain = {"gelu": ops.gelu, "gelu_tanh": ops.gelu_tanh, "relu": ops.relu}
        self._activation = (gated if arch.gated else plain)[arch.activation]
        self._rounded_activation: Callable[[Tensor, int], QuantizedRows] | None = None
        if arch.gated and ops.quantized is not None and ops.quantized.quantizing is not None:
            quantizing = ops.quantized.quantizing
            rounded = {"silu": quantizing.silu_mul, "gelu_tanh": quantizing.gelu_mul}
            self._rounded_activation = rounded[arch.activation]

    def parts(self) -> Sequence[Part]:
        """Those with weights."""
        return [self.up, self.down]

    @property
    def readers(self) -> Sequence[InputReader]:
        """What reads its input."""
        return [self.up]

    def _activated(self, up: Tensor) -> Activations:
        """Rounded to float8 in the same kernel where `down` would do so."""
        group = self.down.input_group(len(up), up.dtype)
        if group is None or self._rounded_activation is None:
            return self._activation(up)
        return self._rounded_activation(up, group)

    def __call__(self, x: Activations, batch: Batch) -> Tensor:
        """x [T, H] -> [T, H], of several ranks to be added up."""
        return self.down(self._activated(self.up(x, batch)), batch)


class Mixture:
    """Each token goes through the experts that a router chooses for it, weighted; where there is a
    shared expert, through that one too."""

    def __init__(self, arch: Architecture, build: Build, name: str) -> None:
        """`name` without a suffix."""
        moe = arch.moe
        hidden = arch.hidden_size
        assert moe is not None
        self._ops = build.ops
        self.routing = moe.routing
        self.router = build.replicated(f"{name}.gate", moe.num_experts, hidden, keep_precision=True)
        self.experts = build.experts(
            f"{name}.experts", moe.num_experts, hidden, moe.intermediate_size
        )
        self._correction: CorrectionBias | None = None
        if moe.correction_bias:
            self._correction = CorrectionBias(build, f"{name}.gate", moe.num_experts)
        self.shared = self._gate = None
        if moe.shared_size:
            self.shared = Mlp(arch, build, f"{name}.shared_expert", moe.shared_size)
            self._gate = build.replicated(f"{name}.shared_expert_gate", 1, hidden)

    def parts(self) -> Sequence[Part]:
        """Those with weights."""
        parts: list[Part] = [self.router, self.experts]
        if self._correction is not None:
            parts.append(self._correction)
        if self.shared is not None and self._gate is not None:
            parts += [*self.shared.parts(), self._gate]
        return parts

    @property
    def readers(self) -> Sequence[InputReader]:
        """What reads its input."""
        readers: list[InputReader] = [self.router, self.experts]
        if self.shared is not None and self._gate is not None:
            readers += [*self.shared.readers, self._gate]
        return readers

    @property
    def correction_bias(self) -> Tensor | None:
        """See Ops.route."""
        return None if self._correction is None else self._correction.bias

    def __call__(self, x: Activations, batch: Batch) -> Tensor:
        """x [T, H] -> [T, H], of several ranks to be added up."""
        logits = self.router(x, batch)
        top_k_ids, top_k_weights = self._ops.route(
            logits, self.routing, self.correction_bias, batch.slot_mapping
        )
        out = self.experts(full_rows(x), top_k_ids, top_k_weights, batch)
        if self.shared is None or self._gate is None:
            return out
        return out.addcmul_(torch.sigmoid(self._gate(x, batch)), self.shared(x, batch))
