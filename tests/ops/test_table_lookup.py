"""Codes of 4 bits looked up in tables, as bitsandbytes', SqueezeLLM's and two of GGUF's types are: in
Triton's interpreter against the dequantized weights."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ops.moe_cases import MoeCase, moe_case
from ops.triton_cases import error
from pagewire.worker.load.gguf_quantized import in_file
from pagewire.worker.models.rounding import in_blocks
from pagewire_kernels import cuda_quantized, gpu_quantized_size, moe_quantized
from pagewire_kernels.cuda_quantized import CudaQuantized, QuantizedMatrices
from pagewire_kernels.gemm_quantized import quantized_linear
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.lookup_tables import GAINS, IQ4, ROW_TABLES, TABLES, named
from pagewire_kernels.quantized import Quantized
from pagewire_kernels.quantized_shapes import QuantizedConfig
from torch import Tensor

CPU = torch.device("cpu")
TYPES = (torch.bfloat16, torch.float16)


def weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * 0.02


def codes(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8)


def iq4(rows: int, columns: int) -> Quantized:
    """Scales with more digits than float16, as IQ4_XS's, and of both signs."""
    scale = torch.randn(rows, columns // 32) * 1e-4
    return Quantized(codes(rows, columns), scale, table=named("iq4", CPU))


def row_tables(rows: int, columns: int) -> Quantized:
    return Quantized(codes(rows, columns), torch.ones(rows, 1), table=weight(rows, 16))


def wide_blocks(rows: int, columns: int) -> Quantized:
    return Quantized(
        codes(rows, columns), torch.rand(rows, columns // 128) * 0.1, table=named("nf4", CPU)
    )


MAKE: dict[str, Callable[[int, int], Quantized]] = {
    "nf4": lambda n, k: in_blocks(weight(n, k), "nf4"),
    "nf4, blocks of 128": wide_blocks,
    "fp4": lambda n, k: in_blocks(weight(n, k), "fp4"),
    "iq4": iq4,
    ROW_TABLES: row_tables,
}


def pack(*parts: Quantized) -> QuantizedMatrices:
    matrices = CudaQuantized(KernelChoices()).pack(parts, False)
    assert matrices is not None
    return matrices


@pytest.mark.parametrize(("rows", "columns"), [(64, 256), (70, 192), (48, 128)])
@pytest.mark.parametrize("form", MAKE)
def test_dequantized_weights_are_those_of_the_library_rounded_once(
    form: str, rows: int, columns: int
) -> None:
    """Bit for bit what would be held in full."""
    if columns % 128 and "128" in form:
        columns = 256
    torch.manual_seed(1)
    part = MAKE[form](rows, columns)
    for dtype in (*TYPES, torch.float32):
        assert torch.equal(pack(part).dense(dtype), part.dequantize().to(dtype))
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(pack(part).embed(ids), part.dequantize()[ids])


@pytest.mark.parametrize("form", MAKE)
def test_products_are_those_of_the_dequantized_weights(form: str, monkeypatch) -> None:
    torch.manual_seed(2)
    parts = [MAKE[form](70, 256), MAKE[form](20, 256)]
    matrices = pack(*parts)
    assert len(matrices.parts) == 1
    assert not matrices.takes_row
    full = torch.cat([part.dequantize() for part in parts])
    bias = torch.randn(len(full))
    for tokens in (1, 3, 40, 130):
        x = torch.randn(tokens, 256)
        exact = x.double() @ full.double().T + bias.double()
        assert error(matrices(x, bias), exact) <= 2e-6
        monkeypatch.setattr(cuda_quantized, "MOST_FUSED_ROWS", 0)
        assert error(matrices(x, bias), exact) <= 2e-6
        monkeypatch.undo()


@pytest.mark.parametrize("form", MAKE)
@pytest.mark.parametrize("late", [False, True])
def test_splits_and_steps_of_several_groups(form: str, late: bool) -> None:
    torch.manual_seed(3)
    part = MAKE[form](128, 512)
    (matrix,) = pack(part).parts
    x = torch.randn(20, 512)
    config = QuantizedConfig(16, 64, 128, 3, 4, 2, late=late and matrix.group == 64)
    out = quantized_linear(x, matrix, config=config)
    assert error(out, x.double() @ part.dequantize().double().T) < 2e-6


def test_forms_side_by_side() -> None:
    """Each form is a matrix of its own, in order."""
    torch.manual_seed(4)
    parts = [MAKE[form](64, 128) for form in ("nf4", "fp4", "iq4", ROW_TABLES)]
    matrices = pack(*parts)
    assert [matrix.form for matrix in matrices.parts] == ["nf4", "fp4", "iq4", ROW_TABLES]
    x = torch.randn(3, 128)
    full = torch.cat([part.dequantize() for part in parts])
    assert error(matrices(x), x.double() @ full.double().T) < 2e-6


@pytest.mark.parametrize(("kind", "size", "blocks"), [("IQ4_NL", 18, 8), ("IQ4_XS", 136, 1)])
def test_blocks_of_gguf(kind: str, size: int, blocks: int) -> None:
    """What a file's blocks are dequantized to, rounded once."""
    rows = np.random.default_rng(3).integers(0, 256, (64, blocks, size), dtype=np.uint8)
    rows[:, :, :2] = np.array([0.0123], np.float16).view(np.uint8)
    matrix = in_file(kind, rows.reshape(64, -1), size).to("cpu")
    assert torch.equal(pack(matrix).dense(torch.bfloat16), matrix.dequantize().bfloat16())


def test_tables_that_no_kernel_knows_are_not_packed() -> None:
    ops = CudaQuantized(KernelChoices())
    other = Quantized(codes(64, 128), torch.ones(64, 2), table=torch.randn(16))
    assert ops.pack([other], False) is None
    assert ops.pack_experts([[other]]) is None
    # groups of 32 of a table that is rounded
    small = Quantized(codes(64, 128), torch.ones(64, 4), table=named("nf4", CPU))
    assert ops.pack([small], False) is None
    assert ops.pack([MAKE["nf4"](64, 64), MAKE[ROW_TABLES](64, 64)], False) is not None


@pytest.mark.parametrize("form", MAKE)
@pytest.mark.parametrize("rows", [64, 200])
def test_bytes_are_known_before(form: str, rows: int) -> None:
    torch.manual_seed(5)
    part = MAKE[form](rows, 256)
    packed = pack(part)
    planned = gpu_quantized_size.packed_bytes(
        rows, 256, part.group, part.bits, False, packed.parts[0].form
    )
    assert packed.nbytes == planned


@pytest.mark.parametrize("form", MAKE)
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_ranks(form: str, dim: int) -> None:
    torch.manual_seed(6)
    whole = MAKE[form](128, 384)
    full = whole.dequantize()
    length = whole.shape[dim] // 2
    for start in (0, length):
        part = whole.narrow(dim, start, length)
        assert torch.equal(part.dequantize(), full.narrow(dim, start, length))
        assert torch.equal(pack(part).dense(torch.float32), full.narrow(dim, start, length))


@pytest.mark.parametrize("form", MAKE)
@pytest.mark.parametrize("tokens", [1, 20, 150])
def test_experts(form: str, tokens: int) -> None:
    torch.manual_seed(7)
    experts, hidden, inner = 4, 128, 128
    mixture = moe_case(tokens, experts, 2, hidden, inner)
    ops = CudaQuantized(KernelChoices())
    packed = []
    full = []
    for halves, n, k in ((2, inner, hidden), (1, hidden, inner)):
        parts = [[MAKE[form](n, k) for _ in range(halves)] for _ in range(experts)]
        stacked = ops.pack_experts(parts)
        assert stacked is not None
        packed.append(stacked)
        full.append(torch.stack([torch.cat([p.dequantize() for p in each]) for each in parts]))
    ids, shares = mixture.top_k_ids, mixture.top_k_weights
    exact = MoeCase(mixture.x, full[0], full[1], ids, shares).exact()
    out = moe_quantized.experts(mixture.x, packed[0], packed[1], ids, shares)
    assert error(out, exact) < 1e-5


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("form", TABLES)
def test_rounded_tables_cost_less_than_rounded_weights(form: str, dtype: torch.dtype) -> None:
    """A product's weights are a table's values in 16 bits times a scale in float32."""
    torch.manual_seed(8)
    part = MAKE[form](512, 512)
    assert part.table is not None
    full = part.dequantize()
    rounded = (part.table * GAINS[form]).to(dtype).float() / GAINS[form]
    ours = Quantized(part.codes, part.scale, table=rounded).dequantize()
    most = 0.65 if form == "nf4" else 1e-3
    assert error(ours, full.double()) < most * error(full.to(dtype), full.double())


def test_the_table_of_iq4_is_exact_in_16_bits() -> None:
    """Its scales are of groups smaller than a step, so that single weights are scaled."""
    values = torch.tensor(IQ4, dtype=torch.float32)
    for dtype in TYPES:
        assert torch.equal(values.to(dtype).float(), values)
