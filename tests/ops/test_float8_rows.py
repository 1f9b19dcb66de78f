"""Rows of activations as float8, in Triton's interpreter: by a launch of their own, and from the norms
and activation functions before, which must give the same bits."""

import pytest
import torch
from pagewire_kernels import activation, float8_rows
from pagewire_kernels.activation import (
    gelu_mul,
    gelu_mul_quantized,
    silu_mul,
    silu_mul_quantized,
)
from pagewire_kernels.float8_rows import quantize_rows
from pagewire_kernels.norm import (
    add_rms_norm,
    add_rms_norm_quantized,
    rms_norm,
    rms_norm_quantized,
)
from pagewire_kernels.quantized_decode import PERMUTED
from pagewire_kernels.quantized_rows import ROW, QuantizedRows, full_rows

TYPES = [torch.bfloat16, torch.float16, torch.float32]


def in_order(codes: torch.Tensor) -> torch.Tensor:
    """codes [T, K] by input -> bytes by place."""
    by_span = codes.view(torch.uint8).view(len(codes), -1, 64)
    return by_span[:, :, list(PERMUTED)].reshape(codes.shape)


def assert_same(rows: QuantizedRows, wanted: QuantizedRows) -> None:
    count = len(wanted)
    assert (len(rows), rows.group, rows.dtype) == (count, wanted.group, wanted.dtype)
    assert rows.codes.shape == wanted.codes.shape
    assert rows.scales.stride() == wanted.scales.stride()
    assert torch.equal(rows.scales[:count], wanted.scales[:count])
    ours, theirs = rows.codes[:count], wanted.codes[:count]
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("columns", [64, 192, 4096])
def test_rows_are_rounded_with_a_scale_each(columns: int) -> None:
    """In the order of the weights' inputs, so that products know nothing of it."""
    torch.manual_seed(8)
    wide = torch.randn(5, 2 * columns)
    x = wide[:, :columns] * torch.tensor([1e-6, 1.0, 3e4, 0.0, 1.0])[:, None]
    rows = quantize_rows(x)
    most = x.abs().amax(1, keepdim=True)
    wanted = torch.where(most > 0, most / 448, 1.0)
    assert torch.equal(rows.scales, wanted)
    rounded = (x / wanted).to(torch.float8_e4m3fn)
    assert torch.equal(rows.codes.view(torch.uint8), in_order(rounded))


@pytest.mark.parametrize("columns", [128, 640, 4224])
def test_groups_are_rounded_with_a_scale_each(columns: int) -> None:
    torch.manual_seed(8)
    x = torch.randn(5, 2 * columns)[:, :columns] * torch.logspace(-6, 4, columns)
    x[1, :128] = 0
    rows = quantize_rows(x, 128)
    groups = x.reshape(5, -1, 128)
    most = groups.abs().amax(2)
    wanted = torch.where(most > 0, most / 448, 1.0)
    assert torch.equal(rows.scales[:5], wanted)
    rounded = (groups / wanted[:, :, None]).to(torch.float8_e4m3fn).reshape(5, columns)
    assert torch.equal(rows.codes[:5].view(torch.uint8), in_order(rounded))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("width", "group"), [(64, ROW), (320, ROW), (128, 128), (640, 128)])
def test_a_norm_gives_the_codes_of_its_result(width: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(21)
    x = (torch.randn(6, 2 * width) * 3).to(dtype)[:, :width]
    residual = torch.randn(6, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    normed = rms_norm(x, weight, 1e-5)
    rows = rms_norm_quantized(x, weight, 1e-5, group, keep=False)
    assert_same(rows, quantize_rows(normed, group))
    assert rows.full is None
    assert torch.equal(full_rows(rms_norm_quantized(x, weight, 1e-5, group, keep=True)), normed)
    total = residual.clone()
    normed, _ = add_rms_norm(x, total, weight, 1e-5)
    rows, summed = add_rms_norm_quantized(x, residual, weight, 1e-5, group, keep=True)
    assert_same(rows, quantize_rows(normed, group))
    assert torch.equal(full_rows(rows), normed)
    assert torch.equal(summed, total)
    assert summed is residual


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("width", "group"), [(192, ROW), (640, 128), (2432, 128)])
def test_an_activation_gives_the_codes_of_its_result(
    width: int, group: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(22)
    gate_up = (torch.randn(5, 2 * width) * 3).to(dtype)
    assert_same(silu_mul_quantized(gate_up, group), quantize_rows(silu_mul(gate_up), group))
    assert_same(gelu_mul_quantized(gate_up, group), quantize_rows(gelu_mul(gate_up), group))


def test_rows_that_are_too_wide_for_one_kernel_take_two(monkeypatch) -> None:
    monkeypatch.setattr(activation, "WIDEST", 128)
    gate_up = torch.randn(3, 384)
    assert_same(silu_mul_quantized(gate_up, ROW), quantize_rows(silu_mul(gate_up)))


def test_no_rows() -> None:
    nothing = torch.empty(0, 512)
    for group in (ROW, 128):
        assert len(quantize_rows(nothing, group)) == 0
        assert len(rms_norm_quantized(nothing, torch.ones(512), 1e-5, group, True)) == 0
        assert len(silu_mul_quantized(nothing, group)) == 0


def test_what_was_not_kept_in_full_is_not_read_so() -> None:
    rows = float8_rows.quantize_rows(torch.randn(2, 64))
    with pytest.raises(AssertionError, match="only float8"):
        full_rows(rows)
