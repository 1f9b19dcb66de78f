"""Where a model can be extended: the format of a layer's matrices, the part of a checkpoint's tensor
that a rank takes, what layers are told of a step, and what they keep between steps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pagewire.worker.load.weights import fill, fill_randomly
from pagewire.worker.models import describe, rotary
from pagewire.worker.models.architecture import Architecture, Unsupported
from pagewire.worker.models.cache_spec import CacheGroup, CacheSpec, cache_spec
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.dense import DenseMethod
from pagewire.worker.models.layers import Build, Experts, Linear
from pagewire.worker.models.linear_method import LinearSpec, LinearWeight
from pagewire.worker.models.weight_slots import Shard, TensorSlice, WeightSlot, WeightSlots
from pagewire_kernels.backend import backend
from pagewire_kernels.batch import Batch, make_batch
from pagewire_kernels.communicator import SINGLE_RANK, Communicator
from pagewire_kernels.quantized import Quantized, quantize
from rank_threads import run_ranks
from torch import Tensor

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10_000.0,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rotated by pairs": {
        "model_type": "glm", "partial_rotary_factor": 0.5, "pad_token_id": 0, "attention_bias": True,
    },
    "experts": {
        "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "mlp_only_layers": [], "shared_expert_intermediate_size": 24,
    },
}  # fmt: skip
IDS = torch.tensor([5, 9, 11, 7, 23, 40, 2])


def silent(stage: str, share: float) -> None:
    pass


def build(
    method: Any = None, shard: Shard | None = None, communicator: Communicator = SINGLE_RANK
) -> Build:
    ops = backend("cpu")
    return Build(ops, torch.float32, "cpu", method, shard or Shard(), (), communicator)


def checkpoint(arch: Architecture) -> dict[str, Tensor]:
    """Random tensors for every slot of a whole model, as a checkpoint has them."""
    generator = torch.Generator().manual_seed(0)
    slots = Decoder(arch, build()).weight_slots()
    return {slot.name: torch.randn(slot.shape, generator=generator) * 0.2 for slot in slots}


def loaded(arch: Architecture, tensors: dict[str, Tensor], made: Build) -> Decoder:
    decoder = Decoder(arch, made)
    fill(decoder.weight_slots(), tensors.items(), arch.tie_word_embeddings, silent)
    assert list(decoder.pack())
    return decoder


def caches(arch: Architecture, kv_heads: int) -> list[Tensor]:
    return [torch.zeros(2, 1, kv_heads, 16, arch.head_dim) for _ in range(arch.num_layers)]


def one_prompt() -> Batch:
    return make_batch([len(IDS)], [len(IDS)], [[0]], 16)


def factors(arch: Architecture) -> Tensor:
    return rotary.table(arch.rope, arch.head_dim, 64)


# --- ranks of a tensor-parallel group ---


@pytest.mark.parametrize("variant", ["llama", "biases", "rotated by pairs"])
@pytest.mark.parametrize("ranks", [2, 4])
@torch.inference_mode()
def test_ranks_add_up_to_the_whole_model(variant: str, ranks: int) -> None:
    """Two ranks have a KV head each, four share them."""
    arch = describe({**LLAMA, **VARIANTS[variant]})
    tensors = checkpoint(arch)

    @torch.inference_mode()
    def logits(communicator: Communicator) -> tuple[Tensor, int]:
        shard = Shard(communicator.rank, communicator.size)
        held = max(1, arch.num_kv_heads // shard.size)
        part = loaded(arch, tensors, build(shard=shard, communicator=communicator))
        tables = [factors(arch)] * 2
        return part(IDS, tables, caches(arch, held), one_prompt(), None, lambda: None), part.nbytes

    wanted, whole_bytes = logits(SINGLE_RANK)
    for got, nbytes in run_ranks(ranks, logits):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert nbytes < whole_bytes


@torch.inference_mode()
def test_a_rank_holds_rows_of_what_comes_first_and_columns_of_what_follows() -> None:
    arch = describe(LLAMA)
    tensors = checkpoint(arch)
    whole = loaded(arch, tensors, build()).layers[1]
    second = loaded(arch, tensors, build(shard=Shard(1, 2)))
    x, batch, layer = torch.randn(3, arch.hidden_size), one_prompt(), second.layers[1]
    gate_up = whole.mlp.up(x, batch).view(3, 2, 2, -1)  # type: ignore[union-attr]
    torch.testing.assert_close(layer.mlp.up(x, batch).view(3, 2, -1), gate_up[:, :, 1])  # type: ignore[union-attr]
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    inner = torch.randn(3, arch.intermediate_size // 2)
    torch.testing.assert_close(
        layer.mlp.down(inner, batch),  # type: ignore[union-attr]
        inner @ down[:, arch.intermediate_size // 2 :].T,
    )


@torch.inference_mode()
def test_experts_are_divided_by_their_inner_size() -> None:
    arch = describe({**LLAMA, **VARIANTS["experts"]})
    tensors = checkpoint(arch)
    x, batch = torch.randn(5, arch.hidden_size), one_prompt()

    def experts(made: Build) -> Tensor:
        layer = loaded(arch, tensors, made).layers[0].mlp
        ids = torch.tensor([[0, 2], [1, 3], [3, 0], [2, 1], [0, 1]])
        return layer.experts(x, ids, torch.full((5, 2), 0.5), batch)  # type: ignore[union-attr]

    halves = [experts(build(shard=Shard(rank, 2))) for rank in range(2)]
    torch.testing.assert_close(halves[0] + halves[1], experts(build()), atol=1e-5, rtol=1e-4)


def test_heads_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match="4 cannot be divided among 3 ranks"):
        Decoder(describe(LLAMA), build(shard=Shard(0, 3)))


# --- slots ---


def test_a_slot_takes_its_part_in_its_order() -> None:
    target = torch.zeros(4, 3)
    slot = WeightSlot("x", target, TensorSlice(0, 4, 4, 12), torch.tensor([1, 0]))
    assert slot.shape == (12, 3)
    value = torch.arange(36.0).view(12, 3)
    slot.fill(value)
    assert target.equal(value[[5, 4, 7, 6]])
    columns = WeightSlot("x", torch.zeros(12, 2), TensorSlice(1, 1, 2, 3))
    columns.fill(value)
    assert columns.shape == (12, 3) and columns.target.equal(value[:, 1:])  # type: ignore[union-attr]


def test_a_quantized_matrix_is_cut_into_smaller_groups_where_need_be() -> None:
    value = quantize(torch.randn(8, 96), 4)
    cut = TensorSlice(1, 32, 64, 96).of(value)
    assert cut.dequantize().equal(value.dequantize()[:, 32:]) and cut.group == 32
    assert TensorSlice(0, 2, 3, 8).of(value).dequantize().equal(value.dequantize()[2:5])
    within = TensorSlice(1, 48, 48, 96).of(value)
    assert within.dequantize().equal(value.dequantize()[:, 48:]) and within.group == 16


def test_a_tensor_must_have_the_whole_shape_whatever_part_is_taken() -> None:
    slot = WeightSlot("x", torch.zeros(4, 3), TensorSlice(0, 4, 4, 12))
    with pytest.raises(
        Unsupported, match=r"shape \[4, 3\] where the configuration asks for \[12, 3\]"
    ):
        fill([slot], [("x", torch.zeros(4, 3))], False, silent)


def test_random_weights_of_a_rank_are_those_of_the_whole() -> None:
    arch, name = describe(LLAMA), "model.layers.0.mlp.down_proj.weight"
    found = []
    for shard in (Shard(), Shard(1, 2)):
        slots = list(Decoder(arch, build(shard=shard)).weight_slots())
        fill_randomly(slots, 3, silent)
        found += [slot.target for slot in slots if slot.name == name]
    assert found[1].equal(found[0][:, 24:])


# --- formats ---


class Int8Weight(LinearWeight):
    """Several tensors for each matrix, with names and types of their own: codes [N, K] int8 and one
    scale for each row."""

    def __init__(self, spec: LinearSpec) -> None:
        self._spec = spec
        self._codes = torch.zeros(spec.held_rows, spec.held_columns, dtype=torch.int8)
        self._scales = torch.zeros(spec.held_rows)
        self.kernel_weight: Any = None

    def weight_slots(self) -> WeightSlots:
        first = 0
        for part in self._spec.parts:
            codes = self._codes[first : first + part.held]
            scales = self._scales[first : first + part.held]
            cut = part.rows or self._spec.columns
            yield WeightSlot(f"{part.name}.qweight", codes, cut, part.row_order)
            yield WeightSlot(f"{part.name}.scales", scales, part.rows, part.row_order)
            first += part.held

    def pack(self) -> None:
        self.kernel_weight = (self._codes, self._scales)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, self._codes * self._scales[:, None], bias)


class Int8Method(DenseMethod):
    def allocate(self, spec: LinearSpec) -> Any:
        return Int8Weight(spec)


def in_int8(tensors: dict[str, Tensor], names: str) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint with the matrices under `names` in that format, and the rest as it is."""
    for name, tensor in tensors.items():
        if names not in name or tensor.ndim != 2:
            yield name, tensor
            continue
        scales = tensor.abs().amax(1) / 127
        yield name.replace(".weight", ".qweight"), (tensor / scales[:, None]).round().to(torch.int8)
        yield name.replace(".weight", ".scales"), scales


