"""A few of PTX's instructions for NumPy, so that what a kernel says in them can be computed without a
GPU, by Triton's interpreter too."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
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


def halves_of(words: Words, dtype: str) -> np.ndarray:
    """Words of two values of `dtype` (bf16, f16) -> [2, ...] float32."""
    both = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)])
    if dtype == "bf16":
        return (both << np.uint32(16)).view(np.float32)
    return both.astype(np.uint16).view(np.float16).astype(np.float32)


def words_of(halves: np.ndarray, dtype: str) -> Words:
    """halves_of backwards, each value rounded."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    bits = torch.from_numpy(np.ascontiguousarray(halves)).to(kind).view(torch.int16)
    both = bits.numpy().view(np.uint16).astype(np.uint32)
    return np.asarray(both[0] | both[1] << np.uint32(16))


def mma(dtype: str, operands: Sequence[Words]) -> list[Words]:
    """mma.m16n8k16 with sums of float32. operands: a four times, b twice, c four times, as threads
    have them (PTX, fragments of mma.m16n8k16): [threads, ...], 32 threads a warp."""
    shape = np.broadcast_shapes(*(np.shape(each) for each in operands))
    each = [
        np.ascontiguousarray(np.broadcast_to(word, shape)).reshape(-1, 8, 4, *shape[1:])
        for word in operands
    ]
    # a and b: halves of inputs, (halves of rows), pair, warp, group of four, thread of it, ...
    a = np.stack([halves_of(word, dtype) for word in each[:4]]).reshape(2, 2, 2, *each[0].shape)
    b = np.stack([halves_of(word, dtype) for word in each[4:6]])
    c = np.stack([word.view(np.float32) for word in each[6:]]).reshape(2, 2, *each[0].shape)
    product = np.einsum("hrpwgt...,hpwnt...->rwgn...", a, b)
    # eight columns are two of each thread of a group
    columns = product.reshape(*product.shape[:3], 4, 2, *product.shape[4:])
    sums = np.moveaxis(columns, 4, 1) + c
    return [
        np.ascontiguousarray(s, np.float32).view(np.uint32).reshape(shape)
        for s in (*sums[0], *sums[1])
    ]


def run(ptx: str, outputs: int, inputs: Sequence[Words]) -> list[Words]:
    """$0 to $(outputs - 1) of `ptx`, whose inputs follow them; of 16 bits where it takes words
    apart."""
    values: dict[str, Words] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def read(name: str) -> Words:
        if name in values:
            return values[name]
        if name == "laneid":
            first = np.arange(len(inputs[0]), dtype=np.uint32) % np.uint32(32)
            return np.broadcast_to(first.reshape(-1, *[1] * (inputs[0].ndim - 1)), inputs[0].shape)
        number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.array(number, np.uint32)

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
            case "mov.b32" | "mov.f32" | "mov.u32":
                values[names[0]] = read(names[1])
            case "add.f32":
                a, b = (np.asarray(read(name)).view(np.float32) for name in names[1:])
                values[names[0]] = (a + b).view(np.uint32)
            case "setp.ne.u32":
                values[names[0]] = read(names[1]) != read(names[2])
            case "selp.f32":
                values[names[0]] = np.where(read(names[3]), read(names[1]), read(names[2]))
            case "fma.rn.bf16x2" | "fma.rn.f16x2":
                dtype = operation.split(".")[2].removesuffix("x2")
                x, y, z = (halves_of(np.asarray(read(name)), dtype) for name in names[1:])
                values[names[0]] = words_of(np.stack([x[i] * y[i] + z[i] for i in range(2)]), dtype)
            case _ if operation.startswith("mma.sync.aligned.m16n8k16.row.col.f32."):
                results = mma(operation.split(".")[7], [read(name) for name in names[4:]])
                values.update(zip(names[:4], results, strict=True))
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
    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    words = [np.broadcast_to(value.data.view(np.uint32), shape) for value in values]
    found = run(ptx, outputs, words)
    handles = []
    for result, kind in zip(found, types, strict=True):
        small = kind.scalar.primitive_bitwidth == 16
        whole = result.view(np.int32 if kind.scalar.is_int() else np.float32)
        data = result.astype(np.uint16).view(np.int16) if small else whole
        handles.append(interpreter.TensorHandle(data, kind.scalar))
    return _Results(handles)
