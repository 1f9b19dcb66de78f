"""The instructions by which a GPU looks codes up in tables, which Triton's interpreter does not run:
computed here by NumPy, one after the other (ptx_numpy.py), in whole products too."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ops.ptx_numpy import inline_asm, run
from ops.triton_cases import error
from pagewire.worker.models.rounding import in_blocks
from pagewire_kernels import gemm_quantized, moe_quantized
from pagewire_kernels.cuda_quantized import CudaQuantized
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.lookup_tables import GAINS, ROW_TABLES, TABLES, named
from pagewire_kernels.quantized import Quantized, quantize
from pagewire_kernels.quantized_decode import DECODERS
from pagewire_kernels.table_lookup import LOOKUPS, PLANES, planes, table_of, tables_of, unit_of
from torch import Tensor
from triton.runtime import interpreter

CPU = torch.device("cpu")
TYPES = (torch.bfloat16, torch.float16)


def outputs_of(form: str, dtype: torch.dtype, word: int, registers: Tensor) -> list[int]:
    """The eight values of a word. registers int32."""
    inputs = [np.array([word], np.uint32), *registers.numpy().view(np.uint32)[:, None]]
    return [int(value[0]) for value in run(LOOKUPS[form, dtype], 8, inputs)]


def word_of(each: list[int]) -> int:
    """A word of eight codes: half of inputs, half of rows, pair, as pack_words has them."""
    packed = 0
    for i, code in enumerate(each):
        halves, rows, pair = i // 4, i // 2 % 2, i % 2
        packed |= code << 4 * (4 * rows + 2 * halves + pair)
    return packed


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("form", TABLES)
def test_instructions_look_up_every_code_at_every_place(form: str, dtype: torch.dtype) -> None:
    registers = planes(form, dtype, CPU)
    assert registers.shape == (PLANES, 32)
    values = (named(form, CPU) * GAINS[form]).to(dtype).view(torch.int16)
    for first in range(16):
        each = [(first + 5 * i) % 16 for i in range(8)]
        outputs = outputs_of(form, dtype, word_of(each), registers[:, 7].contiguous())
        assert outputs == [int(values[code]) & 0xFFFF for code in each]


@triton.jit
def _first_registers(table, out, BN: tl.constexpr, DT: tl.constexpr):
    """Of both rows of each thread: out [2, 2 * BN] has the first and the last one's planes."""
    both = tables_of(table, 1, BN, "row tables", DT, "any")
    at = out + tl.arange(0, 2 * BN)[:, None]
    for i in tl.static_range(8):
        tl.store(at + i * 2 * BN, both[0][i])
        tl.store(at + (8 + i) * 2 * BN, both[1][i])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_instructions_look_up_in_the_tables_of_both_rows(dtype: torch.dtype) -> None:
    tables = torch.randn(128, 16)
    registers = torch.empty(16, 128, dtype=torch.int32)
    kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    _first_registers[(1,)](tables, registers, 64, kind)
    values = tables.to(dtype).view(torch.int16)
    for thread in (0, 3, 4, 31, 32, 77, 127):
        row = 64 + thread // 32 * 16 + thread % 32 // 4
        each = [(thread + 3 * i) % 16 for i in range(8)]
        both = registers[:, thread].contiguous()
        outputs = outputs_of(ROW_TABLES, dtype, word_of(each), both)
        rows = [row + 8 * (i // 2 % 2) for i in range(8)]
        wanted = [int(values[r, code]) & 0xFFFF for r, code in zip(rows, each, strict=True)]
        assert outputs == wanted


def test_products_on_a_gpu_read_registers_and_undo_the_gain() -> None:
    """Without instructions, values are those of the table."""
    table = named("nf4", CPU)
    assert unit_of("nf4", "") == 1
    assert table_of(table, "nf4", "", torch.float32) is table
    for form in (*TABLES, "int4"):
        assert unit_of(form, "asm") == 1 / GAINS.get(form, 1)
    registers = table_of(table, "nf4", "asm", torch.float16)
    assert registers is planes("nf4", torch.float16, CPU)
    rows = torch.randn(64, 16)
    assert table_of(rows, ROW_TABLES, "asm", torch.bfloat16) is rows


def codes(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8)


def iq4(rows: int, columns: int) -> Quantized:
    scale = torch.randn(rows, columns // 32) * 1e-4
    return Quantized(codes(rows, columns), scale, table=named("iq4", CPU))


MAKE = {
    "int4": lambda n, k: quantize(torch.randn(n, k), 4, 64, whole_zeros=True),
    "nf4": lambda n, k: in_blocks(torch.randn(n, k), "nf4"),
    "fp4": lambda n, k: in_blocks(torch.randn(n, k), "fp4"),
    "iq4": iq4,
    ROW_TABLES: lambda n, k: Quantized(
        codes(n, k), torch.ones(n, 1), table=torch.randn(n, 16).half().float()
    ),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """Triton's interpreter runs the instructions, for float16: it computes with no bfloat16."""

    def asm_of(form: str, dtype: torch.dtype, device: torch.device) -> str:
        return DECODERS[form, dtype]

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", inline_asm)
    for module in (gemm_quantized, moe_quantized):
        monkeypatch.setattr(module, "asm_of", asm_of)


@pytest.mark.parametrize("tokens", [3, 40, 100])
@pytest.mark.parametrize("form", MAKE)
def test_products_by_instructions(form: str, tokens: int, as_on_a_gpu) -> None:
    """Of two tiles and several steps, with splits, against the dequantized weights in float16."""
    torch.manual_seed(4)
    part = MAKE[form](128, 512)
    matrices = CudaQuantized(KernelChoices()).pack([part], False)
    assert matrices is not None
    if part.table is not None:
        assert torch.equal(matrices.dense(torch.float16), part.dequantize().half())
    x = torch.randn(tokens, 512).half()
    exact = x.double() @ part.dequantize().double().T
    rounded = x.double() @ part.dequantize().half().double().T
    # single weights of iq4 are scaled by a multiply-add, which NumPy rounds twice
    most = 1.3 if form == "iq4" else 1.05
    assert error(matrices(x), exact) < most * error(rounded.half(), exact)


@pytest.mark.parametrize("form", MAKE)
def test_experts_by_instructions(form: str, as_on_a_gpu) -> None:
    torch.manual_seed(5)
    ops = CudaQuantized(KernelChoices())
    packed = []
    full = []
    for halves in (2, 1):
        parts = [[MAKE[form](128, 128) for _ in range(halves)] for _ in range(2)]
        packed.append(ops.pack_experts(parts))
        full.append([torch.cat([part.dequantize() for part in each]).double() for each in parts])
    x = torch.randn(3, 128).half()
    ids = torch.tensor([[0], [1], [0]], dtype=torch.int32)
    out = moe_quantized.experts(x, packed[0], packed[1], ids, torch.ones(3, 1))
    for row, expert in enumerate((0, 1, 0)):
        gate, up = (full[0][expert] @ x[row].double()).chunk(2)
        exact = full[1][expert] @ (torch.nn.functional.silu(gate) * up)
        assert error(out[row], exact) < 2e-3
