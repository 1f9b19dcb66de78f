"""Products with quantized matrices, in Triton's interpreter: against the product over the
dequantized weights, for every form; and compiled, without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pagewire.worker.models import describe, rotary
from pagewire.worker.models.decoder import Decoder
from pagewire.worker.models.layers import Build
from pagewire.worker.models.quantized_weights import QuantizedMethod
from pagewire.worker.models.rounding import ROUNDINGS
from pagewire_kernels import (
    cuda_quantized,
    gemm_quantized,
    gemm_scaled,
    gpu_quantized_size,
    packed_matrix,
    quantized_shapes,
)
from pagewire_kernels.backend import backend
from pagewire_kernels.batch import make_batch
from pagewire_kernels.cuda_quantized import CudaQuantized, QuantizedMatrices
from pagewire_kernels.float8_rows import empty_rows, quantize_rows
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.quantized import Quantized, quantize
from pagewire_kernels.quantized_rows import ROW

ROOT = Path(__file__).parents[2]
LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}  # fmt: skip
SCRIPT = Path(__file__).with_name("compile_quantized.py")


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) * 0.02


def codes8(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8)


def float8(rows: int, columns: int) -> torch.Tensor:
    values = (torch.randn(rows, columns) * 60).to(torch.float8_e4m3fn)
    # the smallest codes, and the largest
    values.view(torch.uint8)[0, :16] = torch.arange(16, dtype=torch.uint8)
    values.view(torch.uint8)[1, :2] = torch.tensor([0x7E, 0xFE], dtype=torch.uint8)
    return values


def half(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape) * 0.01 + 0.001).half().float()


def constant_groups() -> Quantized:
    """Groups of one value have a scale of zero, and those of zeros no minimum either."""
    full = weight(64, 128)
    full[:, :32] = 0.5
    full[5, 32:64] = 0
    return quantize(full, 4)


CASES = {
    "4 bits, groups of 128": lambda: [quantize(weight(64, 256), 4, 128, whole_zeros=True)],
    "rows that fill no tile": lambda: [quantize(weight(70, 128), 4, 64, whole_zeros=True)],
    "columns of 64": lambda: [quantize(weight(64, 192), 4, 64, whole_zeros=True)],
    "zeros that are no whole numbers": lambda: [quantize(weight(64, 128), 4)],
    "groups of one value": lambda: [constant_groups()],
    "one group a row": lambda: [quantize(weight(64, 384), 4, 384, whole_zeros=True)],
    "8 bits, groups of 32": lambda: [quantize(weight(64, 128), 8)],
    "8 bits, groups of 16 with minima": lambda: [
        Quantized(codes8(64, 128), half(64, 8), -half(64, 8) * 3)
    ],
    "8 bits, a scale a row": lambda: [Quantized(codes8(64, 128), half(64, 1))],
    "float8, a scale a row": lambda: [Quantized(float8(64, 128), half(64, 1) * 1e-6)],
    "float8, groups of 128": lambda: [Quantized(float8(64, 256), half(64, 2))],
    "two alike": lambda: [quantize(weight(20, 128), 4), quantize(weight(50, 128), 4)],
    "4 and 8 bits": lambda: [quantize(weight(64, 128), 4), quantize(weight(40, 128), 8)],
}


def pack(parts: list[Quantized]) -> QuantizedMatrices:
    matrices = CudaQuantized(KernelChoices()).pack(parts, False)
    assert matrices is not None
    return matrices


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_dequantized_weights(case: str, monkeypatch) -> None:
    torch.manual_seed(3)
    parts = CASES[case]()
    matrices = pack(parts)
    full = torch.cat([part.dequantize() for part in parts])
    assert matrices.shape == full.shape
    # zero points that are no whole numbers have float16's digits
    allowed = 8e-4 if any(part.rest for part in matrices.parts) else 2e-6
    assert error(matrices.dense(torch.float32), full.double()) <= allowed
    bias = torch.randn(len(full))
    assert matrices(torch.empty(0, full.shape[1])).shape == (0, len(full))
    for tokens in (1, 3, 17):
        x = torch.randn(tokens, full.shape[1])
        exact = x.double() @ full.double().T + bias.double()
        assert error(matrices(x, bias), exact) <= allowed
        monkeypatch.setattr(cuda_quantized, "MOST_FUSED_ROWS", 0)
        assert error(matrices(x, bias), exact) <= allowed
        monkeypatch.undo()
    ids = torch.tensor([3, 0, 3])
    assert error(matrices.embed(ids), full[ids].double()) <= allowed


@pytest.mark.parametrize("rows", [[64], [70, 10]])
def test_products_in_float8(rows: list[int]) -> None:
    torch.manual_seed(9)
    parts = [Quantized(float8(count, 128), half(count, 1), quantize_inputs=True) for count in rows]
    matrices = pack(parts)
    x = torch.randn(70, 128)
    scale = x.abs().amax(1, keepdim=True) / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).double() * scale
    weights = torch.cat([part.dequantize() for part in parts]).double()
    bias = torch.randn(len(weights))
    exact = rounded @ weights.T + bias
    assert error(matrices.in_float8(quantize_rows(x), bias), exact) < 2e-6
    assert len(matrices.parts) == 1
    assert matrices.parts[0].quantize_inputs


def in_blocks(rows: int, columns: int) -> Quantized:
    """With a scale for each 128 x 128 weights, the last of which may be cut."""
    scale = half(-(-rows // 128), columns // 128).repeat_interleave(128, 0)[:rows]
    return Quantized(float8(rows, columns), scale, quantize_inputs=True)


@pytest.mark.parametrize("rows", [[128], [128, 72], [150]])
def test_products_of_blocks_in_float8(rows: list[int], monkeypatch) -> None:
    torch.manual_seed(10)
    monkeypatch.setattr(gemm_scaled, "has_block_products", lambda device: True)
    parts = [in_blocks(count, 512) for count in rows]
    matrices = pack(parts)
    assert matrices.input_group(65, torch.bfloat16) == 128
    x = torch.randn(70, 512) * torch.logspace(-3, 3, 512)
    groups = x.view(70, 4, 128)
    scale = groups.abs().amax(2, keepdim=True) / 448
    rounded = ((groups / scale).to(torch.float8_e4m3fn).double() * scale).view(70, 512)
    weights = torch.cat([part.dequantize() for part in parts]).double()
    bias = torch.randn(len(weights))
    out = matrices.in_float8(quantize_rows(x, 128), bias)
    assert out.shape == (70, sum(rows))
    assert error(out, rounded @ weights.T + bias) < 2e-6
    for part in parts:
        planned = gpu_quantized_size.packed_bytes(*part.shape, 128, 8, False)
        more = gpu_quantized_size.block_scale_bytes(*part.shape, 128)
        assert pack([part]).nbytes == planned + more


@pytest.mark.parametrize("rows", [48, 100, 256])
def test_torch_takes_blocks_as_they_are_laid_out(rows: int, monkeypatch) -> None:
    """By shapes and strides alone, on its meta device: rows' scales lie by group, rows are filled up
    to a multiple of 4, and the weight's to whole blocks."""
    monkeypatch.setattr(gemm_scaled, "has_block_products", lambda device: True)
    (matrix,) = pack([in_blocks(rows, 1024)]).parts
    assert matrix.block_scale is not None
    there = replace(
        matrix, words=matrix.words.to("meta"), block_scale=matrix.block_scale.to("meta")
    )
    x = empty_rows(70, 1024, 128, torch.bfloat16, torch.device("meta"))
    out = gemm_scaled.scaled_linear(x, there)
    assert out.shape == (70, rows)
    assert out.dtype == torch.bfloat16


