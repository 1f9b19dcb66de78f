"""What quantized matrices take on a GPU (cuda_quantized.py), reckoned without one: which can be
packed, and into how many bytes. Imports no kernel, so that memory is planned before any is needed.
"""

from typing import Final

from .lookup_tables import ENTRIES, ROW_TABLES

PADDING: Final = 128
"""Rows are filled up to a multiple: the largest tile."""
COLUMNS: Final = 64
"""Columns must be a multiple."""
GROUPS: Final = (128, 64, 32, 16)
"""Inputs that may share a scale, other than all of them; larger groups are cut."""
TABLE_GROUPS: Final = {"nf4": 64, "fp4": 64, "iq4": 32}
"""Inputs that share a scale in matrices with tables of these names; larger groups are cut."""
SCALES: Final = 4
"""Bytes of a scale with its zero point, of one beside a table, and of a scale a row."""
TABLE_BYTES: Final = 4 * ENTRIES
"""Of a row's table."""
FOUR_BITS: Final = 4
BLOCK: Final = 128
"""Rows and columns of a block that has a scale."""
LARGEST_DENSE: Final = 1 << 28
"""Elements of a matrix that is dequantized at a time; a larger one, a head, is read by the kernels
whatever the number of rows."""
GGUF_BYTES: Final = {
    "Q4_0": 0.625,
    "Q4_1": 0.625,
    "Q4_K": 0.625,
    "Q5_0": 1.125,
    "Q5_1": 1.125,
    "Q5_K": 1.125,
    "Q6_K": 1.25,
    "Q8_0": 1.125,
    "IQ4_NL": 0.625,
    "IQ4_XS": 0.625,
}
"""Of a weight of these types, with its share of scales."""
IN_FLIGHT: Final = {
    "awq": 0.5625,
    "bitsandbytes": 0.5625,
    "fp8": 1.002,
    "bitsandbytes_8bit": 1.002,
    "int4": 0.625,
}
"""Of a weight that is rounded while it is loaded, at most; LARGEST where it is not listed."""
LARGEST: Final = 1.125


def fitting_group(group: int, table: str = "") -> int:
    """The largest number of inputs that may share a scale and divides `group`, 0: none. table: the
    name of the table that codes are looked up in."""
    sizes = GROUPS
    if table:
        sizes = (TABLE_GROUPS[table],) if table in TABLE_GROUPS else ()
    return next((size for size in sizes if group % size == 0), 0)


def fits(columns: int, group: int, table: str = "") -> bool:
    """Whether a matrix of so many columns, in groups of this size, can be packed."""
    by_row = group == columns and (not table or table == ROW_TABLES)
    return columns % COLUMNS == 0 and (by_row or fitting_group(group, table) > 0)


def packed_bytes(
    rows: int, columns: int, group: int, bits: int, minima: bool, table: str = ""
) -> int:
    """What a matrix takes once it is packed. minima: codes may have a zero point."""
    padded = -(-rows // PADDING) * PADDING
    codes = padded * columns if bits > FOUR_BITS else padded * columns // 2
    if table == ROW_TABLES:
        return codes + (SCALES + TABLE_BYTES) * padded
    if group == columns and bits > FOUR_BITS and not minima:
        return codes + SCALES * padded
    return codes + SCALES * padded * (columns // (fitting_group(group, table) or group))


def block_scale_bytes(rows: int, columns: int, group: int) -> int:
    """What the scales of 128 x 128 blocks take beside, at most: for products in float8."""
    return SCALES * -(-rows // BLOCK) * (columns // BLOCK) if group == BLOCK else 0


def scratch_bytes(elements: int) -> int:
    """What dequantizing a matrix of so many elements takes, beside the matrices."""
    return 2 * elements if elements <= LARGEST_DENSE else 0
