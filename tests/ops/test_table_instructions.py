"""The instructions by which a GPU looks codes up in tables, which Triton's interpreter does not run:
computed here, one after the other."""

import re

import pytest
import torch
import triton
import triton.language as tl
from pagewire_kernels.lookup_tables import GAINS, ROW_TABLES, TABLES, named
from pagewire_kernels.table_lookup import LOOKUPS, PLANES, planes, table_of, tables_of, unit_of
from torch import Tensor

CPU = torch.device("cpu")
TYPES = (torch.bfloat16, torch.float16)


def prmt(a: int, b: int, selector: int) -> int:
    """PTX's byte permute in its default mode."""
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        chosen.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


def run(ptx: str, inputs: list[int]) -> list[int]:
    """The eight outputs of `ptx`, of 16 bits, for inputs $8 and on."""
    values = {f"${8 + i}": value for i, value in enumerate(inputs)}

    def read(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    for line in ptx.splitlines():
        operation, _, rest = line.strip().rstrip(";").partition(" ")
        names = re.findall(r"[$\w]+", rest)
        match operation:
            case "and.b32":
                values[names[0]] = read(names[1]) & read(names[2])
            case "shr.u32":
                values[names[0]] = read(names[1]) >> read(names[2])
            case "lop3.b32":
                assert names[4] == "0xea"
                values[names[0]] = read(names[1]) & read(names[2]) | read(names[3])
            case "prmt.b32":
                values[names[0]] = prmt(read(names[1]), read(names[2]), read(names[3]))
            case "mov.b32":
                values[names[0]] = read(names[2]) & 0xFFFF
                values[names[1]] = read(names[2]) >> 16
            case _:
                assert operation in ("{", "}", ".reg")
    return [values[f"${i}"] for i in range(8)]


def unsigned(registers: Tensor) -> list[int]:
    return [int(value) & 0xFFFFFFFF for value in registers]


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
        outputs = run(LOOKUPS[form, dtype], [word_of(each), *unsigned(registers[:, 7])])
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
        inputs = [word_of(each), *unsigned(registers[:, thread])]
        outputs = run(LOOKUPS[ROW_TABLES, dtype], inputs)
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
