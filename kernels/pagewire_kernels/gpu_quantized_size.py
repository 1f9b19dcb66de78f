"""What quantized matrices take on a GPU (cuda_quantized.py), reckoned without one: which can be
packed, and into how many bytes. Imports no kernel, so that memory is planned before any is needed.
"""

from typing import Final

PADDING: Final = 128
"""Rows are filled up to a multiple: the largest tile."""
COLUMNS: Final = 64
"""Columns must be a multiple."""
GROUPS: Final = (128, 64, 32, 16)
"""Inputs that may share a scale, other than all of them; larger groups are cut."""
SCALES: Final = 4
"""Bytes of a scale with its zero point, and of a scale a row."""
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
}
"""Of a weight of these types, with its share of scales."""
IN_FLIGHT: Final = {"awq": 0.5625, "fp8": 1.002, "bitsandbytes_8bit": 1.002, "int4": 0.625}
"""Of a weight that is rounded while it is loaded, at most; LARGEST where it is not listed."""
LARGEST: Final = 1.125


def fitting_group(group: int) -> int:
    """The largest of GROUPS that divides it, 0: none."""
    return next((size for size in GROUPS if group % size == 0), 0)


def fits(columns: int, group: int) -> bool:
    """Whether a matrix of so many columns, in groups of this size, can be packed."""
    return columns % COLUMNS == 0 and (group == columns or fitting_group(group) > 0)


def packed_bytes(rows: int, columns: int, group: int, bits: int, minima: bool) -> int:
    """What a matrix takes once it is packed. minima: codes may have a zero point."""
    padded = -(-rows // PADDING) * PADDING
    codes = padded * columns if bits > FOUR_BITS else padded * columns // 2
    if group == columns and bits > FOUR_BITS and not minima:
        return codes + SCALES * padded
    return codes + SCALES * padded * (columns // (fitting_group(group) or group))


def block_scale_bytes(rows: int, columns: int, group: int) -> int:
    """What the scales of 128 x 128 blocks take beside, at most: for products in float8."""
    return SCALES * -(-rows // BLOCK) * (columns // BLOCK) if group == BLOCK else 0


def scratch_bytes(elements: int) -> int:
    """What dequantizing a matrix of so many elements takes, beside the matrices."""
    return 2 * elements if elements <= LARGEST_DENSE else 0
