"""--kv-cache-dtype: whole models over caches of 8-bit codes against transformers with keys and values
rounded in the same way, scales of checkpoints, memory, refusals."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from pagewire.config import ModelConfig, WorkerConfig
from pagewire.worker.load import kv_dtype, loader
from pagewire.worker.models import describe
from pagewire.worker.models.architecture import Unsupported
from pagewire.worker.models.cache_spec import cache_spec
from pagewire_kernels.kv_cache import FP8, UNSCALED, KVScales, dequantize, quantize
from pagewire_protocol.messages import pack
from pagewire_protocol.sampling import Sampling
from safetensors.torch import load_file, save_file
from torch import Tensor
from worker.conftest import Driver, Harness, Tiny, build, worker_config

LENGTH = 60
FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gpt2", "falcon-rw")
"""Plain, normed heads, a window, soft caps, a family with names of its own, ALiBi."""
SCALES = (KVScales(0.013, 0.02), KVScales(0.31, 0.27), KVScales(0.02, 1.7))


def rounded_attention(scales: tuple[KVScales, ...]) -> str:
    """transformers' own attention over keys and values that went through codes; its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def attend(module, query, key, value, mask, **more):
        scale = scales[module.layer_idx]
        key = dequantize(quantize(key, scale.k), scale.k).to(query.dtype)
        value = dequantize(quantize(value, scale.v), scale.v).to(query.dtype)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        factor = more.get("scaling") or query.shape[3] ** -0.5
        scores = query @ key.mT * factor
        cap = more.get("softcap")
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        if mask is not None:
            scores = scores + mask[..., : key.shape[2]]
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    name = "rounded keys and values"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, eager_mask)
    return name


