"""Checkpoints of every format of quantized weights: matrices taken apart exactly as the format's
library does, or as its definition says; models that then answer as transformers does with the
dequantized weights; and what is refused."""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pagewire.checkpoint import quantization
from pagewire.config import ModelConfig
from pagewire.worker.load import formats, loader
from pagewire.worker.load.formats.base import Assembler
from pagewire.worker.models.architecture import Unsupported
from pagewire.worker.models.rounding import ROUNDINGS
from pagewire_kernels.quantized import Quantized
from rank_threads import run_ranks
from safetensors.torch import load_file, save_file
from worker import format_packers as packers

SHAPES = ((8, 64), (40, 96), (24, 256))
Packer = Callable[[np.random.Generator, int, int], packers.Packed]


def read(method: str, **settings: Any) -> formats.CheckpointFormat:
    return formats.read({"quant_method": method, **settings})


def values(matrix: torch.Tensor | Quantized) -> torch.Tensor:
    return matrix.dequantize() if isinstance(matrix, Quantized) else matrix


def check_exact(form: formats.CheckpointFormat, packed: packers.Packed, stays: bool) -> None:
    parts, wanted = packed
    matrix = form.matrix("layer", parts)
    assert isinstance(matrix, Quantized) == stays
    assert torch.equal(values(matrix).double(), wanted)
    shapes = {ending: tuple(tensor.shape) for ending, tensor in parts.items()}
    extent = form.extent("layer", shapes)
    assert (extent.rows, extent.columns) == tuple(wanted.shape)


