"""The error message when Triton cannot make a kernel for the GPU: which kernel, which card, and
what to do, in one line.

Triton's errors are no RuntimeErrors, and they do not say which kernel they are about. Looks at
errors alone; a CPU may have no Triton.
"""

from typing import Any, Final

from .gpus import Gpu

MAX_MESSAGE: Final = 300
"""Characters of a compiler's message."""


def is_triton(error: BaseException) -> bool:
    """Whether it is of triton.errors.TritonError, which is not imported for this."""
    return any(
        kind.__name__ == "TritonError" and kind.__module__.startswith("triton")
        for kind in type(error).__mro__
    )


def kernel_of(error: BaseException) -> str:
    """What the launch noted (pagewire_kernels.shapes), else the name of the function that Triton
    was launching."""
    if notes := getattr(error, "__notes__", ()):
        return str(notes[0])
    trace = error.__traceback__
    name = ""
    while trace is not None:
        launched = trace.tb_frame.f_locals.get("self")
        if not name and type(launched).__name__ == "JITFunction":
            name = str(getattr(launched, "__name__", ""))
        trace = trace.tb_next
    return f"the kernel {name}" if name else "a kernel"


def explain(error: BaseException, gpu: Gpu | None, doing: str) -> str:
    """`error` is one of Triton's."""
    kernel = kernel_of(error)
    card = gpu.title() if gpu else "the GPU"
    if type(error).__name__ == "OutOfResources":
        return _too_large(error, kernel, card)
    message = " ".join(str(error).split())[:MAX_MESSAGE]
    return (
        f"{kernel} does not compile for {card} while {doing}: {type(error).__name__}: {message}. What helps: the versions of torch "
        "and Triton that this release was tested with (constraints.txt); --device cpu runs without compiled kernels; it is worth a report"
    )


def _too_large(error: Any, kernel: str, card: str) -> str:
    return (
        f"{kernel} does not fit {card}: its smallest launch shape needs {error.required:,} of {error.name}, a block may have "
        f"{error.limit:,}. What helps: --dtype bfloat16 or half, where float32 was asked for; a GPU that gives a block more, such as an "
        "A100 or H100; --device cpu"
    )
