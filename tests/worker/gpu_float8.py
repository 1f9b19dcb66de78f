"""Products in float8 at the sizes of an 8B layer, for gpu_quantized.py: right, and how long they take
with the rounding before them, as a launch of its own or inside the norm or activation function, beside
bf16 and beside the same weights with 16-bit activations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from pagewire.bench.ops.case import graph_us
from pagewire.worker.models.rounding import E4M3_MOST, fp8_rows
from pagewire_kernels import activation, gemm, gemm_scaled, norm
from pagewire_kernels.cuda_quantized import CudaQuantized, QuantizedMatrices
from pagewire_kernels.float8_rows import quantize_rows
from pagewire_kernels.gemm_cublaslt import GemmAlgorithms
from pagewire_kernels.gemm_quantized import MOST_FUSED_ROWS, quantized_linear
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.quantized import Quantized
from pagewire_kernels.quantized_rows import ROW, QuantizedRows
from torch import Tensor

BLOCK: Final = 128
EPS: Final = 1e-5
HIDDEN: Final = 4096
INNER: Final = 14336
SIZES: Final = {
    "qkv": (6144, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
ROWS: Final = (128, 256, 1024, 8192)
CROSSING: Final = (16, 32, 64, 96)
"""Rows at which products in float8 may begin to be worth it."""
COLD_BYTES: Final = 200e6
"""More than a cache holds."""
MOST_ERROR: Final = 5e-3
"""Relative, of the product's own sums and its result in bfloat16."""