def test_scales_of_rows_lie_by_group() -> None:
    x = quantize_rows(torch.randn(70, 1024), 128)
    assert len(x) == 70
    assert x.codes.shape == (72, 1024)
    assert x.scales.shape == (72, 8)
    assert x.scales.stride() == (1, 72)


def test_which_products_are_taken_in_float8(monkeypatch) -> None:
    """Those of matrices that were made for it, from some rows on, where the GPU has them."""
    monkeypatch.setattr(gemm_scaled, "_has_products", lambda device: device.type == "cpu")
    monkeypatch.setattr(gemm_scaled, "has_block_products", lambda device: device.type == "cpu")

    def group(part: Quantized, rows: int = 65, dtype: torch.dtype = torch.bfloat16) -> int | None:
        return pack([part]).input_group(rows, dtype)

    made_for_it = Quantized(float8(64, 128), half(64, 1), quantize_inputs=True)
    assert group(made_for_it) == ROW
    assert group(made_for_it, rows=64) is None
    assert group(made_for_it, dtype=torch.float32) is None
    assert group(Quantized(float8(64, 128), half(64, 1))) is None
    assert group(Quantized(codes8(64, 128), half(64, 1), quantize_inputs=True)) is None
    assert group(made_for_it.regrouped(64)) is None
    blocks = in_blocks(256, 512)
    assert group(blocks) == 128
    assert group(blocks, rows=64) is None
    assert group(blocks, dtype=torch.float32) is None
    assert group(replace(blocks, quantize_inputs=False)) is None
    assert group(in_blocks(256, 384)) is None, "torch's versions differ in how scales are filled up"
    assert group(replace(blocks, scale=half(256, 4))) is None, "rows of a block differ"
    side_by_side = pack([made_for_it, Quantized(float8(64, 128), half(64, 1))])
    assert side_by_side.input_group(65, torch.bfloat16) is None


