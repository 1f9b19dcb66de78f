"""What users are told when a GPU fails while a model is loaded: one line with the numbers and
what to change, instead of a traceback."""

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from ..device import gpus, kernel_errors
from ..device.gpus import Gpu
from . import gpu_memory
from .kv_sizing import DoesNotFit, Sizing

log = logging.getLogger("pagewire.worker")
EXHAUSTED: Final = re.compile(r"out of memory|ALLOC_FAILED|MEMORY_ALLOCATION", re.I)
FAILED: Final = re.compile(r"CUDA|CUBLAS|CUDNN|cuBLAS|NCCL|Triton Error")
WANTED: Final = re.compile(r"Tried to allocate ([\d.]+ \w+)")
REMEDIES: Final = (
    "lower --gpu-memory-utilization or --max-model-len, --max-num-seqs or --max-num-batched-tokens; use --enforce-eager (no graphs), "
    "a smaller model"
)


class GpuFailed(ValueError):
    """Not the model's size but the GPU, its driver or the machine around it; the message says which
    and what to do."""


@contextlib.contextmanager
def explained(doing: str, sizing: Sizing) -> Iterator[None]:
    """Turns what torch, cuBLAS and Triton raise inside into DoesNotFit or GpuFailed. doing: like
    "capturing graphs". Others pass."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, RuntimeError) and not kernel_errors.is_triton(error):
            raise
        explained_error = explain(error, doing, sizing, _now(sizing))
        if explained_error is None:
            raise
        log.debug("while %s", doing, exc_info=True)
        raise explained_error from None


def explain(
    error: BaseException, doing: str, sizing: Sizing, now: Gpu | None
) -> DoesNotFit | GpuFailed | None:
    """`error` in plain words; None when it is about no GPU. now: the GPU as it is after the
    error, None when that cannot be told."""
    if kernel_errors.is_triton(error):
        return GpuFailed(kernel_errors.explain(error, now or sizing.gpu, doing))
    text = str(error)
    first = next(iter(text.strip().splitlines()), type(error).__name__)
    if EXHAUSTED.search(text) and "host" not in first.lower():
        return DoesNotFit(_exhausted(text, doing, sizing, now))
    if "C compiler" in text:
        return GpuFailed(
            "Triton needs a C compiler to start kernels, and there is none: install gcc, or set CC to one"
        )
    if "Python.h" in text:
        return GpuFailed(
            "Triton needs Python's header files to start kernels: install python3-dev (or python3-devel)"
        )
    if FAILED.search(first):
        return GpuFailed(
            f"the GPU failed while {doing}: {first}. Start again; if it repeats, CUDA_LAUNCH_BLOCKING=1 names the place, --enforce-eager "
            f"does without graphs, and `nvidia-smi` shows whether the GPU itself is at fault"
        )
    return None


def _exhausted(text: str, doing: str, sizing: Sizing, now: Gpu | None) -> str:
    wanted = WANTED.search(text)
    gpu = now or sizing.gpu
    asked = f"{wanted[1]} more were asked for" if wanted else "more was asked for"
    there = (
        f"of {now.title()} {gpu_memory.gib(now.free)} are free"
        if now
        else f"than {gpu.title() if gpu else 'the GPU'} has"
    )
    users = gpu.users() if gpu else ""
    planned = (
        f"weights {gpu_memory.gib(sizing.weight_bytes)}, KV cache {gpu_memory.gib(sizing.kv_bytes)}, "
        f"workspace {gpu_memory.gib(sizing.workspace)}"
    )
    return (
        f"out of memory while {doing}: {asked}, {there}. Planned: {planned}. "
        + (f"{users}. " if users else "")
        + f"What helps: {'end the other processes; ' if users else ''}{_less(sizing, gpu)}{REMEDIES}"
    )


def _less(sizing: Sizing, gpu: Gpu | None) -> str:
    """A size of the KV cache with which a GiB more is left to the rest."""
    smaller = sizing.kv_bytes - gpu_memory.GIB
    if gpu is None or smaller < sizing.kv_bytes // 2:
        return ""
    return f"--kv-cache-memory-bytes {smaller} leaves 1 GiB more to the rest; "


def _now(sizing: Sizing) -> Gpu | None:
    """The GPU as it is; what this process holds is not other processes' use."""
    if sizing.gpu is None:
        return None
    try:
        now = gpus.survey(sizing.gpu.index)
    except RuntimeError:  # after some errors CUDA answers nothing any more
        return None
    return replace(now, own=max(now.own, now.total - now.free - sizing.gpu.foreign))
