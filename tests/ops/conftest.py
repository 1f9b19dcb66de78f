"""The Triton kernels of these tests run in Triton's interpreter on the CPU: it must be chosen
before a kernel is defined."""

import os
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

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
