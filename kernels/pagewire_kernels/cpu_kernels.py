"""Products of few rows with quantized weights, and such weights made dense, as functions of machine
code: one a format.

Imported on first use only, since it needs Numba, of which this is the only place that reaches into
LLVM's terms (`cpu_emit`).
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Numba's decorators change the signatures of what they decorate.

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .cpu_emit import F32, I64, Code, Operands, emit_dequantize, emit_matmul
from .cpu_panels import Format

MATMUL_ARGUMENTS: Final = 11
DEQUANTIZE_ARGUMENTS: Final = 7


def _format_of(parts: Any) -> Format | None:
    values = [
        part.literal_value if isinstance(part, types.IntegerLiteral) else None for part in parts
    ]
    return (
        None if None in values else Format(values[0], values[1], bool(values[2]), bool(values[3]))
    )


@intrinsic(prefer_literal=True)
def _matmul(typing: Any, bits: Any, group: Any, half: Any, minima: Any, weight: Any, x: Any, x_stride: Any, sums: Any, groups: Any,
            rows: Any, first: Any, last: Any, out: Any, out_stride: Any, add: Any):  # fmt: skip
    form = _format_of((bits, group, half, minima))
    if form is None:
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        emit_matmul(Code(builder), form, Operands(*arguments[4:]))
        return context.get_dummy_value()

    return types.void(bits, group, half, minima, *[types.int64] * MATMUL_ARGUMENTS), generate


@intrinsic(prefer_literal=True)
def _dequantize(typing: Any, bits: Any, group: Any, half: Any, minima: Any, weight: Any, groups: Any, first: Any, last: Any, out: Any,
                stride: Any, brief: Any):  # fmt: skip
    form = _format_of((bits, group, half, minima))
    if form is None:
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        emit_dequantize(Code(builder), form, *arguments[4:])
        return context.get_dummy_value()

    return types.void(bits, group, half, minima, *[types.int64] * DEQUANTIZE_ARGUMENTS), generate


# One function a format at the top level of a module: only those does Numba keep on disk.


def _matmul_4_half(w, x, xs, s, g, r, p, q, o, os, a):
    _matmul(4, 32, 1, 1, w, x, xs, s, g, r, p, q, o, os, a)


def _matmul_4(w, x, xs, s, g, r, p, q, o, os, a):
    _matmul(4, 32, 0, 1, w, x, xs, s, g, r, p, q, o, os, a)


def _matmul_8_half(w, x, xs, s, g, r, p, q, o, os, a):
    _matmul(8, 32, 1, 0, w, x, xs, s, g, r, p, q, o, os, a)


def _matmul_8(w, x, xs, s, g, r, p, q, o, os, a):
    _matmul(8, 32, 0, 0, w, x, xs, s, g, r, p, q, o, os, a)


def _matmul_8_minima(w, x, xs, s, g, r, p, q, o, os, a):
    _matmul(8, 32, 0, 1, w, x, xs, s, g, r, p, q, o, os, a)


def _matmul_8_by_16(w, x, xs, s, g, r, p, q, o, os, a):
    _matmul(8, 16, 0, 0, w, x, xs, s, g, r, p, q, o, os, a)


def _dequantize_4_half(w, g, p, q, o, os, b):
    _dequantize(4, 32, 1, 1, w, g, p, q, o, os, b)


def _dequantize_4(w, g, p, q, o, os, b):
    _dequantize(4, 32, 0, 1, w, g, p, q, o, os, b)


def _dequantize_8_half(w, g, p, q, o, os, b):
    _dequantize(8, 32, 1, 0, w, g, p, q, o, os, b)


def _dequantize_8(w, g, p, q, o, os, b):
    _dequantize(8, 32, 0, 0, w, g, p, q, o, os, b)


def _dequantize_8_minima(w, g, p, q, o, os, b):
    _dequantize(8, 32, 0, 1, w, g, p, q, o, os, b)


def _dequantize_8_by_16(w, g, p, q, o, os, b):
    _dequantize(8, 16, 0, 0, w, g, p, q, o, os, b)


MATMULS: Final = {
    Format(4, 32, True, True): _matmul_4_half,
    Format(4, 32, False, True): _matmul_4,
    Format(8, 32, True, False): _matmul_8_half,
    Format(8, 32, False, False): _matmul_8,
    Format(8, 32, False, True): _matmul_8_minima,
    Format(8, 16, False, False): _matmul_8_by_16,
}
DEQUANTIZES: Final = {
    Format(4, 32, True, True): _dequantize_4_half,
    Format(4, 32, False, True): _dequantize_4,
    Format(8, 32, True, False): _dequantize_8_half,
    Format(8, 32, False, False): _dequantize_8,
    Format(8, 32, False, True): _dequantize_8_minima,
    Format(8, 16, False, False): _dequantize_8_by_16,
}


def _signature(arguments: int) -> ir.FunctionType:
    return ir.FunctionType(ir.VoidType(), [I64] * arguments)


@intrinsic
def call_matmul(typing: Any, function: Any, weight: Any, x: Any, x_stride: Any, sums: Any, groups: Any, rows: Any, first: Any, last: Any,
                out: Any, out_stride: Any, add: Any):  # fmt: skip
    """The product at address `function`; see Operands."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        target = builder.inttoptr(arguments[0], _signature(MATMUL_ARGUMENTS).as_pointer())
        builder.call(target, arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (MATMUL_ARGUMENTS + 1)), generate


@intrinsic
def call_dequantize(
    typing: Any,
    function: Any,
    weight: Any,
    groups: Any,
    first: Any,
    last: Any,
    out: Any,
    stride: Any,
    brief: Any,
):
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        target = builder.inttoptr(arguments[0], _signature(DEQUANTIZE_ARGUMENTS).as_pointer())
        builder.call(target, arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (DEQUANTIZE_ARGUMENTS + 1)), generate


def _pointer_to(kind: Any) -> Any:
    """An address as a pointer to numbers of a type. Plain pointers: an index from the end, as
    arrays have it, would keep LLVM from making vectors of a loop."""

    @intrinsic
    def pointer(typing: Any, address: Any):
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return pointer


floats, shorts, ints, uints, longs = (
    _pointer_to(kind)
    for kind in (types.float32, types.uint16, types.int32, types.uint32, types.int64)
)


@intrinsic
def as_float(typing: Any, bits: Any):
    """The float32 with these 32 bits."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate


@intrinsic
def bits_of(typing: Any, value: Any):
    """The 32 bits of a float32."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate
