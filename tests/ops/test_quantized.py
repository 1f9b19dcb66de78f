"""Quantized weights on a CPU: what is packed comes back as it was, and machine code computes what
torch does in float64."""

import math

import pytest
import torch
from pagewire_kernels import cpu, cpu_native
from pagewire_kernels.cpu_linear import QuantizedLinear
from pagewire_kernels.cpu_panels import FORMATS, Format, choose_format
from pagewire_kernels.quantized import Quantized, quantize

ROWS = (0, 1, 2, 3, 5, 8, 11, 33)
BY_FORMAT = pytest.mark.parametrize("form", FORMATS, ids=str)


@pytest.fixture(autouse=True)
def _seeded(tmp_path_factory):
    cpu_native.keep_in(tmp_path_factory.getbasetemp() / "native")
    torch.manual_seed(0)


def random_weight(form: Format, rows: int, columns: int) -> Quantized:
    """Scales of 11 bits, or of 17 as those of GGUF's superblocks; either way products with codes
    are exact in float32."""
    low, high, kind = (
        (0, 16, torch.uint8)
        if form.bits == 4
        else (0, 32, torch.int8)
        if form.minima
        else (-128, 128, torch.int8)
    )
    codes = torch.randint(low, high, (rows, columns)).to(kind)
    scale, minimum = torch.randn(2, rows, columns // form.group).half().float()
    if not form.half:
        scale, minimum = (
            scale * torch.randint(1, 64, scale.shape),
            minimum * torch.randint(1, 64, scale.shape),
        )
    return Quantized(codes, scale, minimum if form.minima else None)


def far(ours: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    wanted = x.double() @ weight.double().T
    assert ours.shape == wanted.shape
    return float((ours.double() - wanted).norm() / wanted.norm()) if len(x) else 0.0


@BY_FORMAT
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (37, 96), (640, 576)])
def test_each_format_holds_and_multiplies_exactly(form, rows, columns):
    weight = random_weight(form, rows, columns)
    assert choose_format(weight, half=True) == form or not form.half
    packed, full = QuantizedLinear([weight]), weight.dequantize()
    ids = torch.randint(0, rows, (9,))
    assert torch.equal(packed.embed(ids), full[ids])
    assert torch.equal(packed.transposed(torch.float32), full.T)
    assert torch.equal(packed.transposed(torch.bfloat16), full.T.bfloat16())
    for count in ROWS:
        x = torch.randn(count, columns)
        assert far(packed.native(x), x, full) < 1e-6
        assert far(packed.dense(x), x, full) < 1e-6


def test_several_matrices_side_by_side_and_their_rows_alone():
    """What a row gives does not depend on the rows beside it."""
    parts = [
        random_weight(FORMATS[0], 32, 64),
        random_weight(FORMATS[-1], 16, 64),
        random_weight(FORMATS[2], 5, 64),
    ]
    packed, x, bias = cpu.OPS.quantized.pack(parts, False), torch.randn(7, 64), torch.randn(53)
    full = torch.cat([part.dequantize() for part in parts])
    assert packed.shape == (53, 64) and far(cpu.linear(x, packed), x, full) < 1e-6
    assert far(cpu.linear(x, packed, bias) - bias, x, full) < 1e-6
    assert cpu.linear(x.bfloat16(), packed).dtype == torch.bfloat16
    assert cpu.OPS.quantized.pack(parts[2:], True)(x.bfloat16()).dtype == torch.float32
    assert far(packed.native(x[3:4]), x[3:4], full) < 1e-6


def test_shapes_without_a_kernel():
    narrow = Quantized(torch.zeros(16, 48, dtype=torch.int8), torch.ones(16, 1))
    assert cpu.OPS.quantized.pack([narrow], False) is None
    uneven = [random_weight(FORMATS[0], 17, 64), random_weight(FORMATS[0], 16, 64)]
    assert cpu.OPS.quantized.pack(uneven, False) is None
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    tables = Quantized(codes, torch.ones(16, 2), table=torch.ones(16))
    assert cpu.OPS.quantized.pack([tables], False) is None


@pytest.mark.parametrize(("bits", "steps"), [(8, 254), (4, 15)])
def test_rounding_is_to_the_nearest_code(bits, steps):
    weight = torch.randn(48, 128)
    weight[3] = 0
    found = quantize(weight, bits)
    grouped = weight.view(48, -1, 32)
    span = 2 * grouped.abs().amax(-1) if bits == 8 else grouped.amax(-1) - grouped.amin(-1)
    worst = (found.dequantize() - weight).view(48, -1, 32).abs().amax(-1)
    assert (
        found.bits == bits
        and (worst <= span / steps / 2 * 1.02 + 1e-3 * grouped.abs().amax(-1)).all()
    )
    assert torch.equal(found.dequantize()[3], weight[3])


def test_the_exponential_of_machine_code():
    from numba import cfunc, types
    from pagewire_kernels.cpu_heads import exponential

    native = cfunc(types.float32(types.float32))(exponential.py_func).ctypes
    for x in (-200.0, -87.0, -30.5, -1.0, -0.3, 0.0, 0.7, 5.0, 60.0):
        assert native(x) == pytest.approx(math.exp(max(x, -87.0)), rel=max(5e-7, abs(x) * 1e-7))
