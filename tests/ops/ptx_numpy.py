"""A few of PTX's instructions for NumPy, so that what a kernel says in them can be computed without a
GPU, by Triton's interpreter too."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from triton.runtime import interpreter

Words = np.ndarray
"""uint32, of any shape."""


def prmt(a: Words, b: Words, selector: Words) -> Words:
    """The byte permute in its default mode: each nibble of the lowest four of `selector` takes a byte
    of a (0 to 3) or b (4 to 7), or, with its highest bit, the sign of that byte, eight times."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(both)
    for i in range(4):
        nibble = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        signs = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(nibble & np.uint64(8), signs, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def run(ptx: str, outputs: int, inputs: Sequence[Words]) -> list[Words]:
    """$0 to $(outputs - 1) of `ptx`, whose inputs follow them; of 16 bits where it takes words
    apart."""
    values: dict[str, Words] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def read(name: str) -> Words:
        return values[name] if name in values else np.uint32(int(name, 0))

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
                values[names[0]] = prmt(*(np.asarray(read(name)) for name in names[1:]))
            case "mov.b32" if len(names) == 3:
                values[names[0]] = read(names[2]) & np.uint32(0xFFFF)
                values[names[1]] = read(names[2]) >> np.uint32(16)
            case "mov.b32":
                values[names[0]] = read(names[1])
            case _:
                assert operation in ("{", "}", ".reg"), operation
    return [values[f"${i}"] for i in range(outputs)]


class _Results:
    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, number: int) -> Any:
        return self._handles[number]


def inline_asm(
    builder: Any, ptx: str, constraints: str, values: list[Any], types: Any, pure: bool, pack: int
) -> _Results:
    """What Triton's interpreter refuses: its builder's create_inline_asm, of elements one by one."""
    assert pack == 1
    outputs = constraints.count("=")
    words = [value.data.view(np.uint32) for value in values]
    found = run(ptx, outputs, words)
    handles = []
    for result, kind in zip(found, types, strict=True):
        small = kind.scalar.primitive_bitwidth == 16
        data = result.astype(np.uint16).view(np.int16) if small else result.view(np.float32)
        handles.append(interpreter.TensorHandle(data, kind.scalar))
    return _Results(handles)
