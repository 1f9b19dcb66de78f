"""Machine code for the CPU, kept on disk as object files, and the team of threads it runs in:
torch's own OpenMP threads, so that two pools never contend for the cores.

A native function takes the address of an array of int64 (numbers and addresses) and is run by every
thread of the team at once; its parts meet at barriers. Loading one takes LLVM alone: Numba, which
takes half a second to import, is for compiling (`cpu_compile`). Knows nothing of models.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .cpu_target import NEEDED, NoNativeCode, machine, target

if TYPE_CHECKING:
    import numpy as np  # `doctor` comes by here, and names a processor on which NumPy cannot run

FOR_ALL: Final = ("multiply", "make_dense", "decode")
"""Functions that most models need, and the ones that take longest to compile."""
_directory: list[Path] = []
_helpers: list[subprocess.Popen[bytes]] = []


def keep_in(directory: Path) -> None:
    """The directory where compiled functions are kept. Without one they are compiled for this
    process alone."""
    _directory[:] = [directory]


def digest() -> str:
    """Changes with any source of native code."""
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


def check() -> None:
    """Raises NoNativeCode where nothing can be compiled or run. What is on disk counts as
    compiled."""
    openmp()
    if not importlib.util.find_spec("llvmlite"):
        raise NoNativeCode("llvmlite, which comes with Numba, is not installed")
    if not all(_kept(name) for name in FOR_ALL) and not _helpers:
        from .cpu_compile import load_numba

        load_numba()


def compile_in_background() -> None:
    """Have another process compile what most models need and is not on disk."""
    missing = [name for name in FOR_ALL if not _kept(name)]
    if missing and _directory and importlib.util.find_spec("numba"):
        program = [sys.executable, "-m", "pagewire_kernels.cpu_native"]
        command = [*program, str(_directory[0]), *missing]
        with contextlib.suppress(OSError):
            _helpers.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )


@functools.cache
def address(name: str) -> int:
    """Of a function's machine code, which lives as long as the process. Raises NoNativeCode."""
    symbol, code = object_of(name)
    return _load(code, symbol)


def object_of(name: str) -> tuple[str, bytes]:
    """(symbol, object file) of a function: found on disk, where another process is about to put it,
    or compiled and put there."""
    compiled_function = _kept(name)
    if not compiled_function and name in FOR_ALL and _helpers:
        _helpers.pop().wait()
        compiled_function = _kept(name)
    if not compiled_function:
        from .cpu_compile import compiled

        compiled_function = compiled(name)
        _keep(name, compiled_function)
    return compiled_function


def _load(code: bytes, symbol: str) -> int:
    import llvmlite.binding as llvm

    for name in NEEDED:
        llvm.add_symbol(name, ctypes.cast(getattr(openmp(), name), ctypes.c_void_p).value)
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine.get_function_address(symbol)


@functools.cache
def _engine() -> Any:
    import llvmlite.binding as llvm

    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine())


def _file(name: str) -> Path:
    import llvmlite

    made_by = (*target(), llvmlite.__version__)
    return _directory[0] / f"{name}-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]}.o"


def _kept(name: str) -> tuple[str, bytes] | None:
    """What the file holds: a line with its checksum, one with the symbol, and the object file."""
    if not _directory:
        return None
    with contextlib.suppress(OSError, ValueError):
        checksum, content = _file(name).read_bytes().split(b"\n", 1)
        if hashlib.sha256(content).hexdigest().encode() == checksum:
            symbol, code = content.split(b"\n", 1)
            return symbol.decode(), code
    return None


def _keep(name: str, compiled_function: tuple[str, bytes]) -> None:
    """In one move, since another worker may read it."""
    if not _directory:
        return
    symbol, code = compiled_function
    content = symbol.encode() + b"\n" + code
    with contextlib.suppress(OSError):
        _directory[0].mkdir(parents=True, exist_ok=True)
        passing = _file(name).with_suffix(f".{os.getpid()}")
        passing.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        passing.replace(_file(name))


def run(function: int, task: "np.ndarray", threads: int) -> None:
    """Every thread of the team calls the function at an address with the address of `task`."""
    openmp().GOMP_parallel(
        ctypes.c_void_p(function),
        ctypes.c_void_p(task.ctypes.data),
        ctypes.c_uint(threads),
        ctypes.c_uint(0),
    )


if __name__ == "__main__":  # python -m pagewire_kernels.cpu_native DIRECTORY NAME...
    # In a process of its own, beside whatever else a start has to do: half of compiling is Python.
    gc.disable()
    keep_in(Path(sys.argv[1]))
    for wanted in sys.argv[2:]:
        object_of(wanted)