# --- matrices ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, group_size: int, version: int, shape: tuple[int, int]) -> None:
    rows, columns = 32 * -(-shape[0] // 32), 32 * -(-shape[1] // 32)
    random = np.random.default_rng(bits * 100 + group_size + version + columns)
    checkpoint_format = "gptq" if version == 1 else "gptq_v2"
    form = read("gptq", bits=bits, group_size=group_size, checkpoint_format=checkpoint_format)
    whole = group_size == -1 or columns % group_size == 0
    for settings in ({}, {"symmetric": True}, {"act_order": True}):
        packed = packers.gptq(random, rows, columns, bits, group_size, version, **settings)
        one_group = packed[0]["scales"].shape[0] == 1
        check_exact(form, packed, whole and (one_group or "act_order" not in settings))


def test_a_stored_zero_that_wraps_is_zero() -> None:
    random = np.random.default_rng(5)
    parts, _ = packers.gptq(random, 32, 32)
    parts["qzeros"].fill_(-1)
    codes = parts["qweight"].T.contiguous().view(torch.uint8)
    codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    wanted = codes.double() * parts["scales"].double().T
    assert torch.equal(
        values(read("gptq", bits=4, group_size=32).matrix("m", parts)).double(), wanted
    )


def test_gptq_settings_of_single_modules() -> None:
    dynamic = {r"+:.*\.mlp\..*": {"bits": 8, "group_size": 64}, r"-:.*lm_head": {}}
    form = read("gptq", bits=4, group_size=32, dynamic=dynamic)
    random = np.random.default_rng(6)
    for module, bits, group in (("x.attn.q", 4, 32), ("x.mlp.up", 8, 64)):
        parts, wanted = packers.gptq(random, 32, 128, bits, group)
        assert torch.equal(values(form.matrix(module, parts)).double(), wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_awq(version: str, group_size: int, zero_point: bool, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(shape[1])
    packed = packers.awq(random, *shape, group_size, version, zero_point)
    # Old files have these names for the same.
    check_exact(
        read("awq", w_bit=4, q_group_size=group_size, version=version.upper()), packed, True
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_squeezellm(bits: int, sparse: bool, shape: tuple[int, int]) -> None:
    packed = packers.squeezellm(np.random.default_rng(bits), *shape, bits, sparse)
    parts, wanted = packed
    form = read("squeezellm", wbits=bits)
    if not sparse:
        check_exact(form, packed, True)
    # The sum of table and sparse part rounds to float32.
    torch.testing.assert_close(
        values(form.matrix("m", parts)).double(), wanted, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("shape", [(8, 64), (130, 300), (256, 128)], ids=str)
@pytest.mark.parametrize("scales", ["tensor", "row", "block"])
def test_fp8(scales: str, shape: tuple[int, int]) -> None:
    settings = {"weight_block_size": [128, 128]} if scales == "block" else {}
    parts, wanted = packers.fp8(np.random.default_rng(1), *shape, scales)
    matrix = values(read("fp8", **settings).matrix("m", parts))
    assert torch.equal(matrix, wanted.float())


@pytest.mark.parametrize(
    ("settings", "rounded"),
    [
        ({}, True),
        ({"activation_scheme": "static"}, True),
        ({"weight_block_size": [128, 128]}, True),
        ({"weight_block_size": [128, 128], "activation_scheme": "dynamic"}, True),
        ({"weight_block_size": [128, 128], "activation_scheme": "static"}, False),
    ],
)
def test_fp8_says_whether_activations_are_rounded(settings: dict, rounded: bool) -> None:
    """Each row finds a scale for itself; the groups of a row do where the checkpoint has it so."""
    scales = "block" if "weight_block_size" in settings else "row"
    parts, _ = packers.fp8(np.random.default_rng(1), 256, 384, scales)
    matrix = read("fp8", **settings).matrix("m", parts)
    assert isinstance(matrix, Quantized)
    assert matrix.quantize_inputs == rounded


def test_fp8_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations import finegrained_fp8

    parts, _ = packers.fp8(np.random.default_rng(2), 256, 384, "block")
    convert = finegrained_fp8.Fp8Dequantize(hf_quantizer=None)
    theirs = convert._dequantize_one(parts["weight"], parts["weight_scale_inv"], torch.float32)
    ours = read("fp8", weight_block_size=[128, 128]).matrix("m", parts)
    assert torch.equal(values(ours).to(theirs.dtype), theirs)


# --- matrices by the formats' own libraries ---


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(8, 64), (33, 96), (3, 20), (64, 520)], ids=str)
def test_bitsandbytes_of_4_bits(shape: tuple[int, int], kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(1)
    weight = torch.randn(shape)
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    parts = {"weight": packed} | {
        f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()
    }
    form = read("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type=kind)
    # The library's code for all devices: its own for CPUs begins blocks anew in each row, which is
    # not how they were made where rows are no multiples of 64.
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    theirs = _dequantize_4bit_compute(
        packed.reshape(-1), absmax, state.code, 64, shape, torch.float32
    )
    ours = values(form.matrix("m", parts))
    # The library adds the offset of nested scales in another order.
    tolerance = 1e-6 if nested else 0.0
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_bitsandbytes_of_8_bits() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(2)
    codes, scb, _ = functional.int8_vectorwise_quant(torch.randn(24, 96).half())
    theirs = functional.int8_vectorwise_dequant(codes, scb)
    ours = read("bitsandbytes", load_in_8bit=True).matrix("m", {"weight": codes, "SCB": scb})
    assert isinstance(ours, Quantized)
    torch.testing.assert_close(ours.dequantize(), theirs, atol=0, rtol=1e-6)


def test_rounding_in_flight_is_the_library_s() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(3)
    weight = torch.randn(64, 192) * 0.05
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    ours = ROUNDINGS["bitsandbytes"].full(weight)
    assert torch.equal(ours, functional.dequantize_4bit(packed, state))
    codes, scb, _ = functional.int8_vectorwise_quant(weight.half())
    ours_8 = ROUNDINGS["bitsandbytes_8bit"].values(weight.half())
    assert isinstance(ours_8, Quantized) and torch.equal(ours_8.codes, codes)
    torch.testing.assert_close(ours_8.scale[:, 0] * 127, scb, atol=0, rtol=1e-6)
    rows = weight / (weight.abs().amax(1, keepdim=True) / 448)
    wanted = rows.to(torch.float8_e4m3fn).float() * (weight.abs().amax(1, keepdim=True) / 448)
    assert torch.equal(ROUNDINGS["fp8"].full(weight), wanted)


def compress(scheme: dict[str, Any], layout: str, weight: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """(tensors of the checkpoint, what the library makes of them again)."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**scheme)
    grouped = weight if not args.group_size else weight.unflatten(1, (-1, args.group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    if str(args.strategy).endswith("channel"):
        low, high = low[:, None], high[:, None]
    if str(args.strategy).endswith("tensor"):
        low, high = weight.min()[None], weight.max()[None]
    scale, zero = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(layout)
    whole = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    packed = compressor.compress(dict(state), whole)
    again = compressor.decompress(dict(packed), whole)
    return packed, again["weight"]


@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        (
            "pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        ),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    ],
    ids=str,
)
def test_compressed_tensors(layout: str, scheme: dict[str, Any]) -> None:
    torch.manual_seed(4)
    parts, theirs = compress(scheme, layout, torch.randn(40, 96).bfloat16())
    settings = {
        "format": layout,
        "config_groups": {"g": {"targets": ["Linear"], "weights": scheme}},
    }
    ours = read("compressed-tensors", **settings).matrix("m", parts)
    assert isinstance(ours, Quantized)
    assert torch.equal(values(ours).to(theirs.dtype), theirs)


@pytest.mark.parametrize("block", [[32, 32], "32x32"], ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (40, 96), (64, 80), (40, 20)], ids=str)
def test_compressed_tensors_in_blocks(shape: tuple[int, int], block: Any) -> None:
    """Also where the last blocks are cut at the edges of the matrix."""
    parts, wanted = packers.fp8(np.random.default_rng(3), *shape, "block", 32)
    parts["weight_scale"] = parts.pop("weight_scale_inv")
    scheme = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": block}
    settings = {
        "format": "float-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": scheme}},
    }
    matrix = read("compressed-tensors", **settings).matrix("m", parts)
    assert torch.equal(values(matrix), wanted.float())


# --- whole models ---


def quantized_copy(
    source: Path, target: Path, model: torch.nn.Module, settings: dict[str, Any], pack: Packer
) -> torch.nn.Module:
    """`source` with every linear layer's matrix replaced by random codes, and the model that has
    the values they stand for."""
    random = np.random.default_rng(11)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tensors = load_file(source / "model.safetensors")
    reference = copy.deepcopy(model)
    state = reference.state_dict()
    for name in sorted(tensors):
        module = name.removesuffix(".weight")
        joined = name in state and module != "lm_head" and "embed" not in module
        if not joined or tensors[name].ndim != 2 or module.endswith(".gate"):
            continue
        parts, weight = pack(random, *tensors.pop(name).shape)
        tensors |= packers.on_module(parts, module)
        state[name].copy_(weight)
    save_file(tensors, target / "model.safetensors")
    return reference


def check_model(path: Path, reference: torch.nn.Module, harness: Any, tokens: list[int]) -> Any:
    with torch.inference_mode():
        wanted = reference(torch.tensor([tokens])).logits[0]
    made = harness(path)
    ours = made.logits(tokens, 17)
    limit = 1e-5 * max(1.0, float(wanted.abs().max()))
    assert (ours - wanted).abs().max() < limit
    for halves in run_ranks(2, lambda ranks: harness(path, None, ranks).logits(tokens, 17)):
        assert (halves - wanted).abs().max() < 2 * limit
    return made


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32]}
MODELS: dict[str, tuple[str, dict[str, Any], Packer]] = {
    "awq": ("llama-biases", AWQ, packers.awq),
    "awq, gemv": (
        "qwen3",
        AWQ | {"version": "gemv"},
        lambda random, n, k: packers.awq(random, n, k, 32, "gemv"),
    ),
    "gptq": ("qwen2", GPTQ, packers.gptq),
    "gptq, act order": (
        "llama",
        GPTQ | {"desc_act": True},
        lambda random, n, k: packers.gptq(random, n, k, act_order=True),
    ),
    "gptq, joined matrices": ("phi3", GPTQ, packers.gptq),
    "gptq, 8 bits": (
        "llama",
        GPTQ | {"bits": 8},
        lambda random, n, k: packers.gptq(random, n, k, 8, symmetric=True),
    ),
    "squeezellm": ("llama", {"quant_method": "squeezellm", "wbits": 4}, packers.squeezellm),
    "fp8": ("qwen3", {"quant_method": "fp8"}, packers.fp8),
    "fp8, blocks": ("llama", BLOCKS, lambda random, n, k: packers.fp8(random, n, k, "block", 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_as_with_the_dequantized_weights(
    name: str, tiny: Any, harness: Any, numbers: Any, tmp_path: Path
) -> None:
    variant, settings, pack = MODELS[name]
    reference = quantized_copy(tiny(variant).path, tmp_path, tiny(variant).model, settings, pack)
    check_model(tmp_path, reference, harness, numbers(40))


def test_experts(tiny: Any, harness: Any, numbers: Any, tmp_path: Path) -> None:
    """Each expert's matrices are quantized by themselves, and the router is not."""
    variant = "qwen3-moe"
    source = tiny(variant)
    random = np.random.default_rng(12)
    config = json.loads((source.path / "config.json").read_text())
    settings = AWQ | {"group_size": -1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tensors = load_file(source.path / "model.safetensors")
    full_tensors = dict(tensors)
    for name in sorted(tensors):
        module = name.removesuffix(".weight")
        if ".experts." in name:
            parts, weight = packers.awq(random, *tensors.pop(name).shape, -1)
            tensors |= packers.on_module(parts, module)
            full_tensors[name] = weight.float()
    save_file(tensors, tmp_path / "model.safetensors")
    whole = tmp_path / "full"
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps(config))
    save_file(full_tensors, whole / "model.safetensors")
    tokens = numbers(30)
    ours, wanted = harness(tmp_path).logits(tokens, 11), harness(whole).logits(tokens, 11)
    assert (ours - wanted).abs().max() < 1e-5 * float(wanted.abs().max())


def test_biases_of_zeros_that_the_model_does_not_have(
    tiny: Any, harness: Any, numbers: Any, tmp_path: Path
) -> None:
    """AutoGPTQ saves a bias for every layer that it has quantized."""
    variant, settings, pack = "llama", GPTQ, packers.gptq
    source = tiny(variant)
    reference = quantized_copy(source.path, tmp_path, source.model, settings, pack)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".scales")]:
        rows = tensors[name].shape[1]
        tensors[f"{name.removesuffix('.scales')}.bias"] = torch.zeros(rows, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    check_model(tmp_path, reference, harness, numbers(40))
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Unsupported, match=r"mlp\.up_proj\.bias .* does not use"):
        harness(tmp_path)


@pytest.mark.parametrize(
    ("name", "stays"), [("awq", True), ("gptq, act order", False), ("fp8", False)]
)
def test_the_log_says_what_becomes_of_the_matrices(
    name: str,
    stays: bool,
    tiny: Any,
    tmp_path: Path,
    harness: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "pagewire.worker")
    variant, settings, pack = MODELS[name]
    quantized_copy(tiny(variant).path, tmp_path, tiny(variant).model, settings, pack)
    made = harness(tmp_path)
    method = settings["quant_method"]
    assert f"{method} (" in caplog.text
    if stays:
        assert "matrices stay quantized, which saves" in caplog.text
        assert any(hasattr(matrix, "panels") for matrix in made._loaded.decoder.packed())
    elif method == "fp8":
        assert "made full while they are loaded" in caplog.text


@pytest.mark.parametrize("asked", ["bitsandbytes", "bitsandbytes_8bit", "fp8"])
def test_full_weights_are_rounded_as_asked_for(
    asked: str, tiny: Any, harness: Any, numbers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pagewire.worker")
    source, tokens = tiny("qwen3"), numbers(30)
    reference = copy.deepcopy(source.model)
    for name, layer in reference.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.weight.data = ROUNDINGS[asked].full(layer.weight.data)
    with torch.inference_mode():
        wanted = reference(torch.tensor([tokens])).logits[0]
    load_format = "bitsandbytes" if asked == "bitsandbytes" else "auto"
    settings = ModelConfig(quantization=asked, load_format=load_format)
    ours = harness(source.path, settings).logits(tokens, 30)
    assert (ours - wanted).abs().max() < 1e-5 * float(wanted.abs().max())
    exact = source.logits(tokens)
    assert (ours - exact).abs().max() > 1e-3
    says = "which saves about" if ROUNDINGS[asked].stays else "no memory is saved"
    assert says in caplog.text


# --- what is refused ---


def write(
    path: Path, settings: dict[str, Any], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Path:
    (path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    save_file(dict(tensors), path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "quip"}, "'quip' are not supported; awq, gptq"),
        ({"quant_method": "mxfp4"}, "'mxfp4' are not supported"),
        ({"quant_method": "awq", "bits": 8}, "AWQ weights of 8 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "exllama"}, "AWQ version 'exllama'"),
        ({"quant_method": "awq"}, "does not say bits or w_bit"),
        ({"quant_method": "gptq", "bits": 5}, "GPTQ weights of 5 bits"),
        ({"quant_method": "gptq", "bits": "four"}, "bits of the quantization is 'four'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "squeezellm", "wbits": 2}, "SqueezeLLM weights of 2 bits"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "'nvfp4-pack"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            "type float and 4 bits",
        ),
    ],
    ids=str,
)
def test_a_format_that_is_not_built_is_named(settings: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=words.replace("(", r"\(")) as caught:
        formats.read(quantization.of_checkpoint(tmp_path, {"quantization_config": settings}) or {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda parts: parts.pop("scales"), "no layer.scales"),
        (lambda parts: parts.update(scales=parts["scales"][:1]), r"scales has shape \[1, 32\]"),
        (lambda parts: parts.update(qzeros=parts["qzeros"][:, :1]), r"qzeros has shape \[2, 1\]"),
        (lambda parts: parts.update(g_idx=parts["g_idx"] + 7), "names group 8 of 2"),
    ],
)
def test_parts_that_do_not_fit_each_other(damage: Any, words: str) -> None:
    parts, _ = packers.gptq(np.random.default_rng(1), 32, 64)
    damage(parts)
    with pytest.raises(Unsupported, match=words) as caught:
        read("gptq", bits=4, group_size=32).matrix("layer", parts)
    assert "\n" not in str(caught.value)


def test_a_matrix_whose_parts_do_not_all_come() -> None:
    form = read("gptq", bits=4, group_size=32)
    parts, _ = packers.gptq(np.random.default_rng(1), 32, 64)
    named = packers.on_module(parts, "a.q_proj")
    assembler = Assembler(form, [*named, "a.norm.weight"])
    named.pop("a.q_proj.g_idx")
    with pytest.raises(Unsupported, match=r"lacks g_idx of a\.q_proj"):
        list(assembler.assembled(named.items(), "cpu"))


@pytest.mark.parametrize(
    ("asked", "settings", "words"),
    [
        ("awq", GPTQ, "--quantization awq, but .* quantized with gptq"),
        ("bitsandbytes", AWQ, "--quantization bitsandbytes, but .* quantized with awq"),
        ("int8", AWQ, "--quantization int8, but .* quantized with awq"),
        ("gptq", None, "--quantization gptq, but .* names no quantization"),
    ],
)
def test_a_flag_that_names_another_format(
    asked: str, settings: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=words):
        quantization.check(tmp_path, {"quantization_config": settings}, asked)


@pytest.mark.parametrize("asked", ["gptq", "gptq_marlin", ""])
def test_a_flag_that_names_the_checkpoint_s_format(asked: str, tmp_path: Path) -> None:
    quantization.check(tmp_path, {"quantization_config": GPTQ}, asked)


def test_configurations_in_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "quant_config.json").write_text(
        json.dumps({"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"})
    )
    settings = quantization.of_checkpoint(tmp_path, {})
    assert (
        settings is not None
        and formats.read(settings).title() == "awq (gemm, 4 bits, groups of 128)"
    )
    (tmp_path / "quant_config.json").write_text(json.dumps({"wbits": 4}))
    settings = quantization.of_checkpoint(tmp_path, {})
    assert settings is not None and settings["quant_method"] == "squeezellm"
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128}))
    settings = quantization.of_checkpoint(tmp_path, {})
    assert settings is not None and settings["quant_method"] == "gptq"


