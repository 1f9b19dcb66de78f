"""The processor that native code is compiled for, as LLVM describes it. Needs no torch."""

import functools
import os
from typing import Any, Final

NEEDED: Final = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
"""Functions of GNU OpenMP that native code calls."""


class NoNativeCode(RuntimeError):
    """Why there is no native code on this machine, in a few words."""


@functools.cache
def target() -> tuple[str, str, str]:
    """(triple, processor, features) that functions are compiled for: this machine's, or what
    Numba's variables name."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    return (
        llvm.get_process_triple(),
        name,
        os.environ.get("NUMBA_CPU_FEATURES") or llvm.get_host_cpu_features().flatten(),
    )


def machine() -> Any:
    """LLVM's, a new one each time: engines own theirs. Options are those that Numba gives it."""
    import llvmlite.binding as llvm

    triple, name, features = target()
    relocation = "static" if triple.startswith(("x86", "i686")) else "default"
    found = llvm.Target.from_triple(triple)
    return found.create_target_machine(
        name, features, opt=3, reloc=relocation, codemodel="jitdefault", jit=True
    )


@functools.cache
def converts_half() -> bool:
    """Whether the processor turns float16 into float32 by itself; elsewhere that is a call for each
    number."""
    triple, _, features = target()
    return triple.startswith("aarch64") or "+f16c" in features.split(",")
