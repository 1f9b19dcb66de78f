"""Models with quantized matrices on a CPU: GGUF's types as the `gguf` library reads them, decoders
in machine code against the same weights in full, and what `--quantization` does."""

from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from pagewire.config import ModelConfig, WorkerConfig
from pagewire.worker.load import cpu_crossings, loader, quantizing
from pagewire.worker.load.gguf_file import Gguf
from pagewire.worker.load.gguf_quantized import TYPES, in_file, taken_apart
from pagewire.worker.load.weights import load
from pagewire.worker.models import describe, rotary
from pagewire.worker.models.architecture import Unsupported
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire.worker.models.rounding import ROUNDINGS
from pagewire_kernels.backend import backend
from pagewire_kernels.batch import make_batch

HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}
"""Where blocks have their float16."""
LLAMA = {
    "model_type": "llama", "vocab_size": 150, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "rope_theta": 10_000.0,
}  # fmt: skip
VARIANTS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"model_type": "qwen2"},
    "normed heads": {"model_type": "qwen3"},
    "windows": {"model_type": "mistral", "sliding_window": 9},
    "gelu": {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "experts": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "mlp_only_layers": [],
    },
    "sandwich": {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "sliding_window": 9, "query_pre_attn_scalar": 16,
                 "attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0},
}  # fmt: skip
IN_MACHINE_CODE = ("llama", "tied", "biases", "normed heads", "windows", "gelu")


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_are_taken_apart_exactly(kind: str) -> None:
    random, (_, size) = np.random.default_rng(0), GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows = random.integers(0, 256, (5, 3 * size), dtype=np.uint8)
    for place in HALVES[kind]:
        rows.reshape(-1, size)[:, place : place + 2] = (
            random.standard_normal((15, 1)).astype(np.float16).view(np.uint8)
        )
    wanted = gguf.quants.dequantize(rows, GGMLQuantizationType[kind])
    stored = in_file(kind, rows, size)
    matrix = stored.to("cpu")
    assert np.array_equal(matrix.dequantize().numpy(), wanted)
    assert np.array_equal(stored.dequantize().numpy(), wanted)
    # by NumPy, for a CPU's panels, as by torch, for a GPU
    by_place = matrix.by_place(0, 5, 5)[:, 0].transpose(2, 1, 0).reshape(5, -1)
    assert np.array_equal(by_place, matrix.codes.numpy())
    by_torch = taken_apart(TYPES[kind], torch.from_numpy(rows.reshape(5, 3, size)))
    assert torch.equal(by_torch.codes, matrix.codes)
    assert torch.equal(by_torch.scale, matrix.scale)
    assert np.array_equal(by_torch.dequantize().numpy(), wanted)


