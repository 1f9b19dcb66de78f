"""GGUF files of Gemma and Phi-3, written as llama.cpp's convert_hf_to_gguf.py writes them: the same
logits as transformers has of the checkpoint, and the same configuration as it reads from the file.
"""

import math
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from pagewire.checkpoint import model_types
from pagewire.hub.huggingface import demo_gguf
from pagewire.worker.load import gguf_architectures, quantizing
from pagewire.worker.load.gguf_file import Gguf
from pagewire.worker.models import describe
from rank_threads import run_ranks
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from worker.conftest import assert_close
from worker.gguf_sizes import add_sizes
from worker.model_variants import LONGROPE, SIZES, SOFT_CAPS

TYPES = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
Q8_0 = gguf.GGMLQuantizationType.Q8_0
GEMMA_SIZES = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 21}
GEMMA3_LAYERS = {**GEMMA_SIZES, "num_hidden_layers": 8}
"""Of which the sixth sees all tokens."""
SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
LONG = {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}
MODELS = {
    "gemma": ("gemma", "Gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", "Gemma2", {**GEMMA_SIZES, **SOFT_CAPS}),
    "gemma3": ("gemma3", "Gemma3Text", GEMMA3_LAYERS),
    "gemma3-4b": ("gemma3", "Gemma3Text", {**GEMMA3_LAYERS, "rope_parameters": SCALED}),
    "phi3": ("phi3", "Phi3", {"sliding_window": 21}),
    "phi3-long": ("phi3", "Phi3", LONG),
    "phi4-mini": (
        "phi3",
        "Phi3",
        {"partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    ),
}
"""general.architecture, transformers' name, what differs from SIZES."""


def build(name: str, **changes) -> torch.nn.Module:
    """Random norms too: their defaults would hide mistakes."""
    _, family, extra = MODELS[name]
    torch.manual_seed(11)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **extra, **changes})
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # the others leave the cap out
    class_name = f"{family.removesuffix('Text')}ForCausalLM"
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def add_common(writer: gguf.GGUFWriter, config) -> None:
    add_sizes(writer, config)
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_eos_token_id(2)


def add_gemma(writer: gguf.GGUFWriter, config) -> None:
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type != "gemma":
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma3_text":
        everywhere = config.rope_parameters["full_attention"]
        writer.add_rope_freq_base(everywhere["rope_theta"])
        if everywhere["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(everywhere["factor"])


def add_phi3(writer: gguf.GGUFWriter, config) -> None:
    rope = config.rope_parameters
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    share = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(int(share * config.hidden_size) // config.num_attention_heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original))
        writer.add_rope_scaling_attn_factors(factor)
        for length in ("long", "short"):
            factors = torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors.numpy())


def write(path: Path, model, kind: str, quantization=None) -> None:
    """Save `model`, whose matrices become those that the file holds after quantization."""
    config = model.config
    writer = gguf.GGUFWriter(path, kind)
    add_common(writer, config)
    (add_phi3 if kind == "phi3" else add_gemma)(writer, config)
    names = gguf.get_tensor_name_map(TYPES[kind], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None, name
        value = parameter.detach().numpy()
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if parameter.ndim == 2 and quantization is not None:
            blocks = gguf.quants.quantize(value, quantization)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(blocks, quantization).copy())
            writer.add_tensor(target, blocks, raw_dtype=quantization)
        else:
            writer.add_tensor(target, value)
    close(writer)


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits_of(model, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantization", [None, Q8_0], ids=["F32", "Q8_0"])
def test_logits_are_those_of_transformers(name, quantization, harness, numbers, tmp_path):
    model = build(name)
    write(tmp_path / "tiny.gguf", model, MODELS[name][0], quantization)
    tokens = numbers(90)
    ours = harness(tmp_path / "tiny.gguf").logits(tokens, 32)
    assert_close(ours, logits_of(model, tokens))


def test_matrices_stay_quantized(harness, tmp_path, caplog):
    """Joined ones as well: four matrices in each of three layers, the embedding and the head."""
    write(tmp_path / "tiny.gguf", build("phi3"), "phi3", Q8_0)
    caplog.set_level("INFO")
    harness(tmp_path / "tiny.gguf")
    assert "14 Q8_0 matrices stay quantized, which saves about 0 MiB" in caplog.text


@pytest.mark.parametrize(("capability", "saved"), [(None, 165), ((9, 0), 109)])
def test_the_start_says_what_that_saves(capability, saved, caplog):
    """Of the demo model's 256 MiB in bf16; on a GPU its table of embeddings, 54 MiB, is full."""
    caplog.set_level("INFO")
    file = Gguf(Path(str(demo_gguf())))
    target = quantizing.Target(torch.bfloat16, capability)
    chosen = quantizing._of_gguf(file, describe(file.config()), target)
    assert chosen.kept
    assert f"matrices stay quantized, which saves about {saved} MiB" in caplog.text


@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_two_ranks_share_the_matrices(name, harness, numbers, tmp_path):
    model = build(name)
    write(tmp_path / "tiny.gguf", model, MODELS[name][0], Q8_0)
    tokens = numbers(50)
    wanted = logits_of(model, tokens)
    path = tmp_path / "tiny.gguf"
    for ours in run_ranks(2, lambda ranks: harness(path, None, ranks).logits(tokens, 50)):
        assert_close(ours, wanted)


def test_factors_of_short_contexts(harness, numbers, tmp_path):
    """Those are taken where no longer context is served."""
    model = build("phi3-long")
    write(tmp_path / "tiny.gguf", model, "phi3")
    tokens = numbers(60)
    ours = harness(tmp_path / "tiny.gguf", num_kv_blocks=8).logits(tokens, 60)
    assert_close(ours, logits_of(model, tokens))


COMPARED = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads")
COMPARED += ("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gemma2", ("head_dim", "sliding_window")),
        ("gemma3", ("head_dim", "sliding_window")),
        ("phi3", ()),
    ],
)
def test_configuration_is_that_of_transformers(name, more, tmp_path):
    model = build(name)
    write(tmp_path / "tiny.gguf", model, MODELS[name][0])
    theirs = load_gguf_checkpoint(tmp_path / "tiny.gguf", return_tensors=False)["config"]
    ours = Gguf(tmp_path / "tiny.gguf").config()
    assert ours["model_type"] == theirs["model_type"]
    for field in (*COMPARED, *more):
        assert ours[field] == pytest.approx(theirs[field]), field


