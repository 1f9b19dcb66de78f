"""A decode step of one request through the layers made for it, against the same step through the
layers for any number of rows."""

from typing import Any

import pytest
import torch
from ops.triton_cases import error
from pagewire.worker.models import describe, rotary
from pagewire.worker.models.architecture import Architecture
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire.worker.models.quantized_weights import QuantizedMethod
from pagewire.worker.models.rounding import ROUNDINGS
from pagewire_kernels import cuda
from pagewire_kernels.backend import backend
from pagewire_kernels.batch import make_batch
from torch import Tensor

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 10000.0,
}  # fmt: skip
EXPERTS = {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
FAMILIES = [
    {"model_type": "llama"},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen3", "head_dim": 32},
    {"model_type": "mistral", "sliding_window": 9},
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "qwen3_moe", "head_dim": 32, "mlp_only_layers": [1], **EXPERTS},
    {"model_type": "qwen3_moe", "head_dim": 32, "norm_topk_prob": True, **EXPERTS},
]


@pytest.mark.parametrize("rounding", ["", "fp8", "int4"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["model_type"])
def test_one_row(family: dict[str, Any], rounding: str) -> None:
    # codes come in spans of 64 inputs
    arch = describe({**COMMON, **family, "intermediate_size": 128 if rounding else 112})
    decoder = loaded(arch, build_for(rounding))
    assert len(decoder._singles) == 2
    (single, plain), (ours, theirs) = both_ways(decoder, torch.float32)
    assert torch.allclose(single, plain, atol=1e-4)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES[-3:], ids=lambda family: family["model_type"])
def test_one_row_of_experts_in_half_precision(family: dict[str, Any], dtype: torch.dtype) -> None:
    """Within some roundings: the same experts are chosen."""
    decoder = loaded(describe({**COMMON, **family}), Build(backend("cuda"), dtype, "cpu"))
    assert len(decoder._singles) == 2
    (single, plain), _ = both_ways(decoder, dtype)
    assert error(single, plain) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("family", "rounding", "expected"),
    [(FAMILIES[0], "", False), (FAMILIES[0], "int4", True), (FAMILIES[2], "", True)],
    ids=["full", "quantized", "QK-norm"],
)
def test_attention_reads_ahead_unless_large_matrices_are_read_around_it(
    family: dict[str, Any], rounding: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    plain = cuda.decode_attention
    monkeypatch.setattr(
        cuda,
        "decode_attention",
        lambda *given, reads_ahead, **named: told.append(reads_ahead) or plain(*given, **named),
    )
    arch = describe({**COMMON, **family, "intermediate_size": 128})
    decoder = loaded(arch, build_for(rounding))
    both_ways(decoder, torch.float32)
    assert set(told) == {expected}


def build_for(rounding: str) -> Build:
    """In float32; with matrices that are rounded so, where it is not empty."""
    ops = backend("cuda")
    if not rounding:
        return Build(ops, torch.float32, "cpu")
    assert ops.quantized is not None
    method = QuantizedMethod(ops, ops.quantized, torch.float32, "cpu", ROUNDINGS[rounding])
    return Build(ops, torch.float32, "cpu", lambda names: method)


def loaded(arch: Architecture, build: Build) -> Decoder:
    """With the same random weights every time."""
    torch.manual_seed(0)
    decoder = Decoder(arch, build)
    for slot in decoder.weight_slots():
        slot.target.copy_(torch.randn(slot.shape) * 0.2)
    assert list(decoder.pack())
    return decoder


def both_ways(
    decoder: Decoder, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The logits of a step through the layers for one row and through the ordinary ones, and what is
    in the KV cache after either."""
    arch = decoder.arch
    factors = [rotary.table(arch.rope, arch.head_dim, 128)] * arch.num_layers
    blocks = torch.randn(2, 2, 6, arch.num_kv_heads, 16, arch.head_dim).to(dtype)
    batch = make_batch([1], [37], [[4, 1, 3]], 16)
    ids = torch.tensor([17])
    ours, theirs = blocks.clone(), blocks.clone()
    single = decoder(ids, factors, list(ours), batch, None, lambda: None)
    decoder._singles = []
    plain = decoder(ids, factors, list(theirs), batch, None, lambda: None)
    return (single, plain), (ours, theirs)


@pytest.mark.parametrize(
    "family",
    [
        {
            "model_type": "gpt_neox",
            "rotary_pct": 1.0,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
        },
        {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 48, **EXPERTS},
    ],
    ids=lambda family: family["model_type"],
)
def test_other_blocks_and_shared_experts_have_no_such_layers(family: dict[str, Any]) -> None:
    arch = describe({**COMMON, **family})
    decoder = Decoder(arch, Build(backend("cuda"), torch.float32, "cpu"))
    assert list(decoder.pack())
    assert decoder._singles == []