@pytest.mark.parametrize("kind", TYPES)
def test_columns_stay_in_their_blocks(kind: str) -> None:
    """So that a rank's part of a matrix is cut from the file, and not from all of its codes."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows = np.random.default_rng(1).integers(0, 120, (3, 4 * size), dtype=np.uint8)
    stored = in_file(kind, rows, size)
    whole = stored.dequantize().nan_to_num()
    for matrix in (stored, stored.to("cpu")):
        part = matrix.narrow(1, values, 2 * values)
        assert part.shape == (3, 2 * values)
        assert not isinstance(part.to("cpu").values, torch.Tensor)
        assert torch.equal(part.dequantize().nan_to_num(), whole[:, values : 3 * values])
        cut = matrix.narrow(1, 16, values)
        assert torch.equal(cut.dequantize().nan_to_num(), whole[:, 16 : values + 16])
        assert torch.equal(matrix.narrow(0, 1, 2).dequantize().nan_to_num(), whole[1:])
        assert torch.equal(matrix.take([2, 0]).dequantize().nan_to_num(), whole[[2, 0]])


def decoder_of(config: dict, dtype: torch.dtype, bits: int, like: Decoder | None = None) -> Decoder:
    """With random weights rounded to `bits`; `like`: with the same, in full."""
    arch = describe(config)
    rounding = ROUNDINGS[f"int{bits}"] if like is None else None
    chosen = quantizing.Quantizing(like is None, rounding)
    method = loader.method_choice(backend("cpu"), dtype, "cpu", chosen)
    made = Decoder(arch, Build(backend("cpu"), dtype, "cpu", method))
    load(made, None, config, 3, lambda stage, share: None)
    return made


def run(
    decoder: Decoder,
    dtype: torch.dtype,
    cache: torch.Tensor,
    batch: tuple,
    wanted: torch.Tensor | None = None,
) -> torch.Tensor:
    arch, (ids, counts, lengths, tables) = decoder.arch, batch
    everywhere = rotary.table(arch.rope, arch.head_dim, 256)
    step = make_batch(counts, lengths, tables, 4)
    return decoder(
        torch.tensor(ids), [everywhere] * arch.num_layers, list(cache), step, wanted, lambda: None
    )


STEPS = [
    ([5, 9, 11, 7, 23, 40, 2], [7], [7], [[3, 9, 6]]),
    ([8, 1, 99], [3], [3], [[12]]),
    ([17, 33], [1, 1], [8, 4], [[3, 9, 6], [12]]),
    ([3, 4, 5, 60, 61], [4, 1], [12, 5], [[3, 9, 6], [12, 2]]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_machine_code_computes_what_the_operations_do(
    variant: str, bits: int, dtype: torch.dtype, monkeypatch
) -> None:
    """The same decoder, with and without the one call for all layers: prompts, chunks, several
    sequences."""
    quantized = decoder_of({**LLAMA, **VARIANTS[variant]}, dtype, bits)
    assert (quantized._native is not None) == (variant in IN_MACHINE_CODE)
    arch = quantized.arch
    caches = torch.zeros(
        2, arch.num_layers, 2, 16, arch.num_kv_heads, 4, arch.head_dim, dtype=dtype
    )
    for step in STEPS:
        with monkeypatch.context() as patch:
            patch.setattr(quantized, "_native", None)
            wanted = run(quantized, dtype, caches[0], step)
        ours = run(quantized, dtype, caches[1], step)
        atol = 2e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(
            ours.float(), wanted.float(), atol=atol * float(wanted.abs().max().clamp(min=1)), rtol=0
        )
    torch.testing.assert_close(
        caches[1].float(),
        caches[0].float(),
        atol=1e-4 if dtype == torch.float32 else 0.05,
        rtol=0.02,
    )


@torch.inference_mode()
def test_only_the_tokens_that_are_wanted_get_logits() -> None:
    decoder = decoder_of(LLAMA, torch.float32, 8)
    cache = torch.zeros(2, 2, 16, 2, 4, 16)
    everything = run(decoder, torch.float32, cache, STEPS[0])
    some = run(decoder, torch.float32, cache, STEPS[0], torch.tensor([6, 2]))
    torch.testing.assert_close(some, everything[[6, 2]], atol=1e-5, rtol=1e-5)
    assert run(
        decoder, torch.float32, cache, STEPS[0], torch.tensor([], dtype=torch.int64)
    ).shape == (0, 150)


def start(path, **settings):
    model = {key: settings.pop(key) for key in ("quantization", "load_format") if key in settings}
    return loader.load(
        path,
        ModelConfig(**model),
        WorkerConfig(cpu_kv_cache_gb=0.01, **settings),
        lambda stage, share: None,
    )


@pytest.fixture
def checkpoint(tmp_path):
    import json

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


@pytest.mark.parametrize("asked", ["int8", "int4"])
def test_a_full_checkpoint_is_rounded_as_asked_for(asked, checkpoint, caplog) -> None:
    caplog.set_level("INFO", "pagewire.worker")
    loaded = start(checkpoint, quantization=asked, load_format="dummy", device="cpu")
    assert loaded.decoder._native is not None and f"rounded to {asked}" in caplog.text
    full = start(checkpoint, load_format="dummy", device="cpu")
    assert (
        full.decoder._native is None and loaded.sizing.weight_bytes < full.sizing.weight_bytes / 1.7
    )


def test_what_cannot_be_quantized_is_refused_in_one_line(checkpoint) -> None:
    with pytest.raises(Unsupported, match=r"--quantization int8 .*float16") as caught:
        start(checkpoint, quantization="int8", load_format="dummy", device="cpu", dtype="float16")
    assert "\n" not in str(caught.value)
    arch = describe(LLAMA)
    old_gpu = quantizing.Target(torch.float16, (7, 5))
    with pytest.raises(Unsupported, match=r"int8 .*compute capability 8\.0"):
        quantizing.choose(quantizing.Checkpoint(None), arch, "int8", old_gpu)


@pytest.mark.parametrize(("asked", "share"), [("int4", 0.625), ("int8", 1.125), ("fp8", 1.002)])
def test_a_gpu_keeps_what_is_rounded_and_plans_its_bytes(asked, share) -> None:
    arch = describe(LLAMA)
    gpu = quantizing.Target(torch.bfloat16, (9, 0))
    chosen = quantizing.choose(quantizing.Checkpoint(None), arch, asked, gpu)
    assert chosen.kept
    matrices = arch.parameters - 2 * arch.vocab_size * arch.hidden_size
    assert chosen.weight_bytes(arch) >= matrices * share


def test_without_native_code_weights_are_made_full(monkeypatch, caplog) -> None:
    monkeypatch.setattr(quantizing, "_cpu_obstacle", lambda dtype: "Numba cannot be imported")
    arch = describe(LLAMA)
    file = Mock(Gguf, type_counts=lambda: {"Q4_0": 3})
    cpu = quantizing.Target(torch.float32)
    chosen = quantizing.choose(quantizing.Checkpoint(file), arch, "", cpu)
    assert chosen == quantizing.NONE
    assert "made full (Numba cannot be imported)" in caplog.text
    with pytest.raises(Unsupported, match="Numba cannot be imported"):
        quantizing.choose(quantizing.Checkpoint(None), arch, "int8", cpu)


def test_crossings_are_measured_once_and_kept(monkeypatch, tmp_path, checkpoint) -> None:
    monkeypatch.setenv("PAGEWIRE_CACHE", str(tmp_path / "cache"))
    measured = []
    monkeypatch.setattr(
        cpu_crossings,
        "crossing",
        lambda product, dtype: measured.append((product.key, dtype)) or 12,
    )
    first = start(
        checkpoint, quantization="int8", load_format="dummy", device="cpu", dtype="float32"
    )
    assert measured and len(set(measured)) == len(measured)
    again = start(
        checkpoint, quantization="int8", load_format="dummy", device="cpu", dtype="float32"
    )
    assert len(set(measured)) == len(measured)
    for loaded in (first, again):
        assert {matrix.crossing for matrix in loaded.decoder.packed()} == {12}


def test_a_crossing_lies_where_the_dense_product_wins(monkeypatch) -> None:
    product = decoder_of(LLAMA, torch.float32, 8).layers[0].attention.qkv.kernel_weight
    for slower, wanted in ((0, 6), (40, 48), (1000, 256)):
        cost = {
            product.native: lambda rows: rows / 1000,
            product.dense: lambda rows, slower=slower: slower / 1000,
        }
        monkeypatch.setattr(cpu_crossings, "_seconds", lambda run, x, cost=cost: cost[run](len(x)))
        assert cpu_crossings.crossing(product, torch.float32) == wanted
    monkeypatch.setattr(cpu_crossings, "_seconds", lambda run, x: 2.0)
    assert cpu_crossings.crossing(product, torch.float32) == product.crossing
    monkeypatch.undo()
    assert 0 < cpu_crossings._seconds(product.native, torch.randn(2, product.columns)) < 60
