"""The Triton kernels of these tests run in Triton's interpreter on the CPU: it must be chosen
before a kernel is defined."""

import os
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _index(tensor: Any) -> int:
    return int(tensor.handle.data.item())


def _patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
    """Triton 3.6 makes loop bounds by int() of an array of one element, which numpy refuses from
    2.4 on."""
    _patch_tensor(tensor, *scope)
    tensor.__index__ = _index


interpreter._patch_lang_tensor = _patch_tensor_and_index

_create_dot = interpreter.InterpreterBuilder.create_dot


def _as_float32(handle: Any) -> Any:
    if handle.dtype != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _create_dot_of_bfloat16(builder: Any, a: Any, b: Any, *options: Any) -> Any:
    """Triton 3.6 keeps bfloat16 as the bits of its numbers and would multiply those."""
    return _create_dot(builder, _as_float32(a), _as_float32(b), *options)


interpreter.InterpreterBuilder.create_dot = _create_dot_of_bfloat16

_create_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp


def _to_nearest_float8(builder: Any, handle: Any, to: Any, *options: Any) -> Any:
    """Triton 3.6 adds to the mantissa where it rounds up, without a carry to the exponent."""
    if handle.dtype.scalar != tl.float32 or to.scalar != tl.float8e4nv:
        return _create_fp_to_fp(builder, handle, to, *options)
    rounded = torch.from_numpy(handle.data).to(torch.float8_e4m3fn)
    return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), to.scalar)


interpreter.InterpreterBuilder.create_fp_to_fp = _to_nearest_float8

_unary_op = interpreter.InterpreterBuilder.unary_op


def _unary_op_without_overflow(builder: Any, argument: Any, op: Any) -> Any:
    """numpy warns where a result is infinite; a GPU does not, and `1 / (1 + exp(-x))` relies on it."""
    with np.errstate(over="ignore"):
        return _unary_op(builder, argument, op)


interpreter.InterpreterBuilder.unary_op = _unary_op_without_overflow