MIXED = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "config_groups": {
        "attention": {
            "targets": ["re:.*self_attn.*"],
            "format": "pack-quantized",
            "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
        },
        "others": {
            "targets": ["Linear"],
            "format": "float-quantized",
            "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        },
    },
}


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("stated", ["mixed-precision", None])
def test_compressed_tensors_with_a_format_for_each_group(
    stated: str | None, field: str, tiny: Any, harness: Any, numbers: Any, tmp_path: Path
) -> None:
    settings = MIXED | {"format": stated}
    source = tiny("llama")
    reference = quantized_copy(source.path, tmp_path, source.model, settings, packers.fp8)
    config = json.loads((tmp_path / "config.json").read_text())
    config[field] = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    state = reference.state_dict()
    form = read("compressed-tensors", **MIXED)
    for name in [name for name in tensors if "self_attn" in name and name.endswith("_scale")]:
        module = name.removesuffix(".weight_scale")
        scheme = MIXED["config_groups"]["attention"]["weights"]
        weight = torch.randn(tensors.pop(f"{module}.weight").shape).half() / 8
        del tensors[name]
        parts, _ = compress(scheme, "pack-quantized", weight)
        tensors |= packers.on_module(parts, module)
        state[f"{module}.weight"].copy_(values(form.matrix(module, parts)))
    save_file(tensors, tmp_path / "model.safetensors")
    check_model(tmp_path, reference, harness, numbers(40))


