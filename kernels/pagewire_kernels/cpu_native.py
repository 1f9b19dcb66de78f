"""Machine code for the CPU made by Numba, and the team of threads it runs in: torch's own OpenMP
threads, so that two pools never contend for the cores.

A native function takes the address of an array of int64 (numbers and addresses) and is run by every
thread of the team at once; its parts meet at barriers. Compiled functions are kept on disk by
Numba. Knows nothing of models.
"""

import ctypes
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

CACHE_VARIABLE: Final = "NUMBA_CACHE_DIR"
NEEDED: Final = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")


class NoNativeCode(RuntimeError):
    """Why there is no native code on this machine, in a few words."""


def keep_in(place: Path) -> None:
    """Where compiled functions are kept. To be called before the first one is compiled."""
    os.environ.setdefault(CACHE_VARIABLE, str(place))


def digest() -> str:
    """Changes with any source of native code: Numba looks at the file of a function alone, not at
    those of what it calls."""
    sources = sorted(Path(__file__).parent.glob("cpu_*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


@functools.cache
def openmp() -> ctypes.CDLL:
    """torch's own library, through which the OpenMP it was linked with is found: other packages
    bring copies of theirs, and a second pool would contend for the cores. Raises NoNativeCode where
    it is none with GNU's interface."""
    import torch

    for file in sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*")):
        library = ctypes.CDLL(str(file))
        if all(hasattr(library, name) for name in (*NEEDED, "GOMP_parallel")):
            return library
    raise NoNativeCode("torch's threads are not of GNU OpenMP")


@functools.cache
def numba() -> Any:
    """The library, with the team's functions made known to it. Raises NoNativeCode where there is
    none."""
    library = openmp()
    try:
        import llvmlite.binding as llvm
        import numba
    except ImportError as error:
        raise NoNativeCode(f"Numba cannot be imported ({error})") from None
    for name in NEEDED:
        llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return numba


@functools.cache
def converts_half() -> bool:
    """Whether the processor turns float16 into float32 by itself; elsewhere that is a call for each
    number."""
    import llvmlite.binding as llvm

    return llvm.get_process_triple().startswith("aarch64") or bool(
        llvm.get_host_cpu_features().get("f16c")
    )


@functools.cache
def compiled(function: Callable[..., None], arguments: int) -> Any:
    """`function` of `arguments` int64, compiled or found on disk. The result's `address` is that of
    the machine code, which lives as long as the process."""
    library = numba()
    int64 = library.types.int64
    signature = library.types.void(*[int64] * arguments)
    return library.cfunc(signature, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})(
        function
    )


def run(function: Any, task: np.ndarray, threads: int) -> None:
    """Every thread of the team calls `function` (of one argument) with the address of `task`."""
    openmp().GOMP_parallel(
        ctypes.c_void_p(function.address),
        ctypes.c_void_p(task.ctypes.data),
        ctypes.c_uint(threads),
        ctypes.c_uint(0),
    )
