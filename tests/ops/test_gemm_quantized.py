"""Products with quantized matrices, in Triton's interpreter: against the product over the
dequantized weights, for every form; and compiled, without a GPU."""

import json
import os
import subprocess
import sys
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
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.quantized import Quantized, quantize
from pagewire_kernels.quantized_decode import PERMUTED

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


@pytest.mark.parametrize("columns", [64, 192, 4096])
def test_rows_are_rounded_to_float8_with_a_scale_each(columns: int) -> None:
    """In the order of the weights' inputs, so that products know nothing of it."""
    torch.manual_seed(8)
    wide = torch.randn(5, 2 * columns)
    x = wide[:, :columns] * torch.tensor([1e-6, 1.0, 3e4, 0.0, 1.0])[:, None]
    x8, scales = gemm_scaled.quantize_rows(x)
    most = x.abs().amax(1, keepdim=True)
    wanted = torch.where(most > 0, most / 448, 1.0)
    assert torch.equal(scales, wanted)
    rounded = (x / wanted).to(torch.float8_e4m3fn)
    in_order = rounded.view(torch.uint8).view(5, -1, 64)[:, :, list(PERMUTED)].reshape(5, columns)
    assert torch.equal(x8.view(torch.uint8), in_order)


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
    assert error(matrices.in_float8(x, bias), exact) < 2e-6
    assert len(matrices.parts) == 1
    assert matrices.parts[0].quantize_inputs


def test_which_products_are_taken_in_float8(monkeypatch) -> None:
    """Those of matrices that were made for it, from some rows on, where the GPU has them."""
    monkeypatch.setattr(gemm_scaled, "_has_products", lambda device: device.type == "cpu")
    device = torch.device("cpu")

    def takes(part: Quantized, rows: int = 65, dtype: torch.dtype = torch.bfloat16) -> bool:
        (matrix,) = pack([part]).parts
        return gemm_scaled.takes(matrix, rows, dtype, device)

    made_for_it = Quantized(float8(64, 128), half(64, 1), quantize_inputs=True)
    assert takes(made_for_it)
    assert not takes(made_for_it, rows=64)
    assert not takes(made_for_it, dtype=torch.float32)
    assert not takes(Quantized(float8(64, 128), half(64, 1)))
    assert not takes(Quantized(codes8(64, 128), half(64, 1), quantize_inputs=True))
    assert not takes(made_for_it.regrouped(64))


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
@pytest.mark.parametrize("form", ["int4", "int8"])
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
    assert len(launches) == 55
    for launch in launches:
        assert launch["shared"] <= launch["limit"], launch
        assert set(launch["waits"]) <= {0}, launch
    assert any(launch["waits"] for launch in launches if launch["capability"] == 90)
