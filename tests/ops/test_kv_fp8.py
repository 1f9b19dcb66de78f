"""Caches of 8-bit codes: how numbers become codes and codes numbers, and every kernel over them
against the plain oracle, whose keys and values are what the codes stand for."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from ops.triton_cases import error, grouped, paged
from pagewire_kernels import attention_torch, attention_torch_plan, cpu, cuda, reference
from pagewire_kernels.attention_common import codes, numbers, pair_numbers
from pagewire_kernels.attention_decode import DecodeConfig, Rope, decode_attention
from pagewire_kernels.attention_prefill import PrefillConfig, prefill_attention, takes_hopper
from pagewire_kernels.attention_torch_plan import Shape
from pagewire_kernels.backend import Ops
from pagewire_kernels.batch import Batch
from pagewire_kernels.cascade import cascade_attention
from pagewire_kernels.decode_shapes import choose
from pagewire_kernels.kv_cache import FP8, KVScales, dequantize, quantize, raw
from torch import Tensor

SCALES = KVScales(0.37, 1.9)
SMALL = DecodeConfig(block_n=16, warps=1, stages=2, chunk=16, splits=4)
EVERY_CODE = torch.arange(256).to(torch.uint8)
CASES = [
    (64, 4, 16, None, None),
    (80, 1, 5, None, 5.0),
    (96, 3, 8, 20, 3.0),
    (16, 2, 16, None, None),
]
"""Head size, group, page, window, soft cap."""


def coded(
    counts: list[int],
    lengths: list[int],
    hkv: int,
    group: int,
    dim: int,
    page: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """`paged` with codes; what nobody may look at is NaN in codes too."""
    q, k, v, batch = paged(counts, lengths, hkv, group, dim, page)
    return q.to(dtype), quantize(k, SCALES.k), quantize(v, SCALES.v), batch


def exact(
    q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, window: int | None, *more: object
) -> Tensor:
    keys, values = dequantize(k, SCALES.k).double(), dequantize(v, SCALES.v).double()
    return reference.paged_attention(q.double(), keys, values, batch, scale, window, *more)  # type: ignore[arg-type]


@triton.jit
def _codes(x, scale, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, codes(tl.load(x + i), scale))


@triton.jit
def _numbers(code, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, numbers(tl.load(code + i), out.dtype.element_ty, "e4m3_bits"))


@triton.jit
def _pair_numbers(words, lower, higher, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    low, high = pair_numbers(tl.load(words + i), lower.dtype.element_ty, "e4m3_bits")
    tl.store(lower + i, low)
    tl.store(higher + i, high)


@pytest.mark.parametrize("scale", [1.0, 0.37, 240.0])
def test_numbers_are_rounded_to_the_nearest_code_and_saturate(scale: float) -> None:
    rng = torch.Generator().manual_seed(0)
    some = torch.randn(4000, generator=rng) * 10 ** torch.randn(4000, generator=rng)
    every = EVERY_CODE.view(FP8).float()
    halfway = (every[:127].unfold(0, 2, 1).sum(-1) / 2)[:126]
    limits = torch.tensor([448.0, 460.0, 464.0, 480.0, 1e30, float("inf"), -float("inf"), -0.0])
    x = torch.cat((some, every, halfway * scale, limits * scale))
    x = torch.cat((x, torch.zeros(8192 - len(x))))
    out = torch.empty(len(x), dtype=torch.uint8)
    _codes[(1,)](x, scale, out, len(x))
    assert torch.equal(out, raw(quantize(x, scale)))
    finite = x.nan_to_num(nan=0.0)
    assert not quantize(finite, scale).float().isnan().any()
    assert quantize(torch.tensor([1e30, -1e30]), 1.0).float().tolist() == [448.0, -448.0]
    assert quantize(torch.tensor([float("nan")]), 1.0).float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_code_is_its_number(dtype: torch.dtype) -> None:
    wanted = EVERY_CODE.view(FP8).to(dtype)
    out = torch.empty(256, dtype=dtype)
    _numbers[(1,)](EVERY_CODE, out, 256)
    assert torch.equal(out.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))
    lower, higher = torch.empty(128, dtype=dtype), torch.empty(128, dtype=dtype)
    _pair_numbers[(1,)](EVERY_CODE.view(torch.int16), lower, higher, 128)
    both = torch.stack((lower, higher), 1).flatten()
    assert torch.equal(both.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))


def asm_result(asm: str, word: int) -> list[int]:
    """The two output words of machine instructions for an input word: a small interpreter of those
    that are used."""
    import re

    full, values = 0xFFFFFFFF, {"$2": word}
    for line in asm.strip("{} ").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, rest = line.split(" ", 1)
        target, *sources = [part.strip() for part in rest.split(",")]
        given = [values[x] if x in values else int(x, 0) for x in sources]
        if name == "mov.b32":
            values[target] = given[0]
        elif name == "shl.b32":
            values[target] = given[0] << given[1] & full
        elif name == "shr.b32":
            values[target] = given[0] >> given[1]
        elif name == "and.b32":
            values[target] = given[0] & given[1]
        elif name == "or.b32":
            values[target] = given[0] | given[1]
        elif name == "prmt.b32":
            octets = given[0].to_bytes(4, "little") + given[1].to_bytes(4, "little")
            chosen = [octets[given[2] >> 4 * i & 7] for i in range(4)]
            values[target] = int.from_bytes(bytes(chosen), "little")
        else:
            dtype = torch.bfloat16 if "bf16" in name else torch.float16
            assert re.fullmatch(r"(fma\.rn\.bf16x2|mul\.rn\.f16x2)", name)
            a, b = (
                torch.tensor([x & 0xFFFF, x >> 16]).to(torch.uint16).view(dtype) for x in given[:2]
            )
            halves = (a * b).view(torch.uint16).tolist()
            values[target] = halves[0] | halves[1] << 16
    return [values["$0"], values["$1"]]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_machine_instructions_give_every_codes_number(kind: str) -> None:
    """All but NaN's code, which becomes 480: kernels' masks keep what nobody wrote out anyway."""
    from pagewire_kernels import attention_common as common

    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    in_order = common.BYTES_TO_BF16 if kind == "bf16" else common.BYTES_TO_F16
    apart = common.PAIRS_TO_BF16 if kind == "bf16" else common.PAIRS_TO_F16
    for first in range(0, 256, 4):
        octets = [(first + i) % 256 for i in range(4)]
        wanted = torch.tensor(octets).to(torch.uint8).view(FP8).to(dtype)
        wanted = torch.where(wanted.isnan(), 480.0 if first < 128 else -480.0, wanted).to(dtype)
        word = int.from_bytes(bytes(octets), "little")
        for asm, order in ((in_order, [0, 1, 2, 3]), (apart, [0, 2, 1, 3])):
            words = asm_result(asm.value, word)
            halves = [half for out in words for half in (out & 0xFFFF, out >> 16)]
            found = torch.tensor(halves).to(torch.uint16).view(dtype)
            assert torch.equal(found.view(torch.int16), wanted[order].view(torch.int16))


@pytest.mark.parametrize(("dim", "group", "page", "window", "cap"), CASES)
def test_decode(dim: int, group: int, page: int, window: int | None, cap: float | None) -> None:
    q, k, v, batch = coded([1] * 3, [1, 37, 65], 1, group, dim, page)
    out = torch.full_like(q.flatten(1), float("nan"))
    tables, lengths = batch.block_tables, batch.seq_lens
    decode_attention(
        q, k, v, tables, lengths, 0.1, window, cap, out=out, config=SMALL, kv_scales=SCALES
    )
    assert error(out, exact(q, k, v, batch, 0.1, window, cap)) < 1e-5


@pytest.mark.parametrize(("dim", "group", "page", "window", "cap"), CASES)
def test_prefill_behind_cached_tokens(
    dim: int, group: int, page: int, window: int | None, cap: float | None
) -> None:
    q, k, v, batch = coded([1, 9, 5], [1, 9, 40], 1, group, dim, page)
    out = torch.full_like(q.flatten(1), float("nan"))
    config = PrefillConfig(block_m=32, block_n=16, warps=1, stages=2)
    prefill_attention(
        q, k, v, batch.block_tables, batch.seq_lens, batch.query_start, 0.1, window, cap,
        out=out, config=config, kv_scales=SCALES,
    )  # fmt: skip
    assert error(out, exact(q, k, v, batch, 0.1, window, cap)) < 1e-5


def test_mixed_rows_in_half_precision() -> None:
    """The interpreter has no products of bfloat16."""
    q, k, v, batch = coded([1, 5], [37, 30], 1, 4, 64, 16, torch.float16)
    out = cuda.OPS.paged_attention(q, k, v, batch, 0.125, None, kv_scales=SCALES)
    assert out.dtype == torch.float16 and error(out, exact(q, k, v, batch, 0.125, None)) < 2e-3


def test_slopes() -> None:
    q, k, v, batch = coded([1, 5], [37, 20], 1, 3, 64, 16)
    slopes = torch.tensor([0.5, 0.125, 0.01])
    out = cuda.OPS.paged_attention(q, k, v, batch, 0.125, None, 4.0, slopes, SCALES)
    assert error(out, exact(q, k, v, batch, 0.125, None, 4.0, slopes)) < 1e-5


@pytest.mark.parametrize(("dim", "group", "cap"), [(80, 3, 4.0)])
def test_cascade(dim: int, group: int, cap: float | None) -> None:
    q, k, v, batch = coded([1] * 4, [40, 50, 30, 41], 2, group, dim, 16)
    batch.block_tables[[3], :2] = batch.block_tables[1, :2]
    groups = grouped([[1, 3]], [32], 4, 1)
    out = cascade_attention(
        q, k, v, batch.block_tables, batch.seq_lens, groups, 0.1, cap, kv_scales=SCALES
    )
    assert error(out, exact(q, k, v, batch, 0.1, None, cap)) < 1e-5


@pytest.mark.parametrize("ops", [cpu.OPS, cuda.OPS], ids=["cpu", "triton"])
@pytest.mark.parametrize(
    ("dim", "hq", "hkv", "normed"), [(64, 9, 3, False), (128, 4, 2, True), (80, 2, 2, False)]
)
def test_keys_and_values_are_kept_as_codes(
    ops: Ops, dim: int, hq: int, hkv: int, normed: bool
) -> None:
    _, k, v, batch = coded([1, 7], [20, 7], hkv, hq // hkv, dim, 16)
    batch.slot_mapping[3] = -1
    qkv, cos_sin = torch.randn(8, (hq + 2 * hkv) * dim), torch.randn(32, dim)
    qkv[2, -1], qkv[1, hq * dim] = 1e9, float("inf")
    weights = (torch.randn(dim), torch.randn(dim)) if normed else (None, None)
    if normed:
        qkv[1, hq * dim] = 1e9
    ours, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    expected = reference.rope_and_cache(
        qkv.clone(), cos_sin, *weights, 1e-6, *theirs, batch, SCALES
    )
    q = ops.rope_and_cache(qkv.clone(), cos_sin, *weights, 1e-6, *ours, batch, SCALES)
    assert error(q, expected) < 1e-6
    for mine, wanted, before in zip(ours, theirs, (k, v), strict=True):
        assert not torch.equal(raw(mine), raw(before))
        # Another order of float32's operations rounds a number in thousands to the next code.
        assert (raw(mine) != raw(wanted)).float().mean() < 1e-3


@pytest.mark.parametrize("ops", [cpu.OPS, cuda.OPS], ids=["cpu", "triton"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [5, 1, 40]])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (20, 3.0)])
def test_attention_of_both_back_ends(
    ops: Ops, counts: list[int], window: int | None, cap: float | None
) -> None:
    q, k, v, batch = coded(counts, [47, 30, 40], 1, 2, 64, 16)
    # The CPU's worker zeroes what its batched products multiply by zero.
    codes_of = [raw(cache).masked_fill_(cache.float().isnan(), 0).view(FP8) for cache in (k, v)]
    out = ops.paged_attention(q, *codes_of, batch, 0.1, window, cap, None, SCALES)
    assert error(out, exact(q, *codes_of, batch, 0.1, window, cap)) < 1e-5


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("softcap", "sloped"), [(None, False), (3.0, False), (None, True)])
def test_attention_by_torch(window: int | None, softcap: float | None, sloped: bool) -> None:
    q, k, v, batch = coded([1, 19, 300], [77, 50, 330], 2, 3, 64, 16)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03, 0.01]) if sloped else None
    out = attention_torch.paged_attention(q, k, v, batch, 0.1, window, softcap, slopes, SCALES)
    assert error(out, exact(q, k, v, batch, 0.1, window, softcap, slopes)) < 1e-5
    shape = Shape(32, 8, 128)
    full = attention_torch_plan.workspace(shape, 100, 2, 2)
    assert attention_torch_plan.workspace(shape, 100, 2, 1) > full


@pytest.mark.parametrize("config", [SMALL, None])
@pytest.mark.parametrize(("dim", "group", "normed"), [(64, 3, False), (128, 4, True)])
def test_decode_with_rope_reads_the_code_that_it_wrote(
    dim: int, group: int, normed: bool, config: DecodeConfig | None
) -> None:
    lengths, hkv = [1, 37, 64], 1
    _, k, v, batch = coded([1] * 3, lengths, hkv, group, dim, 16)
    qkv, cos_sin = torch.randn(3, (group + 2) * hkv * dim) * 3, torch.randn(200, dim)
    weights = (torch.randn(dim), torch.randn(dim)) if normed else (None, None)
    ours, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    roped = reference.rope_and_cache(qkv.clone(), cos_sin, *weights, 1e-6, *theirs, batch, SCALES)
    out = decode_attention(
        qkv, *ours, batch.block_tables, batch.seq_lens, 0.1,
        rope=Rope(cos_sin, *weights, 1e-6), config=config, kv_scales=SCALES,
    )  # fmt: skip
    assert error(out, exact(roped, *ours, batch, 0.1, None)) < 1e-5
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (raw(mine) != raw(wanted)).float().mean() < 1e-3


def test_the_kernel_for_hopper_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It copies caches to where its tensor cores read them."""
    from types import SimpleNamespace

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    half = torch.bfloat16
    q = SimpleNamespace(
        device=SimpleNamespace(type="cuda"),
        shape=(600, 32, 128),
        dtype=half,
        data_ptr=lambda: 16,
        stride=lambda i: (4096, 128, 1)[i],
    )
    full, codes_ = (torch.zeros(4, 8, 16, 128, dtype=dtype) for dtype in (half, FP8))
    assert takes_hopper(q, full, full) and not takes_hopper(q, codes_, codes_)  # type: ignore[arg-type]


def test_launch_shapes_of_codes_have_a_table_of_their_own() -> None:
    full, small = (choose(128, 4, 2048, 2, size) for size in (2, 1))
    assert full.kernel != small.kernel and "1 in the cache" in small.kernel
    assert full.candidates[0].shape != small.candidates[0].shape
    assert replace(small.candidates[0].shape, splits=2) == small.candidates[0].shape
