"""Codes of 4 bits looked up in tables of 16 values of 16 bits, in registers: a table is two planes
of bytes, four registers each, and `prmt` takes four bytes out of two registers by four codes. So of
four codes each plane takes two lookups and a choice between them, and two more instructions put the
bytes of both planes together.

Tables are read into registers before the first step.
"""

# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Values inside a kernel have types that only Triton's compiler knows.

import functools
from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lookup_tables import ENTRIES, GAINS, ROW_TABLES, TABLES

PLANES: Final = 8
"""Registers of a table: low bytes of the values 0 to 3, of 4 to 7 and so on, then high bytes."""

LANES: Final = 32


@functools.cache
def planes(form: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A named table's registers, int32 [PLANES, LANES]. Each thread of a warp reads its own: numbers
    in the code, or that are the same for all threads, would be moved before every lookup."""
    values = torch.tensor(TABLES[form], dtype=torch.float32) * GAINS[form]
    both = values.to(dtype).view(torch.uint8).view(ENTRIES, 2)
    return both.t().contiguous().view(torch.int32).view(PLANES, 1).repeat(1, LANES).to(device)


def _lookup(first: Sequence[str], second: Sequence[str]) -> str:
    """PTX for a word of eight codes: `first` are the registers of the table of its low half, a row,
    `second` those of its high half, the row eight rows further."""
    lines = ["{", ".reg .b32 t<8>;"]
    lines += ["and.b32 t0, $8, 0x77777777;", "shr.u32 t1, t0, 16;", "shr.u32 t2, $8, 1;"]
    # which of two lookups: bytes 0 to 3 of the first, or 4 to 7 of the second
    lines += ["lop3.b32 t2, t2, 0x44444444, 0x32103210, 0xea;", "shr.u32 t3, t2, 16;"]
    for half, table in enumerate((first, second)):
        for plane in range(2):
            a, b, c, d = table[4 * plane : 4 * plane + 4]
            lines += [f"prmt.b32 t4, {a}, {b}, t{half};", f"prmt.b32 t5, {c}, {d}, t{half};"]
            lines += [f"prmt.b32 t{6 + plane}, t4, t5, t{2 + half};"]
        lines += ["prmt.b32 t4, t6, t7, 0x5140;", "prmt.b32 t5, t6, t7, 0x7362;"]
        # outputs: half of inputs, half of rows, pair
        for i in range(2):
            at = 4 * i + 2 * half
            lines += [f"mov.b32 {{${at}, ${at + 1}}}, t{4 + i};"]
    return "\n".join([*lines, "}"])


def _operands(first: int) -> list[str]:
    return [f"${i}" for i in range(first, first + PLANES)]


LOOKUPS: Final[dict[tuple[str, torch.dtype], str]] = {
    (form, dtype): _lookup(_operands(9), _operands(9 + PLANES if form == ROW_TABLES else 9))
    for form in (*TABLES, ROW_TABLES)
    for dtype in (torch.bfloat16, torch.float16)
}
"""PTX that turns a word and the registers of its table, or of both its rows' tables, into eight
values."""


def table_of(table: Tensor | None, form: str, asm: str, dtype: torch.dtype) -> Tensor | None:
    """What a product's kernel reads: the table, or where it `asm` decodes a named one its
    registers."""
    if table is None or not asm or form == ROW_TABLES:
        return table
    return planes(form, dtype, table.device)


def unit_of(form: str, asm: str) -> float:
    """By what sums of products are multiplied, for the gain of a table's values."""
    return 1 / GAINS[form] if asm and form in GAINS else 1.0


@triton.jit
def _value_bits(table, row, ENTRY: tl.constexpr, DT: tl.constexpr):
    """The bits of an entry of each row's table, int32."""
    value = tl.load(table + row.to(tl.int64) * 16 + ENTRY).to(DT)
    return value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _both_planes(table, row, FIRST: tl.constexpr, DT: tl.constexpr):
    """Low bytes and high bytes of four entries of each row's table [rows, 1]."""
    a = _value_bits(table, row, FIRST, DT)
    b = _value_bits(table, row, FIRST + 1, DT)
    c = _value_bits(table, row, FIRST + 2, DT)
    d = _value_bits(table, row, FIRST + 3, DT)
    low = (a & 0xFF) | (b & 0xFF) << 8 | (c & 0xFF) << 16 | d << 24
    high = a >> 8 | (b >> 8) << 8 | (c >> 8) << 16 | (d >> 8) << 24
    return low[:, None], high[:, None]


@triton.jit
def _registers(table, row, DT: tl.constexpr):
    l0, h0 = _both_planes(table, row, 0, DT)
    l1, h1 = _both_planes(table, row, 4, DT)
    l2, h2 = _both_planes(table, row, 8, DT)
    l3, h3 = _both_planes(table, row, 12, DT)
    return l0, l1, l2, l3, h0, h1, h2, h3


@triton.jit
def tables_of(
    table, tile, BN: tl.constexpr, FORM: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr
):
    """What decode takes. table: where the float32 tables of rows [NP, 16] lie, or the `planes` of one
    for all."""
    thread = tl.arange(0, 2 * BN)
    if ASM == "":
        return table
    elif FORM == "row tables":
        row = tile * BN + thread // 32 * 16 + thread % 32 // 4
        return _registers(table, row, DT), _registers(table, row + 8, DT)
    else:
        at = table + thread % 32
        return (
            tl.load(at)[:, None], tl.load(at + 32)[:, None], tl.load(at + 64)[:, None], tl.load(at + 96)[:, None],
            tl.load(at + 128)[:, None], tl.load(at + 160)[:, None], tl.load(at + 192)[:, None], tl.load(at + 224)[:, None],
        )  # fmt: skip


@triton.jit
def looked_up(words, tables, FORM: tl.constexpr, ASM: tl.constexpr):
    """words int32 [threads, words] -> the bits of eight values of each, int16, as eight tensors: half
    of inputs, half of rows, pair. tables: of tables_of."""
    if FORM == "row tables":
        f = tables[0]
        s = tables[1]
        return tl.inline_asm_elementwise(
            ASM,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [words, f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]],
            dtype=(tl.int16,) * 8,
            is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        t = tables
        return tl.inline_asm_elementwise(
            ASM,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r",
            [words, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]],
            dtype=(tl.int16,) * 8,
            is_pure=True,
            pack=1,
        )