def test_a_group_s_format_is_refused_by_name() -> None:
    groups = MIXED["config_groups"] | {"more": {"format": "nvfp4-pack-quantized"}}
    with pytest.raises(Unsupported, match="format 'nvfp4-pack-quantized' is not supported"):
        read("compressed-tensors", format="mixed-precision", config_groups=groups)


MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
}


@pytest.mark.parametrize("in_config", [False, True])
def test_the_file_of_modelopt(
    in_config: bool, tiny: Any, harness: Any, numbers: Any, tmp_path: Path
) -> None:
    settings = MODELOPT | {"quant_method": "modelopt"} if in_config else {}
    source = tiny("llama")
    reference = quantized_copy(source.path, tmp_path, source.model, settings, packers.fp8)
    if not in_config:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    check_model(tmp_path, reference, harness, numbers(40))


def test_modelopt_s_other_formats(tmp_path: Path) -> None:
    other = {"quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(other))
    with pytest.raises(Unsupported, match="quantized with 'modelopt NVFP4' are not supported"):
        quantization.of_checkpoint(tmp_path, {})
    cache_only = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(cache_only))
    assert quantization.of_checkpoint(tmp_path, {}) is None


def test_the_eos_of_a_quantized_checkpoint_is_read_too(tiny: Any, tmp_path: Path) -> None:
    variant, settings, pack = MODELS["awq"]
    quantized_copy(tiny(variant).path, tmp_path, tiny(variant).model, settings, pack)
    assert loader.open_model(tmp_path, ModelConfig())[2] == (2,)
