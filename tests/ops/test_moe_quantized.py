"""Mixtures of experts with quantized matrices, in Triton's interpreter: against the dequantized
ones, for every form and every path."""

import sys
from typing import Any

import pytest
import torch
from ops.moe_cases import MoeCase, moe_case
from ops.ptx_numpy import inline_asm
from ops.triton_cases import error
from pagewire.worker.models import describe, rotary
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire.worker.models.linear_method import ExpertsSpec
from pagewire.worker.models.quantized_weights import QuantizedMethod, StackedExperts
from pagewire.worker.models.rounding import ROUNDINGS, Rounding, fp8_rows
from pagewire_kernels import cuda_quantized, gemm_row_int4, moe_quantized, moe_row_int4
from pagewire_kernels.backend import backend
from pagewire_kernels.batch import make_batch
from pagewire_kernels.cuda_quantized import CudaQuantized
from pagewire_kernels.gemm_row_int4 import Int4RowConfig
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.moe_quantized import ExpertsConfig
from pagewire_kernels.packed_matrix import PackedExperts
from pagewire_kernels.quantized import Quantized, quantize
from torch import Tensor
from triton.runtime import interpreter

EXPERTS, TOP_K, HIDDEN, INNER = 6, 2, 128, 64
FORMS = {
    "4 bits, groups of 64": lambda w: quantize(w, 4, 64, whole_zeros=True),
    "4 bits with minima, groups of 32": lambda w: quantize(w, 4),
    "8 bits, groups of 32": lambda w: quantize(w, 8),
    "8 bits, a scale a row": ROUNDINGS["bitsandbytes_8bit"].values,
    "float8, a scale a row": fp8_rows,
}
MOE = {
    "model_type": "qwen3_moe", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def packed(weights: Tensor, halves: int, form: str) -> tuple[PackedExperts, Tensor]:
    """Of weights [E, halves * N, K], and what they are dequantized."""
    ops = CudaQuantized(KernelChoices())
    parts = [[FORMS[form](half) for half in expert.chunk(halves)] for expert in weights]
    stacked = ops.pack_experts(parts)
    assert stacked is not None
    full = torch.stack([torch.cat([part.dequantize() for part in each]) for each in parts])
    return stacked, full


def case(tokens: int, padding: int = 0) -> MoeCase:
    whole = moe_case(tokens, EXPERTS, TOP_K, HIDDEN, INNER, padding=padding)
    # experts that nobody chose are NaN there, which cannot be rounded
    return MoeCase(
        whole.x,
        whole.gate_up.nan_to_num(0.5),
        whole.down.nan_to_num(0.5),
        whole.top_k_ids,
        whole.top_k_weights,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "padding"), [(1, 0), (4, 1), (20, 3), (90, 0)])
def test_experts_are_those_of_the_dequantized_weights(form: str, tokens: int, padding: int) -> None:
    torch.manual_seed(tokens)
    mixture = case(tokens, padding)
    gate_up, full_gate_up = packed(mixture.gate_up, 2, form)
    down, full_down = packed(mixture.down, 1, form)
    exact = MoeCase(
        mixture.x, full_gate_up, full_down, mixture.top_k_ids, mixture.top_k_weights
    ).exact()
    out = moe_quantized.experts(mixture.x, gate_up, down, mixture.top_k_ids, mixture.top_k_weights)
    # zero points that are no whole numbers have float16's digits
    assert error(out, exact) < (2e-3 if gate_up.rest else 1e-5)
    assert not padding or bool(out[-padding:].eq(0).all())


@pytest.mark.parametrize(
    "config",
    [
        ExpertsConfig(16, 64, 64, 4, 2, late=False),
        ExpertsConfig(32, 128, 64, 8, 2, late=True),
    ],
)
def test_every_launch_shape_gives_the_same(config: ExpertsConfig) -> None:
    torch.manual_seed(2)
    mixture = case(40)
    form = "4 bits, groups of 64"
    gate_up, _ = packed(mixture.gate_up, 2, form)
    down, _ = packed(mixture.down, 1, form)
    inputs = (mixture.x, gate_up, down, mixture.top_k_ids, mixture.top_k_weights)
    assert error(moe_quantized.experts(*inputs, config), moe_quantized.experts(*inputs)) < 1e-6


FOUR_BITS = {
    "groups of 128": lambda w: quantize(w, 4, 128, whole_zeros=True),
    "groups of 64": lambda w: quantize(w, 4, 64, whole_zeros=True),
    "minima, groups of 32": lambda w: quantize(w, 4),
}
ROW_SIZES = ((128, 128, 2), (256, 384, 3), (192, 576, 4))
"""Hidden size, inner size, experts a token."""
ROW_SHAPES = (
    (None, None),
    (Int4RowConfig(2, 2, 2), Int4RowConfig(1, 2, 1)),
    (Int4RowConfig(2, 1, 1), Int4RowConfig(1, 4, 2)),
)


def one_row(form: str, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The arguments of moe_row_int4.experts_of_row, and what it must give."""
    hidden, inner, top_k = size
    mixture = moe_case(1, EXPERTS, top_k, hidden, inner)
    gate_up, full_gate_up = packed(mixture.gate_up.nan_to_num(0.5), 2, form)
    down, full_down = packed(mixture.down.nan_to_num(0.5), 1, form)
    x, residual = mixture.x.to(dtype), torch.randn(1, hidden).to(dtype)
    ids = mixture.top_k_ids.int().contiguous()
    weights = mixture.top_k_weights.float().contiguous()
    exact = MoeCase(x.float(), full_gate_up, full_down, ids, weights).exact()
    arguments = (x, gate_up, down, ids, weights, residual)
    return arguments, exact + residual.double()


@pytest.mark.parametrize("shapes", ROW_SHAPES)
@pytest.mark.parametrize("size", ROW_SIZES)
@pytest.mark.parametrize("form", FOUR_BITS)
def test_experts_of_one_row(form: str, size: tuple[int, int, int], shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    torch.manual_seed(7)
    monkeypatch.setattr(sys.modules[__name__], "FORMS", FOUR_BITS)
    if any(inner % group for inner in size[:2] for group in [int(form.split()[-1])]):
        pytest.skip("the group does not divide the sizes")
    arguments, exact = one_row(form, size, torch.float32)
    assert moe_row_int4.takes(*arguments[:3])
    out = moe_row_int4.experts_of_row(*arguments, *shapes)
    assert error(out, exact) < (2e-3 if arguments[1].rest else 1e-5)


@pytest.mark.parametrize("shapes", ROW_SHAPES[:2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts_of_one_row_by_instructions(
    dtype: torch.dtype, shapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(8)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", inline_asm)
    monkeypatch.setattr(gemm_row_int4, "has_instructions", lambda device: True)
    monkeypatch.setattr(sys.modules[__name__], "FORMS", FOUR_BITS)
    arguments, exact = one_row("groups of 128", ROW_SIZES[1], dtype)
    # inner results are rounded once, and sums
    assert error(moe_row_int4.experts_of_row(*arguments, *shapes), exact) < (
        2 * torch.finfo(dtype).eps
    )


def test_places_without_an_expert_add_nothing_to_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FORMS", FOUR_BITS)
    (x, gate_up, down, ids, weights, residual), _ = one_row(
        "groups of 128", ROW_SIZES[0], torch.float32
    )
    less = ids.clone()
    less[0, 1] = -1
    monkeypatch.setattr(torch, "empty", lambda *size, **kinds: torch.full(size, torch.nan, **kinds))
    out = moe_row_int4.experts_of_row(x, gate_up, down, less, weights, residual)
    alone = moe_row_int4.experts_of_row(
        x, gate_up, down, ids[:, :1].contiguous(), weights[:, :1].contiguous(), residual
    )
    assert error(out, alone.double()) < 1e-6
    none = moe_row_int4.experts_of_row(x, gate_up, down, less * 0 - 1, weights, residual)
    assert torch.equal(none, residual)


SUMS = {
    "Qwen3-30B-A3B": ((2048, 768, 8), (4, 3)),
    "Mixtral 8x7B": ((4096, 14336, 2), (8, 7)),
    "too many results for splits": ((7168, 2048, 8), (8, 1)),
    "larger steps leave fewer programs": ((2048, 512, 8), (4, 2)),
    "smaller steps can be shared out evenly": ((4096, 4608, 2), (4, 6)),
    "an odd number of chunks": ((2048, 960, 2), (4, 4)),
}
"""Results, inner size and experts a token; chunks a step and splits."""


@pytest.mark.parametrize(("sizes", "wanted"), SUMS.values(), ids=SUMS)
def test_launch_shapes_of_the_sums_of_one_row(
    sizes: tuple[int, int, int], wanted: tuple[int, int]
) -> None:
    chosen = moe_row_int4.pick_down(*sizes)
    assert (chosen.chunks, chosen.splits) == wanted


def test_no_tokens() -> None:
    mixture = case(1)
    gate_up, _ = packed(mixture.gate_up, 2, "float8, a scale a row")
    down, _ = packed(mixture.down, 1, "float8, a scale a row")
    ids, weights = mixture.top_k_ids[:0], mixture.top_k_weights[:0]
    assert moe_quantized.experts(mixture.x[:0], gate_up, down, ids, weights).shape == (0, HIDDEN)


def test_experts_of_different_forms_cannot_be_stacked() -> None:
    ops = CudaQuantized(KernelChoices())
    weight = torch.randn(64, 128)
    assert ops.pack_experts([[quantize(weight, 4)], [quantize(weight, 8)]]) is None
    assert ops.pack_experts([[quantize(torch.randn(64, 96), 4)]]) is None


def scales_and_zeros(experts: PackedExperts) -> list[Tensor]:
    """As they are multiplied with."""
    if experts.scales is None:
        assert experts.row_scale is not None
        return [experts.row_scale * experts.factors[:, :, None]]
    factors = experts.factors[:, :, None, None]
    if experts.table is not None:
        return [experts.scales.view(torch.float32) * factors]
    low = (experts.scales & 0xFFFF).to(torch.int16).view(torch.float16).float()
    return [low * factors, experts.scales >> 16]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("halves", [1, 2])
def test_experts_packed_together_are_those_packed_alone(
    form: str, halves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    weights = torch.randn(3, halves * 128, 128) * torch.tensor([0.01, 1, 40])[:, None, None]
    alone, _ = packed(weights, halves, form)
    counted: list[int] = []
    pack = cuda_quantized.pack_matrix
    monkeypatch.setattr(
        cuda_quantized, "pack_matrix", lambda some: counted.append(len(some)) or pack(some)
    )
    monkeypatch.setattr(cuda_quantized, "MOST_TOGETHER", 128 * 128)
    one_by_one, _ = packed(weights, halves, form)
    assert counted == [1] * 3 * halves
    monkeypatch.setattr(cuda_quantized, "MOST_TOGETHER", 2 * 128 * 128)
    by_two, _ = packed(weights, halves, form)
    assert counted[3 * halves] == 2
    for together in (alone, by_two):
        assert torch.equal(together.words, one_by_one.words)
        for ours, theirs in zip(
            scales_and_zeros(together), scales_and_zeros(one_by_one), strict=True
        ):
            assert torch.equal(ours, theirs)


def method(rounding: Rounding | None) -> QuantizedMethod:
    ops = backend("cuda")
    assert ops.quantized is not None
    return QuantizedMethod(ops, ops.quantized, torch.float32, "cpu", rounding)


def filled(weight: StackedExperts, values: dict[str, Any]) -> StackedExperts:
    for slot in weight.weight_slots():
        slot.target.copy_(values[slot.name])
    weight.pack()
    return weight


@pytest.mark.parametrize("quantized", [0, 3, 4])
def test_experts_that_are_not_alike_are_made_full(quantized: int) -> None:
    """The first `quantized` of four come as codes, the others in full."""
    torch.manual_seed(4)
    spec = ExpertsSpec("mlp.experts", 4, HIDDEN, INNER)
    weight = StackedExperts(method(None), CudaQuantized(KernelChoices()), spec)
    values: dict[str, Any] = {}
    for slot in weight.weight_slots():
        full = torch.randn(slot.shape) * 0.1
        number = int(slot.name.split(".")[2])
        values[slot.name] = fp8_rows(full) if number < quantized else full
    filled(weight, values)
    full = {
        name: value.dequantize() if isinstance(value, Quantized) else value
        for name, value in values.items()
    }
    kept = [isinstance(part, PackedExperts) for part in weight.packed()]
    assert kept == [quantized == 4] * 2
    assert weight.nbytes > 0

    def of(name: str) -> Tensor:
        return torch.stack([full[f"mlp.experts.{n}.{name}.weight"] for n in range(4)])

    gate_up = torch.cat([of("gate_proj"), of("up_proj")], 1)
    x, ids, shares = torch.randn(3, HIDDEN), torch.tensor([[0, 3]] * 3), torch.rand(3, 2)
    exact = MoeCase(x, gate_up, of("down_proj"), ids, shares).exact()
    assert error(weight.apply(x, ids, shares), exact) < 1e-5


def awq(weight: Tensor) -> Quantized:
    return quantize(weight, 4, 64, whole_zeros=True)


@pytest.mark.parametrize(
    "rounding",
    [Rounding("awq", "", awq, False, False), ROUNDINGS["fp8"], ROUNDINGS["bitsandbytes"]],
    ids=lambda rounding: rounding.name,
)
def test_a_model_with_quantized_experts(rounding: Rounding) -> None:
    """Layer by layer what the dequantized weights compute."""
    torch.manual_seed(6)
    arch = describe(MOE)
    kept = Decoder(
        arch, Build(backend("cuda"), torch.float32, "cpu", lambda names: method(rounding))
    )
    full = Decoder(arch, Build(backend("cuda"), torch.float32, "cpu", lambda names: method(None)))
    weights = {slot.name: torch.randn(slot.shape) * 0.1 for slot in full.weight_slots()}
    for slot in kept.weight_slots():
        slot.target.copy_(weights[slot.name])
    for slot in full.weight_slots():
        value = weights[slot.name]
        if "_proj." in slot.name:
            value = rounding.full(value)
        slot.target.copy_(value)
    assert list(kept.pack())
    assert list(full.pack())
    assert sum(isinstance(matrix, PackedExperts) for matrix in kept.packed()) == 4
    factors = [rotary.table(arch.rope, arch.head_dim, 64)] * arch.num_layers
    blocks = torch.randn(2, 2, 4, arch.num_kv_heads, 16, arch.head_dim)
    for length in (1, 12):
        batch = make_batch([length], [20], [[1, 2]], 16)
        ids = torch.arange(length)
        ours, theirs = (
            decoder(ids, factors, list(blocks.clone()), batch, None, lambda: None)
            for decoder in (kept, full)
        )
        assert error(ours, theirs) < 1e-4


def test_first_starts_compile_again_for_another_form_of_the_same_sizes() -> None:
    """Else the kernels of the second checkpoint would be compiled one after the other."""
    generator = torch.Generator().manual_seed(5)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def one(form: str) -> list[str]:
        packed_one = CudaQuantized(KernelChoices()).pack([FORMS[form](weights(64, 128))], False)
        assert packed_one is not None
        return cuda_quantized.compiled_for([packed_one])

    def experts(form: str) -> list[str]:
        return cuda_quantized.compiled_for([packed(weights(EXPERTS, 64, 128), 1, form)[0]])

    dense = weights(64, 128)
    seen = [cuda_quantized.compiled_for([dense]), cuda_quantized.compiled_for([dense.half()])]
    seen += [made(form) for made in (one, experts) for form in FORMS]
    assert len({tuple(forms) for forms in seen}) == len(seen)
    for form in FORMS:
        assert one(form) == one(form)
        assert experts(form) == experts(form)
    assert cuda_quantized.compiled_for([dense, dense]) == seen[0]