def test_a_gemma_3_without_windows(harness, numbers, tmp_path):
    """All of its layers see all tokens, and rotate as those do."""
    model = build("gemma3-4b", layer_types=["full_attention"] * 8)
    model.config.sliding_window = 0
    write(tmp_path / "tiny.gguf", model, "gemma3")
    tokens = numbers(60)
    assert_close(harness(tmp_path / "tiny.gguf").logits(tokens, 60), logits_of(model, tokens))


def bare(path: Path, kind: str, layers: int, **keys) -> dict:
    """The configuration from a file of the sizes alone."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(layers)
    writer.add_embedding_length(96)
    writer.add_head_count(4)
    for name, value in keys.items():
        key = f"{kind}.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tensor("token_embd.weight", torch.zeros(5, 96).numpy())
    close(writer)
    return Gguf(path).config()


@pytest.mark.parametrize(
    ("kind", "layers", "scalar"),
    [("gemma2", 42, 16), ("gemma2", 46, 24), ("gemma3", 48, 16), ("gemma3", 62, 24)],
)
def test_models_of_27b_scale_scores_by_another_size(kind, layers, scalar, tmp_path):
    config = bare(tmp_path / "m.gguf", kind, layers, attention__key_length=16)
    assert config["query_pre_attn_scalar"] == scalar


def test_keys_that_files_of_gemma_lack(tmp_path):
    config = bare(tmp_path / "2.gguf", "gemma2", 2)
    assert config["sliding_window"] == 4096
    assert config["attn_logit_softcapping"] == 50
    assert config["final_logit_softcapping"] == 30
    off = bare(tmp_path / "off.gguf", "gemma2", 2, attn_logit_softcapping=0.0)
    assert "attn_logit_softcapping" not in off
    third = bare(tmp_path / "3.gguf", "gemma3", 2)
    assert "final_logit_softcapping" not in third


SIZES_OF_GEMMA3 = {
    "context_length": 64,
    "feed_forward_length": 32,
    "attention__layer_norm_rms_epsilon": 1e-6,
    "attention__sliding_window": 8,
}


@pytest.mark.parametrize(
    ("keys", "far", "theta"),
    [
        ({}, [5], 10_000),
        ({"attention__sliding_window_pattern": 2, "rope__freq_base_swa": 500.0}, [1, 3, 5], 500),
        ({"attention__sliding_window_pattern": [True, False, *[True] * 5]}, [1], 10_000),
    ],
    ids=["default", "every second", "by layer"],
)
def test_windows_that_files_of_gemma_3_name(keys, far, theta, tmp_path):
    arch = describe(bare(tmp_path / "m.gguf", "gemma3", 7, **SIZES_OF_GEMMA3, **keys))
    assert arch.windows == tuple(None if n in far else 8 for n in range(7))
    assert arch.local_rope is not None
    assert arch.local_rope.theta == theta


@pytest.mark.parametrize(
    ("layers", "context", "keys", "window"),
    [
        (32, 4096, {}, 2047),
        (40, 4096, {}, 2047),
        (32, 4096, {"attention__sliding_window": 0}, None),
        (32, 131_072, {}, None),
        (32, 131_072, {"attention__sliding_window": 262_144}, 262_144),
    ],
)
def test_windows_of_phi_3(layers, context, keys, window, tmp_path):
    config = bare(tmp_path / "m.gguf", "phi3", layers, context_length=context, **keys)
    assert config.get("sliding_window") == window


def test_the_early_check_knows_the_same_architectures():
    assert tuple(gguf_architectures.ARCHITECTURES) == model_types.GGUF_ARCHITECTURES
