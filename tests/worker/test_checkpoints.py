"""What files are accepted, and how the others are refused."""

import copy
import json

import gguf
import numpy as np
import pytest
import torch
from pagewire.config import ModelConfig
from pagewire.worker.load import kv_sizing, loader
from pagewire.worker.load.gguf_architectures import LAYER_NAMES, TOP_NAMES
from pagewire.worker.models import describe
from pagewire.worker.models.architecture import Unsupported
from pagewire.worker.models.cache_spec import cache_spec
from rank_threads import run_ranks
from worker.gguf_sizes import add_sizes


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row h*D + i + j*D/2 of a checkpoint goes to h*D + 2*i + j: what converters to GGUF do to
    Llama's queries and keys."""
    size = len(weight) // heads
    out = np.empty_like(weight)
    for h in range(heads):
        for i in range(size // 2):
            for j in range(2):
                out[h * size + 2 * i + j] = weight[h * size + i + j * size // 2]
    return out


def write_gguf(path, model, kind: str, quantization) -> dict[str, torch.Tensor]:
    """Save a transformers model as GGUF; returns the state that the file holds after
    quantization."""
    config, writer, state = model.config, gguf.GGUFWriter(path, kind), {}
    add_sizes(writer, config)
    writer.add_key_length(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            config.rope_parameters["original_max_position_embeddings"]
        )
        writer.add_rope_scaling_yarn_beta_fast(config.rope_parameters["beta_fast"])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(9)
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    names = {v: k for k, v in (LAYER_NAMES | TOP_NAMES).items()}
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        value, (stem, suffix) = tensor.numpy(), name.rsplit(".", 1)
        layer = (
            stem.removeprefix("model.layers.").partition(".")
            if stem.startswith("model.layers.")
            else None
        )
        target = (
            f"blk.{layer[0]}.{names[layer[2]]}.{suffix}" if layer else f"{names[stem]}.{suffix}"
        )
        raw = value
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            raw = permute(
                value,
                config.num_attention_heads if "q_proj" in name else config.num_key_value_heads,
            )
        if value.ndim == 2 and quantization is not None:
            raw = gguf.quants.quantize(raw, quantization)
            value = gguf.quants.dequantize(gguf.quants.quantize(value, quantization), quantization)
            writer.add_tensor(target, raw, raw_dtype=quantization)
        else:
            writer.add_tensor(target, raw)
        state[name] = torch.from_numpy(np.array(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "quantization", [None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1]
)
def test_gguf_equals_the_dequantized_model(variant, quantization, tiny, harness, numbers, tmp_path):
    path, model, tokens = tmp_path / "tiny.gguf", copy.deepcopy(tiny(variant).model), numbers(50)
    model.load_state_dict(write_gguf(path, model, variant, quantization), strict=False)
    model.tie_weights()
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0]
    ours = harness(path).logits(tokens, 50)
    assert (ours - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max())
    for halves in run_ranks(2, lambda ranks: harness(path, None, ranks).logits(tokens, 50)):
        assert (halves - wanted).abs().max() < 2e-5 * max(1.0, wanted.abs().max())
    assert loader.open_model(path, ModelConfig())[2] == (2, 9)
    assert torch.equal(harness(tmp_path).logits(tokens, 50), ours), (
        "a directory that holds only a GGUF is that GGUF"
    )


def test_gguf_with_yarn(tiny, harness, numbers, tmp_path):
    reference, tokens = tiny("yarn-rope"), numbers(90)
    write_gguf(tmp_path / "tiny.gguf", reference.model, "llama", None)
    wanted = reference.logits(tokens)
    assert (harness(tmp_path).logits(tokens, 90) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_dummy_weights_follow_the_seed(tiny, harness, numbers):
    path, tokens = tiny("llama").path, numbers(10)
    first, again, other = (
        harness(path, ModelConfig(load_format="dummy", seed=seed)).logits(tokens, 10)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def altered(source, target, **changes):
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "an encoder with a decoder; only models of a decoder alone"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "rope scaling 'mrope'"),
        ({"quantization_config": {"quant_method": "quip"}}, "quantized with 'quip'"),
        ({"rms_norm_eps": None}, "has no 'rms_norm_eps'"),
        ({"hidden_size": "wide"}, r"a value of another kind \(invalid literal .*'wide'\)"),
        ({"max_position_embeddings": 0}, r"a value of another kind \(division by zero\)"),
        ({"rope_parameters": [1]}, "a value of another kind"),
        ({"eos_token_id": "2"}, r"eos_token_id in .*config\.json is '2', not a token id"),
        ({"eos_token_id": [2, [3]]}, r"is \[2, \[3\]\], not a token id or a list of them"),
        ({"intermediate_size": 64}, "has shape .* where the configuration asks for"),
        ({"num_hidden_layers": 4}, "lacks 9 of 38 tensors"),
        ({"num_hidden_layers": 2}, "this architecture does not use"),
    ],
)
def test_refused_by_name(changes, message, tiny, harness, tmp_path):
    with pytest.raises(Unsupported, match=message):
        harness(altered(tiny("llama").path, tmp_path, **changes))


def test_missing_files_are_refused(tmp_path, harness):
    with pytest.raises(Unsupported, match=r"no config\.json"):
        harness(tmp_path)
    (tmp_path / "junk.gguf").write_bytes(b"nothing of the kind, but long enough for a header")
    with pytest.raises(Unsupported, match="not a GGUF file"):
        harness(tmp_path / "junk.gguf")


def test_half_a_download_is_named_with_what_to_do(tiny, tmp_path, harness):
    path = altered(tiny("llama").path, tmp_path)
    weights = path / "model.safetensors"
    half = weights.read_bytes()[: weights.stat().st_size // 2]
    weights.unlink()
    weights.write_bytes(half)
    with pytest.raises(
        Unsupported,
        match=rf"model\.safetensors \({len(half):,} bytes\) is broken .* fetch it again",
    ):
        harness(path)
    whole = tmp_path / "half.gguf"
    write_gguf(whole, tiny("llama").model, "llama", None)
    whole.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(Unsupported, match="the download is incomplete"):
        harness(whole)


def test_end_of_sequence_ids_of_both_files(tiny, tmp_path):
    path = altered(tiny("llama").path, tmp_path, eos_token_id=5)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert loader.open_model(path, ModelConfig())[2] == (5, 7)


SIZING = {
    "available": 8 * kv_sizing.GIB,
    "kv_bytes": kv_sizing.GIB,
    "blocks": 0,
    "block_size": 16,
    "max_model_len": 0,
    "weights": 1 << 20,
}


def arch(tiny):
    return describe(json.loads((tiny("llama").path / "config.json").read_text()))


def test_sizing_arithmetic(tiny):
    """One block: 2 (K, V) * 3 layers * 2 heads * 16 tokens * 16 * 4 bytes."""
    sizing = kv_sizing.size(arch(tiny), cache_spec(arch(tiny), torch.float32), **SIZING)
    assert sizing.block_bytes == 2 * 3 * 2 * 16 * 16 * 4
    assert sizing.num_blocks == kv_sizing.GIB // sizing.block_bytes
    assert sizing.max_model_len == 512
    assert "87,381 blocks of 16 tokens" in sizing.lines()[1]


def test_context_shrinks_to_what_fits_unless_asked_for(tiny):
    small = SIZING | {"blocks": 10}
    assert (
        kv_sizing.size(arch(tiny), cache_spec(arch(tiny), torch.float32), **small).max_model_len
        == 160
    )
    with pytest.raises(
        kv_sizing.DoesNotFit, match=r"a context of 400 tokens needs 25 KV blocks .* room for 10"
    ):
        kv_sizing.size(
            arch(tiny), cache_spec(arch(tiny), torch.float32), **(small | {"max_model_len": 400})
        )
    with pytest.raises(kv_sizing.DoesNotFit, match="more than the 512 positions"):
        kv_sizing.size(
            arch(tiny), cache_spec(arch(tiny), torch.float32), **(SIZING | {"max_model_len": 513})
        )


def test_too_little_memory_is_said_with_numbers(tiny):
    with pytest.raises(
        kv_sizing.DoesNotFit,
        match=r"needs 1\.25 GiB .* but 1\.00 GiB is free; lower --cpu-kv-cache-gb",
    ):
        kv_sizing.size(
            arch(tiny),
            cache_spec(arch(tiny), torch.float32),
            **(SIZING | {"available": kv_sizing.GIB}),
        )
