"""The activations reckoned with, against those that the decoder really keeps alive: it is run on
torch's meta device, where every tensor has a size and none has memory, with operations that
allocate what the GPU's do.
"""

import pytest
import torch
from live_bytes import Live
from pagewire.worker.load import gpu_memory
from pagewire.worker.models.architecture import Architecture, Moe
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire.worker.models.rope import Rope
from pagewire_kernels.batch import Batch
from pagewire_kernels.routing import Routing

TOKENS = 1000
SIZES = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
}


class MetaOps:
    """What the GPU's operations allocate, and nothing computed."""

    fused = quantized = None

    def __init__(self, arch: Architecture) -> None:
        self._arch = arch

    def linear(self, x, weight, bias=None):
        return x.new_empty(len(x), len(weight))

    def tied_logits(self, x, packed, weight):
        return self.linear(x, weight)

    def rms_norm(self, x, weight, eps):
        return torch.empty_like(x)

    def add_rms_norm(self, x, residual, weight, eps):
        return torch.empty_like(x), residual

    def layer_norm(self, x, weight, bias, eps):
        return torch.empty_like(x)

    def add_layer_norm(self, x, residual, weight, bias, eps):
        return torch.empty_like(x), residual

    def silu_mul(self, x):
        return x.new_empty(len(x), x.shape[1] // 2)

    gelu_mul = silu_mul

    def gelu(self, x):
        return torch.empty_like(x)

    gelu_tanh = relu = gelu

    def rope_and_cache(
        self, qkv, cos_sin, q_weight, k_weight, eps, k_cache, v_cache, batch, *scales
    ):
        return qkv.new_empty(len(qkv), self._arch.num_heads, self._arch.head_dim)

    def paged_attention(self, q, *rest, **options):
        return q.new_empty(len(q), q.shape[1] * q.shape[2])

    def route(self, logits, routing, bias, slot_mapping):
        shape = len(logits), routing.top_k
        return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape).float()

    def experts(self, x, gate_up, down, chosen, weights):
        """As in the grouped product: rows gathered by expert, both products, rows back in order,
        their sum in float32."""
        rows = chosen.numel()
        inner = self.silu_mul(self.linear(x.new_empty(rows, x.shape[1]), gate_up[0]))
        ordered = inner.new_empty(rows, x.shape[1])
        back = torch.empty_like(ordered)
        return torch.einsum("tkh,tk->th", back.view(*chosen.shape, -1).float(), weights).to(x.dtype)


def architecture(**differences) -> Architecture:
    fields = {
        "model_type": "x",
        "head_dim": 64,
        "norm_eps": 1e-5,
        "max_position": 512,
        "tie_word_embeddings": False,
        "windows": (None,) * 3,
    }
    return Architecture(**{**SIZES, **fields, "rope": Rope(theta=1e4, size=64), **differences})


MOE = Moe(Routing(8, 2, renormalize=True), 512)
PLAIN = {"gated": False, "activation": "gelu_tanh", "norm": "layer", "norm_bias": True}


@pytest.mark.parametrize(
    "differences",
    [
        {},
        {"intermediate_size": 128, "num_heads": 16},
        {"qk_norm": True, "intermediate_size": 4096},
        {"block": "sandwich"},
        {"block": "parallel", "shared_norm": True, **PLAIN},
        PLAIN,
        {"block": "post", **PLAIN},
        {"moe": MOE},
        {"moe": Moe(Routing(8, 4, renormalize=True), 64)},
    ],
    ids=[
        "gated",
        "attention",
        "wide",
        "sandwich",
        "parallel",
        "plain",
        "post",
        "experts",
        "small-experts",
    ],
)
def test_a_step_keeps_what_was_reckoned_and_not_far_less(differences):
    arch = architecture(**differences)
    decoder = Decoder(arch, Build(MetaOps(arch), torch.bfloat16, "meta"))
    ids = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    caches = [torch.empty(2, 1, device="meta")] * arch.num_layers
    batch = Batch(ids, ids, ids, ids, ids, TOKENS, TOKENS)
    with torch.inference_mode(), Live() as live:
        decoder(ids, [ids] * arch.num_layers, caches, batch, ids[:1], lambda: None)
    reckoned = gpu_memory.step_bytes(arch, 2, TOKENS)
    assert reckoned / 2 < live.peak <= reckoned, f"{live.peak / reckoned:.2f} of what was reckoned"
