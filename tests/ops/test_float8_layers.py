"""Decoders whose norms and activation functions give float8, in Triton's interpreter: the same bits
as where each product rounds its input by itself, and fewer launches."""

from collections import Counter
from typing import Any

import pytest
import torch
from pagewire.worker.models import describe, rotary
from pagewire.worker.models.architecture import Architecture
from pagewire.worker.models.blocks import Mixture, Mlp
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire.worker.models.quantized_weights import QuantizedMethod
from pagewire.worker.models.rounding import Rounding, fp8_rows
from pagewire_kernels import cuda_quantized, float8_rows, gemm_scaled
from pagewire_kernels.backend import backend
from pagewire_kernels.batch import make_batch
from pagewire_kernels.quantized import Quantized
from torch import Tensor

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "model_type": "gemma2", "sliding_window": 32, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
SHARED_EXPERT: dict[str, Any] = {
    "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [],
}  # fmt: skip
BLOCKS: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 512, "head_dim": 128,
}  # fmt: skip
TOKENS = 6


def in_blocks(weight: Tensor) -> Tensor | Quantized:
    """With a scale for each 128 x 128 weights."""
    scale = torch.rand(-(-len(weight) // 128), weight.shape[1] // 128) * 0.01 + 0.001
    by_row = scale.repeat_interleave(128, 0)[: len(weight)]
    codes = (weight / by_row.repeat_interleave(128, 1)).to(torch.float8_e4m3fn)
    return Quantized(codes, by_row, quantize_inputs=True)


BY_ROW = Rounding("fp8", "", fp8_rows, False, False)
BY_BLOCK = Rounding("fp8", "", in_blocks, False, False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Those that only round, counted; products in float8 from 2 rows on."""
    counted: Counter[str] = Counter()
    quantize_rows = float8_rows.quantize_rows

    def counting(x: Tensor, group: int) -> Any:
        counted["alone"] += 1
        return quantize_rows(x, group)

    monkeypatch.setattr(float8_rows, "quantize_rows", counting)
    monkeypatch.setattr(gemm_scaled, "LEAST_ROWS", 2)
    monkeypatch.setattr(gemm_scaled, "LEAST_ROWS_OF_BLOCKS", 2)
    monkeypatch.setattr(gemm_scaled, "_has_products", lambda device: True)
    monkeypatch.setattr(gemm_scaled, "has_block_products", lambda device: True)
    return counted


def decoder_of(arch: Architecture, rounding: Rounding) -> Decoder:
    torch.manual_seed(31)
    ops = backend("cuda")
    assert ops.quantized is not None
    method = QuantizedMethod(ops, ops.quantized, torch.float16, "cpu", rounding)
    decoder = Decoder(arch, Build(ops, torch.float16, "cpu", lambda names: method))
    for slot in decoder.weight_slots():
        slot.target.copy_(torch.randn(slot.shape) * 0.05)
    assert list(decoder.pack())
    return decoder


def logits(decoder: Decoder) -> Tensor:
    arch = decoder.arch
    torch.manual_seed(32)
    factors = [rotary.table(arch.rope, arch.head_dim, 64)] * arch.num_layers
    caches = torch.randn(arch.num_layers, 2, 4, arch.num_kv_heads, 16, arch.head_dim)
    batch = make_batch([TOKENS], [20], [[1, 2]], 16)
    ids = torch.arange(TOKENS)
    return decoder(ids, factors, list(caches.half()), batch, None, lambda: None)


def round_apart(decoder: Decoder) -> None:
    """As without the kernels that give float8 at once."""
    for layer in decoder.layers:
        for norm in layer.input_norms:
            norm._quantizing = None
        mlp = layer.mlp.shared if isinstance(layer.mlp, Mixture) else layer.mlp
        assert isinstance(mlp, Mlp)
        mlp._rounded_activation = None


@pytest.mark.parametrize(
    ("config", "rounding", "alone", "apart"),
    [
        ({"model_type": "llama"}, BY_ROW, 1, 4),
        (GEMMA, BY_ROW, 1, 4),
        # the shared expert's gate, of one row, reads float8 too; the router and experts do not
        (SHARED_EXPERT, BY_ROW, 1, 5),
        (BLOCKS, BY_BLOCK, 1, 4),
    ],
    ids=["sequential", "sandwich", "shared expert", "blocks"],
)
def test_the_same_bits_with_fewer_launches(
    config: dict[str, Any], rounding: Rounding, alone: int, apart: int, launches: Counter[str]
) -> None:
    arch = describe({**COMMON, **config})
    decoder = decoder_of(arch, rounding)
    fused = logits(decoder)
    assert launches["alone"] == alone * arch.num_layers
    launches.clear()
    round_apart(decoder)
    assert torch.equal(logits(decoder), fused)
    assert launches["alone"] == apart * arch.num_layers
    assert bool(fused.isfinite().all())


def test_few_rows_are_not_rounded(launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_scaled, "LEAST_ROWS", TOKENS + 1)
    monkeypatch.setattr(cuda_quantized.QuantizedMatrices, "in_float8", None)
    logits(decoder_of(describe({**COMMON, "model_type": "llama"}), BY_ROW))
    assert not launches