def fp8_blocks(weight: Tensor) -> Quantized:
    """weight [N, K] with a scale for each 128 x 128 weights, as DeepSeek and Qwen save it."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, -rows % BLOCK))
    tiles = padded.view(-1, BLOCK, columns // BLOCK, BLOCK)
    scale = tiles.abs().amax((1, 3)) / E4M3_MOST
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(-1, columns)[:rows]
    by_row = scale.repeat_interleave(BLOCK, 0)[:rows]
    return Quantized(codes, by_row, quantize_inputs=True)


def as_rounded(x: Tensor, group: int) -> Tensor:
    """x [T, K] with each group of inputs, or row, rounded to float8: float64."""
    groups = x.float().view(len(x), -1, group or x.shape[1])
    scale = groups.abs().amax(2, keepdim=True) / E4M3_MOST
    rounded = (groups / scale).to(torch.float8_e4m3fn).double() * scale.double()
    return rounded.view(x.shape)


def _same(rows: QuantizedRows, wanted: QuantizedRows) -> bool:
    count = len(wanted)
    codes, expected = rows.codes[:count], wanted.codes[:count]
    return torch.equal(rows.scales[:count], wanted.scales[:count]) and torch.equal(
        codes.view(torch.uint8), expected.view(torch.uint8)
    )


def check_bits(device: str) -> list[str]:
    """What differs where a norm or an activation function rounds, from rounding its result."""
    small = device == "cpu"
    wrong = []
    for width in (256,) if small else (1024, HIDDEN, 5120, INNER):
        for count in (3,) if small else (65, 128, 1000):
            for group in (ROW, BLOCK):
                torch.manual_seed(width + count)
                x = torch.randn(count, width, device=device).bfloat16() * 3
                residual = torch.randn_like(x)
                weight = torch.randn(width, device=device).bfloat16()
                gate_up = torch.randn(count, 2 * width, device=device).bfloat16() * 2
                normed, total = norm.add_rms_norm(x, residual.clone(), weight, EPS)
                rows, summed = norm.add_rms_norm_quantized(x, residual, weight, EPS, group, True)
                activated = activation.silu_mul_quantized(gate_up, group)
                plain = quantize_rows(activation.silu_mul(gate_up), group)
                same = {
                    "norm": _same(rows, quantize_rows(normed, group)),
                    "full norm": rows.full is not None and torch.equal(rows.full, normed),
                    "sum": torch.equal(summed, total),
                    "activation": _same(activated, plain),
                }
                wrong += [
                    f"{name}, {count} x {width}, group {group}: other bits than rounded apart"
                    for name, equal in same.items()
                    if not equal
                ]
    print(f"float8 from norms and activation functions: {len(wrong)} wrong", flush=True)
    return wrong


@dataclass(frozen=True)
class Forms:
    """Copies of one weight [N, K], rotated through so that no cache holds them."""

    full: list[Tensor]
    by_row: list[QuantizedMatrices]
    by_block: list[QuantizedMatrices]

    @classmethod
    def make(cls, rows: int, columns: int) -> "Forms":
        ops = CudaQuantized(KernelChoices())

        def packed(matrix: Quantized) -> QuantizedMatrices:
            matrices = ops.pack([matrix], False)
            assert matrices is not None
            return matrices

        copies = max(2, int(COLD_BYTES / (rows * columns)))
        full = [torch.randn(rows, columns, device="cuda").bfloat16() * 0.02 for _ in range(copies)]
        return cls(
            full,
            [packed(fp8_rows(weight)) for weight in full],
            [packed(fp8_blocks(weight)) for weight in full],
        )


def in_16_bits(matrices: QuantizedMatrices, x: Tensor) -> Tensor:
    """The product that is taken where there is none in float8."""
    if len(x) > MOST_FUSED_ROWS:
        return gemm.linear(x, matrices.dense(x.dtype), None, GemmAlgorithms())
    return quantized_linear(x, matrices.parts[0])


def product_times(forms: Forms, x: Tensor) -> dict[str, float]:
    """us of each way to multiply x, the rounding of x not included, and of that alone."""
    sets = len(forms.full)
    rows, groups = quantize_rows(x, ROW), quantize_rows(x, BLOCK)
    ways: dict[str, Callable[[int], Any]] = {
        "bf16": lambda i: torch.nn.functional.linear(x, forms.full[i]),
        "rows": lambda i: forms.by_row[i].in_float8(rows),
        "blocks": lambda i: forms.by_block[i].in_float8(groups),
        "blocks in 16 bits": lambda i: in_16_bits(forms.by_block[i], x),
        "rounding rows": lambda i: quantize_rows(x, ROW),
        "rounding groups": lambda i: quantize_rows(x, BLOCK),
    }
    if not gemm_scaled.has_block_products(x.device):
        del ways["blocks"]
    return {name: graph_us(way, sets) for name, way in ways.items()}


def between_times(rows: int) -> dict[str, float]:
    """us of the norms and the activation function of a layer of so many rows."""
    x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
    residual, weight = torch.randn_like(x), torch.randn(HIDDEN, device="cuda").bfloat16()
    gate_up = torch.randn(rows, 2 * INNER, device="cuda").bfloat16()

    def apart(group: int, i: int) -> None:
        quantize_rows(norm.add_rms_norm(x, residual, weight, EPS)[0], group)
        quantize_rows(norm.add_rms_norm(x, residual, weight, EPS)[0], group)
        quantize_rows(activation.silu_mul(gate_up), group)

    def at_once(group: int, i: int) -> None:
        norm.add_rms_norm_quantized(x, residual, weight, EPS, group, False)
        norm.add_rms_norm_quantized(x, residual, weight, EPS, group, False)
        activation.silu_mul_quantized(gate_up, group)

    def plain(i: int) -> None:
        norm.add_rms_norm(x, residual, weight, EPS)
        norm.add_rms_norm(x, residual, weight, EPS)
        activation.silu_mul(gate_up)

    ways = {"no rounding": plain}
    for name, group in (("rows", ROW), ("groups", BLOCK)):
        ways[f"{name} apart"] = partial(apart, group)
        ways[f"{name} at once"] = partial(at_once, group)
    return {name: graph_us(way, 1) for name, way in ways.items()}


def _errors(forms: Forms, x: Tensor) -> Iterator[tuple[str, float]]:
    """Of products in float8, against float64 over the same rounded rows."""
    for name, matrices, group, rounded in (
        ("rows", forms.by_row[0], ROW, fp8_rows(forms.full[0])),
        ("blocks", forms.by_block[0], BLOCK, fp8_blocks(forms.full[0])),
    ):
        if matrices.input_group(len(x), x.dtype) != group:
            continue
        exact = as_rounded(x, group) @ rounded.dequantize().double().T
        out = matrices(x).double()
        yield name, float((out - exact).norm() / exact.norm())


def check_and_time() -> list[str]:
    """What is wrong; prints errors and a table of times."""
    wrong: list[str] = []
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability() == (9, 0) and not gemm_scaled.has_block_products(device):
        wrong.append("torch has no products of blocks on this GPU, which should have them")
    sums: dict[tuple[int, str], float] = {}
    for title, (n, k) in SIZES.items():
        torch.manual_seed(5)
        forms = Forms.make(n, k)
        for count in (*CROSSING, *ROWS):
            x = torch.randn(count, k, device="cuda").bfloat16()
            if count in ROWS:
                for name, error in _errors(forms, x):
                    print(f"{title} {n}x{k}, {count} rows, {name}: error {error:.2e}", flush=True)
                    if not error <= MOST_ERROR:
                        wrong.append(f"{title}, {count} rows, {name}: error {error:.2e}")
            times = product_times(forms, x)
            _print(f"{title} {n}x{k}, {count} rows", times)
            for name, us in times.items():
                sums[count, name] = sums.get((count, name), 0.0) + us
        del forms
        torch.cuda.empty_cache()
    for count in (*CROSSING, *ROWS):
        _print(
            f"all four, {count} rows", {name: us for (at, name), us in sums.items() if at == count}
        )
        _print(f"two norms and SiLU, {count} rows", between_times(count))
    return wrong


def _print(title: str, times: dict[str, float]) -> None:
    print(f"{title}, us: {', '.join(f'{name} {us:.1f}' for name, us in times.items())}", flush=True)
