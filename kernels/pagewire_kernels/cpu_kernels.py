"""What native functions are written with: how they are compiled, and how they reach memory and the
products of `cpu_emit`.

Imported only to compile, since it needs Numba, of which this is the only place that reaches into
LLVM's terms.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Numba's decorators change the signatures of what they decorate.

from typing import Any, Final

from llvmlite import ir
from numba import njit, types
from numba.core.compiler import Compiler
from numba.extending import intrinsic

from .cpu_emit import DEQUANTIZE_ARGUMENTS, F32, I64, MATMUL_ARGUMENTS

FAST: Final = {"reassoc", "contract", "nsz", "arcp"}


class _Inner(Compiler):
    """Leaves out machine code, which only a call from Python would take. Numba then has no entry to
    a function, and gets something that looks like one."""

    def compile_extra(self, func: Any) -> Any:
        self.state.flags.no_compile = True
        made = super().compile_extra(func)
        entry = [].append
        self.state.targetctx.insert_user_function(entry, made.fndesc, [made.library])
        return made._replace(entry_point=entry)


inlined = njit(fastmath=FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=_Inner)
"""For functions that become part of others, and those that are the others."""


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


floats, shorts, ints, uints, longs, octets = (
    _pointer_to(kind)
    for kind in (
        types.float32,
        types.uint16,
        types.int32,
        types.uint32,
        types.int64,
        types.uint8,
    )
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