@pytest.mark.parametrize("variant", ["llama", "rotated by pairs"])
@torch.inference_mode()
def test_a_format_is_chosen_by_the_layers_name(variant: str) -> None:
    """Attention in int8, the rest dense: the same as full weights with the same values."""
    arch = describe({**LLAMA, **VARIANTS[variant]})
    dense = DenseMethod(backend("cpu"), torch.float32, "cpu")
    asked: list[tuple[str, ...]] = []

    def method(names: Any) -> Any:
        asked.append(tuple(names))
        int8 = all(".self_attn." in name for name in names)
        return Int8Method(dense.ops, dense.dtype, dense.device) if int8 else dense

    tensors = checkpoint(arch)
    quantized = dict(in_int8(tensors, ".self_attn."))
    rounded = {}
    for name, tensor in tensors.items():
        rounded[name] = tensor
        if name not in quantized:
            codes = quantized[name.replace(".weight", ".qweight")]
            rounded[name] = codes * quantized[name.replace(".weight", ".scales")][:, None]
    mixed = loaded(arch, quantized, build(method))
    whole = loaded(arch, rounded, build())
    results = [
        model(IDS, [factors(arch)] * 2, caches(arch, 2), one_prompt(), None, lambda: None)
        for model in (mixed, whole)
    ]
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    prefix = "model.layers.0.self_attn"
    assert (f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj") in asked
    sizes = sum(tensor.nbytes for tensor in quantized.values())
    assert mixed.nbytes == sizes < whole.nbytes


@torch.inference_mode()
def test_a_layer_that_keeps_its_precision_is_not_rounded() -> None:
    from pagewire.worker.load import loader, quantizing
    from pagewire.worker.models.rounding import ROUNDINGS

    arch = describe({**LLAMA, **VARIANTS["experts"]})
    chosen = quantizing.Quantizing(True, ROUNDINGS["int8"])
    method = loader.method_choice(backend("cpu"), torch.float32, "cpu", chosen)
    decoder = Decoder(arch, build(method))
    for slot in decoder.weight_slots():
        slot.fill(torch.randn(slot.shape))
        if slot.name.endswith((".mlp.gate.weight", ".q_proj.weight")):
            rounded = isinstance(slot.target.value, Quantized)  # type: ignore[union-attr]
            assert rounded == slot.name.endswith(".q_proj.weight")


# --- what a layer is told ---


@pytest.mark.parametrize("variant", ["llama", "experts"])
@torch.inference_mode()
def test_every_matrix_is_given_the_batch_and_the_head_its_rows(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = describe({**LLAMA, **VARIANTS[variant]})
    decoder = loaded(arch, checkpoint(arch), build())
    batch, wanted = one_prompt(), torch.tensor([6, 1])
    linears, experts = Linear.__call__, Experts.__call__
    calls: list[tuple[Batch, Tensor | None]] = []

    def linear(self: Linear, x: Tensor, batch: Batch, rows: Tensor | None = None) -> Tensor:
        calls.append((batch, rows))
        return linears(self, x, batch, rows)

    def mixture(self: Experts, x: Tensor, ids: Tensor, weights: Tensor, batch: Batch) -> Tensor:
        calls.append((batch, None))
        return experts(self, x, ids, weights, batch)

    monkeypatch.setattr(Linear, "__call__", linear)
    monkeypatch.setattr(Experts, "__call__", mixture)
    decoder(IDS, [factors(arch)] * 2, caches(arch, 2), batch, wanted, lambda: None)
    each = 4 if variant == "llama" else 2 + 2 + 3
    assert len(calls) == 2 * each + 1 and all(given is batch for given, _ in calls)
    assert [rows for _, rows in calls[:-1]] == [None] * (2 * each) and calls[-1][1] is wanted


# --- what layers keep ---


def test_all_layers_of_a_model_are_one_group_that_keeps_everything() -> None:
    arch = describe({**LLAMA, "model_type": "mistral", "sliding_window": 9})
    spec = cache_spec(arch, torch.bfloat16)
    assert [group.kind for group in spec.groups] == ["full"] and spec.num_layers == 2
    assert spec.block_bytes(16) == 2 * 2 * 2 * 16 * 8 * 2
    assert [spec.blocks_for(tokens, 16) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
    cache = spec.groups[0].allocate(3, 16, "cpu")
    assert cache.shape == (2, 2, 3, 2, 16, 8) and not cache.any()
    assert cache.dtype == torch.bfloat16
    layers = spec.layer_caches([cache])
    assert [layer.data_ptr() for layer in layers] == [cache[0].data_ptr(), cache[1].data_ptr()]


def test_groups_of_other_kinds() -> None:
    full = CacheGroup("full", (0, 3), 2, 8, torch.bfloat16)
    window = CacheGroup("window", (1,), 2, 8, torch.bfloat16, window=20)
    spec = CacheSpec(
        (
            full,
            window,
            CacheGroup("state", (2,), state_bytes=100),
            CacheGroup("shared", (4,), shares_with=3),
            CacheGroup("none", (5,)),
        )
    )
    assert spec.block_bytes(16) == 3 * (2 * 2 * 16 * 8 * 2)
    assert sum(group.request_bytes() for group in spec.groups) == 100
    assert spec.blocks_for(1000, 16) == 63 and window.table_width(1000, 16) == 3
    assert window.table_width(16, 16) == 1
    tensors = [group.allocate(1, 16, "cpu") for group in (full, window)]
    layers = spec.layer_caches(tensors)
    assert layers[3] is layers[4] and layers[3].equal(tensors[0][1])
    assert [layer.numel() > 0 for layer in layers] == [True, True, False, True, True, False]
    with pytest.raises(ValueError, match="'state' have no blocks"):
        spec.groups[2].allocate(1, 16, "cpu")


def test_which_blocks_a_prefix_needs() -> None:
    """Of a window only those that the next token sees: 33 sees 14 to 32."""
    full, window = CacheGroup("full", (0,), 1, 8), CacheGroup("window", (0,), 1, 8, window=20)
    assert full.blocks_for_prefix(48, 16) == range(3)
    assert window.blocks_for_prefix(48, 16) == range(1, 3)
    assert window.blocks_for_prefix(16, 16) == range(1)
    assert CacheGroup("none", (0,)).blocks_for_prefix(48, 16) == range(0)
    with pytest.raises(ValueError, match="no prefix"):
        CacheGroup("state", (0,), state_bytes=1).blocks_for_prefix(48, 16)


def test_memory_is_asked_of_the_spec() -> None:
    from pagewire.worker.load import kv_sizing

    arch = describe(LLAMA)
    whole = cache_spec(arch, torch.bfloat16)
    group = CacheGroup("full", (0,), 2, 8, torch.bfloat16)
    half = CacheSpec((group, CacheGroup("shared", (1,), shares_with=0)))

    def blocks(spec: CacheSpec) -> int:
        return kv_sizing.size(
            arch, spec, weights=0, available=1 << 40, kv_bytes=1 << 20, blocks=0, block_size=16, max_model_len=0
        ).num_blocks  # fmt: skip

    assert blocks(half) == 2 * blocks(whole)