def expected(
    variant: str,
    tokens: list[int],
    scales: tuple[KVScales, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    model = build(variant).to(dtype)
    model.set_attn_implementation(rounded_attention(scales))
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def with_scales(tiny: Tiny, folder: Path, spelling: str = "self_attn.{kind}_scale") -> Path:
    """A copy of the checkpoint that has SCALES as well."""
    shutil.copytree(tiny.path, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for i, scales in enumerate(SCALES):
        for kind, value in (("k", scales.k), ("v", scales.v)):
            name = f"model.layers.{i}.{spelling.format(kind=kind)}"
            tensors[name] = torch.tensor([value])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def worst(ours: Tensor, wanted: Tensor) -> float:
    return (ours.float().log_softmax(-1) - wanted).abs().max().item()


@pytest.mark.parametrize("variant", FAMILIES[:5])
@pytest.mark.parametrize("chunk", [LENGTH, 7])
def test_log_probabilities_are_those_over_rounded_keys_and_values(variant, chunk, tiny, numbers):
    tokens = numbers(LENGTH)
    wanted = expected(variant, tokens, (UNSCALED,) * 8)
    ours = Harness(tiny(variant).path, kv_cache_dtype="fp8").logits(tokens, chunk)
    full = Harness(tiny(variant).path).logits(tokens, chunk)
    # A number in the middle of two codes may go to the other one: float32's last bit decides.
    assert worst(ours, wanted) < 5e-3
    median = (ours.log_softmax(-1) - wanted).abs().median().item()
    assert median < 1e-4
    assert worst(full, wanted) > 20 * worst(ours, wanted)


def test_alibi_differs_from_the_full_cache_by_rounding_alone(tiny, numbers):
    """transformers' attention of this family cannot be replaced."""
    tokens = numbers(LENGTH)
    reference = tiny("falcon-rw")
    wanted = reference.logits(tokens).log_softmax(-1)
    ours = Harness(reference.path, kv_cache_dtype="fp8").logits(tokens, 7).log_softmax(-1)
    assert 1e-3 < (ours - wanted).abs().mean() < 0.1


def test_in_bfloat16_the_error_is_bfloat16s_own(tiny, numbers):
    """Within twice what transformers in the type has over keys and values that are rounded alike."""
    tokens, reference = numbers(LENGTH), tiny("llama")
    rounded = expected("llama", tokens, (UNSCALED,) * 8)
    own = expected("llama", tokens, (UNSCALED,) * 8, torch.bfloat16)
    ours = Harness(reference.path, dtype="bfloat16", kv_cache_dtype="fp8").logits(tokens, 11)
    ours = ours.float().log_softmax(-1)
    assert (ours - rounded).abs().mean() < 2 * (own - rounded).abs().mean()


def test_scales_come_from_the_checkpoint(tiny, numbers, tmp_path, caplog):
    tokens = numbers(LENGTH)
    path = with_scales(tiny("llama"), tmp_path)
    with caplog.at_level(logging.INFO):
        ours = Harness(path, kv_cache_dtype="fp8_e4m3").logits(tokens, 13)
    ours = ours.log_softmax(-1)
    apart = [
        (ours - expected("llama", tokens, scales)).abs() for scales in (SCALES, (UNSCALED,) * 3)
    ]
    assert apart[0].median() < 1e-4 and apart[0].max() < 0.2
    assert apart[1].mean() > 20 * apart[0].mean()
    lines = [record.getMessage() for record in caplog.records]
    assert "KV cache in fp8 (e4m3), with the scales of the checkpoint" in lines
    assert any("MiB in fp8 (e4m3): 160 blocks" in line for line in lines)


@pytest.mark.parametrize(
    "spelling",
    [
        "self_attn.{kind}_proj.{kind}_scale",
        "self_attn.{kind}_proj.output_scale",
        "self_attn.attn.{kind}_scale",
    ],
)
def test_scales_have_several_names(spelling, tiny, tmp_path):
    path = with_scales(tiny("llama"), tmp_path, spelling)
    loaded = loader.load(
        path, ModelConfig(), worker_config(kv_cache_dtype="fp8"), lambda stage, fraction: None
    )
    found = [layer.attention.kv_scales for layer in loaded.decoder.layers]
    assert [(s.k, s.v) for s in found] == [(pytest.approx(s.k), pytest.approx(s.v)) for s in SCALES]


def test_scales_of_a_full_checkpoint_change_nothing_with_auto(tiny, numbers, tmp_path, caplog):
    tokens = numbers(20)
    path = with_scales(tiny("llama"), tmp_path)
    with caplog.at_level(logging.INFO):
        ours = Harness(path).logits(tokens, 20)
    assert torch.equal(ours, Harness(tiny("llama").path).logits(tokens, 20))
    assert any("--kv-cache-dtype fp8 uses them" in r.getMessage() for r in caplog.records)


def named(values: dict[str, float | list[float]]):
    return [(name, torch.tensor(value)) for name, value in values.items()]


def test_one_scale_for_both_and_scales_of_some_layers(caplog):
    tensors = named(
        {"model.layers.1.self_attn.kv_scale": 0.5, "model.layers.1.self_attn.q_scale": 9.0}
    )
    with caplog.at_level(logging.INFO):
        assert kv_dtype.scales(tensors, 2, {}, "fp8") == (UNSCALED, KVScales(0.5, 0.5))
        assert kv_dtype.scales([], 2, {}, "fp8") == (UNSCALED,) * 2
        assert kv_dtype.scales(tensors, 2, {}, "auto") == ()
    assert "scales for 1 of 2 layers, 1.0 is used for the others" in caplog.text
    assert "the checkpoint has no scales for it, 1.0 is used" in caplog.text


@pytest.mark.parametrize(
    ("values", "settings", "words"),
    [
        ({"m.0.attn.k_scale": 1.0}, {}, "has k_scale of layer 0 and no v_scale"),
        ({"m.0.attn.kv_scale": 0.0}, {}, "m.0.attn.kv_scale is 0, which is no scale"),
        ({"m.0.attn.kv_scale": float("nan")}, {}, "is nan, which is no scale"),
        ({"m.0.attn.k_scale": [1.0, 2.0]}, {}, r"has shape \[2\]; one scale for the keys"),
        ({"m.4.attn.kv_scale": 1.0}, {}, "but the model has 2 layers"),
        ({}, {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "is int of 8 bits"),
    ],
)
def test_scales_that_are_none_are_refused_in_one_line(values, settings, words):
    with pytest.raises(Unsupported, match=words) as caught:
        kv_dtype.scales(named(values), 2, settings, "fp8")
    assert "\n" not in str(caught.value)


def test_weights_are_no_scales():
    for name in ("model.layers.0.self_attn.k_proj.weight_scale", "model.layers.0.self_attn.k_proj.weight",
                 "model.layers.0.self_attn.k_proj.input_scale"):  # fmt: skip
        assert not kv_dtype.is_scale(name)


def test_a_cache_of_codes_has_nearly_twice_the_tokens():
    from pagewire.config import SchedulerConfig
    from pagewire.worker.load import gpu_plan, kv_sizing
    from worker.test_memory import H200, T4, arch

    llama = arch()
    full, codes = (cache_spec(llama, dtype) for dtype in (torch.bfloat16, FP8))
    assert full.block_bytes(16) == 2 * codes.block_bytes(16)
    assert codes.groups[0].allocate(3, 16, "cpu").nbytes == 3 * codes.block_bytes(16)
    plans = [
        gpu_plan.plan_gpu(
            llama, torch.bfloat16, ModelConfig(), WorkerConfig(kv_cache_dtype=kind), H200, SchedulerConfig()
        )
        for kind in ("auto", "fp8")
    ]  # fmt: skip
    assert plans[1].sizing.num_blocks >= 1.95 * plans[0].sizing.num_blocks
    assert "in fp8 (e4m3)" in plans[1].sizing.lines()[3]
    assert "fp8" not in " ".join(plans[0].sizing.lines())
    small = arch("qwen3-0.6b")
    on_t4 = [
        gpu_plan.plan_gpu(
            small, torch.float16, ModelConfig(), WorkerConfig(kv_cache_dtype=kind), T4, SchedulerConfig()
        )
        for kind in ("auto", "fp8")
    ]  # fmt: skip
    assert on_t4[1].sizing.num_blocks >= 1.95 * on_t4[0].sizing.num_blocks
    sizes = {
        "weights": 0,
        "available": 1 << 40,
        "kv_bytes": 1 << 30,
        "blocks": 0,
        "block_size": 16,
        "max_model_len": 0,
    }
    on_cpu = [kv_sizing.size(llama, spec, **sizes).num_blocks for spec in (full, codes)]
    assert on_cpu[1] == 2 * on_cpu[0]


def greedy(path: Path, chunk: int, numbers, **settings) -> list[list[int]]:
    prompts = [numbers(30, 1), numbers(41, 2)]
    sampling = [Sampling(seed=i, max_tokens=99, temperature=0.0) for i in range(2)]
    return Driver(path, kv_cache_dtype="fp8", **settings).generate(prompts, sampling, 8, chunk)


def test_chunks_resumption_and_cached_prefixes_give_the_same_tokens(tiny, numbers):
    """A token's keys and values are rounded once, when they are written, and read as codes even by
    the step that wrote them."""
    path = tiny("llama").path
    whole = greedy(path, 10**6, numbers)
    assert greedy(path, 9, numbers) == whole
    driver = Driver(path, kv_cache_dtype="fp8")
    sampling = Sampling(seed=0, max_tokens=99, temperature=0.0)
    prompt = numbers(30, 1)
    # resumed on another worker after five tokens
    first = driver.admission(0, prompt, sampling, tuple(whole[0][:5]), room=8)
    driver.step(admit=(first,), run_slots=pack("i", [0]), run_counts=pack("i", [35]))
    assert driver.out[0] == whole[0][:6]
    # another request that begins with its blocks
    cached = driver.held[0][:3]
    second = driver.admission(1, prompt, sampling, room=8, cached=cached)
    driver.step(admit=(second,), run_slots=pack("i", [1]), run_counts=pack("i", [6]))
    assert driver.out[1] == whole[0][:1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_machine_code_for_few_tokens_reads_and_writes_codes(dtype, tiny, tmp_path, numbers):
    """All layers in one call, beside layers by torch over the same quantized weights."""
    path = with_scales(tiny("llama"), tmp_path)
    model = ModelConfig(quantization="int8")
    settings = {"dtype": dtype, "kv_cache_dtype": "fp8"}
    native, plain = (Harness(path, model, **settings) for _ in range(2))
    if native._loaded.decoder._native is None:
        pytest.skip("no machine code here")
    plain._loaded.decoder._native = None
    tokens = numbers(40)
    ours, wanted = native.logits(tokens, 5).float(), plain.logits(tokens, 5).float()
    error = (ours.log_softmax(-1) - wanted.log_softmax(-1)).abs()
    # torch's layers round keys to bfloat16 first, which sends some to another code
    assert error.mean() < (2e-3 if dtype == "float32" else 0.2)
    same = native._loaded.cache.view(torch.uint8) == plain._loaded.cache.view(torch.uint8)
    assert same.float().mean() > (0.999 if dtype == "float32" else 0.95)


def test_models_through_transformers_use_it_too(tmp_path, numbers):
    """Attention is ours there as well; the check against transformers has a cache of full
    numbers."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}  # fmt: skip
    Olmo2ForCausalLM(Olmo2Config(**sizes)).save_pretrained(tmp_path)
    tokens = numbers(30)
    full = Harness(tmp_path).logits(tokens, 30).log_softmax(-1)
    ours = Harness(tmp_path, kv_cache_dtype="fp8")
    assert ours._loaded.cache.dtype == FP8
    difference = (ours.logits(tokens, 7).log_softmax(-1) - full).abs().mean()
    assert 1e-4 < difference < 0.2


def test_a_scheme_of_the_configuration_is_looked_at(tiny, tmp_path):
    path = with_scales(tiny("llama"), tmp_path)
    config = json.loads((path / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "int"}
    settings = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme, "format": "float-quantized",
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}}  # fmt: skip
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(Unsupported, match="kv_cache_scheme is int of 8 bits"):
        Harness(path, kv_cache_dtype="fp8")
    settings["kv_cache_scheme"] = {**scheme, "type": "float"}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    found = Harness(path, kv_cache_dtype="fp8")._loaded.decoder.layers[1].attention.kv_scales
    assert found.k == pytest.approx(SCALES[1].k)
    assert describe(config).num_layers == 3
