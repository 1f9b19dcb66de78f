"""The Triton kernels of these tests run in Triton's interpreter on the CPU: it must be chosen
before a kernel is defined."""

import os
import time
from types import ModuleType
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

_patch_lang = interpreter._patch_lang
_patched: set[frozenset[int]] = set()


def _patch_lang_once(function: Any) -> Any:
    """Triton 3.6 looks through its language and replaces it in every call of a function, which takes
    most of the time of small kernels, and puts it back after a launch. Here it stays replaced: nothing
    is compiled in this process."""
    languages = {id(each) for each in (tl, tl.core) if each in _modules(function)}
    if frozenset(languages) not in _patched:
        _patched.add(frozenset(languages))
        _patch_lang(function)
    return interpreter._LangPatchScope()


def _modules(function: Any) -> list[Any]:
    return [value for value in function.__globals__.values() if isinstance(value, ModuleType)]


interpreter._patch_lang = _patch_lang_once

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

_cast_impl = interpreter.InterpreterBuilder.cast_impl


def _to_nearest_bfloat16(builder: Any, handle: Any, to: Any) -> Any:
    """Triton 3.6 cuts the lower half off."""
    if handle.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return _cast_impl(builder, handle, to)
    rounded = torch.from_numpy(np.ascontiguousarray(handle.data)).to(torch.bfloat16)
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(bits, to.scalar)


interpreter.InterpreterBuilder.cast_impl = _to_nearest_bfloat16


class _ClockResult:
    """Of inline assembly with one result."""

    def get_result(self, index: int) -> Any:
        now = np.array([time.perf_counter_ns()], dtype=np.int64)
        return interpreter.TensorHandle(now, tl.int64)


def _only_the_clock(builder: Any, assembly: str, *others: Any) -> Any:
    """Reads of a GPU's clock are reads of the host's. Who asks waits for another process, which gets
    the processor."""
    if "%globaltimer" not in assembly:
        raise NotImplementedError(f"not for Triton's interpreter: {assembly}")
    time.sleep(0)
    return _ClockResult()


interpreter.InterpreterBuilder.create_inline_asm = _only_the_clock
