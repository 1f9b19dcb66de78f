"""A decode step of one request through the layers made for it, against the same step through the
layers for any number of rows."""

from typing import Any

import pytest
import torch
from pagewire.worker.models import describe, rotary
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire.worker.models.quantized_weights import QuantizedMethod
from pagewire.worker.models.rounding import ROUNDINGS
from pagewire_kernels.backend import backend
from pagewire_kernels.batch import make_batch

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 10000.0,
}  # fmt: skip
FAMILIES = [
    {"model_type": "llama"},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen3", "head_dim": 32},
    {"model_type": "mistral", "sliding_window": 9},
]


@pytest.mark.parametrize("rounding", ["", "fp8", "int4"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["model_type"])
def test_one_row(family: dict[str, Any], rounding: str) -> None:
    torch.manual_seed(0)
    # codes come in spans of 64 inputs
    arch = describe({**COMMON, **family, "intermediate_size": 128 if rounding else 112})
    ops = backend("cuda")
    build = Build(ops, torch.float32, "cpu")
    if rounding:
        assert ops.quantized is not None
        method = QuantizedMethod(ops, ops.quantized, torch.float32, "cpu", ROUNDINGS[rounding])
        build = Build(ops, torch.float32, "cpu", lambda names: method)
    decoder = Decoder(arch, build)
    for slot in decoder.weight_slots():
        slot.target.copy_(torch.randn(slot.shape) * 0.2)
    assert list(decoder.pack())
    assert len(decoder._singles) == 2
    factors = [rotary.table(rope, arch.head_dim, 128) for rope in rotary_of(arch)]
    blocks = torch.randn(2, 2, 6, arch.num_kv_heads, 16, arch.head_dim)
    batch = make_batch([1], [37], [[4, 1, 3]], 16)
    ids = torch.tensor([17])
    ours, theirs = list(blocks.clone()), list(blocks.clone())
    single = decoder(ids, factors, ours, batch, None, lambda: None)
    decoder._singles = []
    plain = decoder(ids, factors, theirs, batch, None, lambda: None)
    assert torch.allclose(single, plain, atol=1e-4)
    assert torch.allclose(torch.stack(ours), torch.stack(theirs), atol=1e-5)


def rotary_of(arch: Any) -> list[Any]:
    return [arch.rope] * arch.num_layers


def test_other_blocks_have_no_such_layers() -> None:
    arch = describe(
        {
            **COMMON,
            "model_type": "gpt_neox",
            "rotary_pct": 1.0,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
        }
    )
    decoder = Decoder(arch, Build(backend("cuda"), torch.float32, "cpu"))
    assert list(decoder.pack())
    assert decoder._singles == []