def refuses(*operands: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("only for another GPU\nwith details")


def by_blocks(
    codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, block_scale: torch.Tensor
) -> torch.Tensor:
    """As torch's product."""
    by_row = block_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    x = codes.float() * scales.repeat_interleave(128, 1)
    return (x @ (weight.float() * by_row).T).bfloat16()


def misreads_rows(codes: torch.Tensor, scales: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
    return by_blocks(codes, scales.reshape(scales.T.shape).T, *weight)


def misreads_blocks(*operands: torch.Tensor) -> torch.Tensor:
    *others, block_scale = operands
    return by_blocks(*others, block_scale.T.reshape(block_scale.shape))


@pytest.mark.parametrize(
    ("product", "told"),
    [
        (by_blocks, ""),
        (refuses, "(only for another GPU)"),
        (misreads_rows, "is off by"),
        (misreads_blocks, "is off by"),
    ],
)
def test_products_of_blocks_are_tried_once(product, told: str, monkeypatch, caplog) -> None:
    """At loading, with a line where torch cannot be used."""
    monkeypatch.setattr(gemm_scaled, "_has_products", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gemm_scaled, "_by_blocks", product)
    gemm_scaled.has_block_products.cache_clear()
    for _ in range(2):
        group = pack([in_blocks(128, 512)]).input_group(65, torch.bfloat16)
        assert group == (None if told else 128)
    gemm_scaled.has_block_products.cache_clear()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(told)
    assert all("128 x 128" in line and told in line for line in lines)


@pytest.mark.parametrize(("splits", "rows"), [(1, 20), (3, 1), (4, 20)])
def test_splits_are_added_in_order(splits: int, rows: int) -> None:
    torch.manual_seed(4)
    part = quantize(weight(64, 512), 4, 128, whole_zeros=True)
    (matrix,) = pack([part]).parts
    x = torch.randn(rows, 512)
    config = quantized_shapes.QuantizedConfig(16, 64, 128, splits, 4, 2)
    out = torch.full((rows, 64), float("nan"))
    gemm_quantized.quantized_linear(x, matrix, config=config, out=out)
    assert error(out, x.double() @ part.dequantize().double().T) < 2e-6


def test_what_cannot_be_packed() -> None:
    ops = CudaQuantized(KernelChoices())
    assert ops.pack([quantize(weight(64, 96), 4)], False) is None
    assert not gpu_quantized_size.fits(128, 24)


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_known_before(case: str) -> None:
    """Of each part by itself: what is planned is what is taken."""
    for part in CASES[case]():
        planned = gpu_quantized_size.packed_bytes(
            *part.shape, part.group, part.bits, part.minimum is not None
        )
        assert pack([part]).nbytes == planned


@pytest.mark.parametrize("rows", [1, 4, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512])
@pytest.mark.parametrize(
    ("n", "k"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128, 64), (256, 192)]
)
@pytest.mark.parametrize("form", ["int4", "byte"])
def test_launch_shapes_cover_the_matrix(form: str, n: int, k: int, rows: int) -> None:
    shape = (n // 64, k // 64, 128, 4) if form == "int4" else (n, k // 4)
    words = torch.empty(shape, dtype=torch.int32, device="meta")
    group = 64 if form == "int4" else 0
    matrix = packed_matrix.PackedMatrix(
        words, None, None, torch.Size((n, k)), form, group, False, 1.0
    )
    config = quantized_shapes.pick_config(rows, matrix, torch.bfloat16)
    assert n % config.block_n == 0
    assert k % config.block_k == 0
    assert config.splits <= k // config.block_k


def test_a_model_whose_matrices_are_all_quantized() -> None:
    """The head too, as in GGUF files: it computes what the dequantized weights do, layer by layer."""
    torch.manual_seed(6)
    ops = backend("cuda")
    arch = describe(LLAMA)
    rounding = ROUNDINGS["int8"]
    assert ops.quantized is not None
    method = QuantizedMethod(ops, ops.quantized, torch.float32, "cpu", rounding)
    kept = Decoder(arch, Build(ops, torch.float32, "cpu", lambda names: method))
    full = Decoder(arch, Build(ops, torch.float32, "cpu"))
    weights = {slot.name: torch.randn(slot.shape) * 0.1 for slot in full.weight_slots()}
    for slot in kept.weight_slots():
        slot.target.copy_(weights[slot.name])
    for slot in full.weight_slots():
        value = weights[slot.name]
        slot.target.copy_(rounding.full(value) if value.ndim == 2 else value)
    assert list(kept.pack())
    assert list(full.pack())
    assert all(isinstance(matrix, QuantizedMatrices) for matrix in kept.packed())
    factors = [rotary.table(arch.rope, arch.head_dim, 64)] * arch.num_layers
    blocks = torch.randn(2, 2, 4, arch.num_kv_heads, 16, arch.head_dim)
    for lengths in ([1], [5]):
        batch = make_batch(lengths, [20], [[1, 2]], 16)
        ids = torch.arange(lengths[0])
        ours, theirs = (
            decoder(ids, factors, list(blocks.clone()), batch, None, lambda: None)
            for decoder in (kept, full)
        )
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_compiled_products_fit_and_wait_for_their_operands(tmp_path: Path) -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in ("protocol", "kernels", "services"))
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "90", "80", "86", "120"]
    done = subprocess.run(
        command, env={**env, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    norms = [launch for launch in launches if launch["launch"].startswith("norm")]
    assert len(launches) - len(norms) == 66
    for launch in launches:
        assert launch["shared"] <= launch["limit"], launch
        assert set(launch["waits"]) <= {0}, launch
    assert any(launch["waits"] for launch in launches if launch["capability"] == 90)
    rows = [launch for launch in launches if launch["launch"].startswith("one row, int4")]
    for launch in rows:
        # 32 neighbours of the first axis are a warp: mma's operands
        assert len(launch["products"]) >= 2, launch
        assert not launch["spilled"], launch
        assert all(
            "threadsPerWarp = [32, 1], warpsPerCTA = [4, 1]" in p for p in launch["products"]
        )
    codes = [launch for launch in launches if launch["launch"].startswith("one row in groups")]
    assert len(codes) == 3
    for launch in codes:
        # threads keep what they read: only the last sum goes through shared memory
        assert launch["shared"] <= 256, launch
        assert not launch["spilled"], launch
    # what a norm gives besides must not change the order of its sums, nor so its bits
    for width in range(0, len(norms), 4):
        plain, *others = norms[width : width + 4]
        assert [other["sums"][0] for other in others] == plain["sums"] * 3
