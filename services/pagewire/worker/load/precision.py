"""Which type weights and activations get, from what was asked for, what the checkpoint was saved in
and what the device can do."""

from typing import Final, NamedTuple

from ..device.gpus import Gpu
from ..device.processor import Processor
from ..models.architecture import Unsupported

TYPES: Final = {
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
BFLOAT16_FROM: Final = (8, 0)
"""Compute capability."""


class Choice(NamedTuple):
    """dtype: float16, bfloat16 or float32. note: why it is not what the checkpoint was saved in,
    empty when it is or was asked for."""

    dtype: str
    note: str = ""


def choose(asked: str, saved: str, device: Gpu | Processor) -> Choice:
    """`asked` is --dtype, `saved` the checkpoint's type, `device` where the model runs. Raises
    ValueError for bfloat16 where there is none, and Unsupported when the type must be named because
    the checkpoint's is no type to compute in."""
    if asked != "auto":
        return Choice(_refuse(TYPES[asked], device))
    dtype = TYPES.get(saved.removeprefix("torch."))
    if dtype is None:
        raise Unsupported(
            f"weights of type {saved!r} are not supported; choose --dtype bfloat16 or float32"
        )
    return _for_cpu(dtype, device) if isinstance(device, Processor) else _for_gpu(dtype, device)


def _for_cpu(dtype: str, cpu: Processor) -> Choice:
    """float16 has no fast products on a CPU, and bfloat16 on some only."""
    if dtype == "float32" or (dtype == "bfloat16" and cpu.bfloat16):
        return Choice(dtype)
    if not cpu.bfloat16:
        return Choice(
            "float32",
            f"the checkpoint is {dtype}, for which this processor, {cpu.title()}, has no products: using float32",
        )
    note = "the checkpoint is float16, which is slow on a CPU: using bfloat16; --dtype float16 or float32 keeps its precision"
    return Choice("bfloat16", note)


def _for_gpu(dtype: str, gpu: Gpu) -> Choice:
    if dtype == "float16" or (dtype == "bfloat16" and gpu.capability >= BFLOAT16_FROM):
        return Choice(dtype)
    half = "bfloat16" if gpu.capability >= BFLOAT16_FROM else "float16"
    if dtype == "float32":
        return Choice(
            half,
            f"the checkpoint is float32: using {half}, in half the memory; --dtype float32 keeps its precision",
        )
    major, minor = gpu.capability
    return Choice(
        half,
        f"the checkpoint is bfloat16, which a {gpu.name} (compute capability {major}.{minor}) does not have: using float16",
    )


def overflow(dtype: str, model_type: str) -> str:
    """A line where activations are known to leave float16's range (65,504), as Gemma's do; else
    empty."""
    if dtype != "float16" or not model_type.startswith("gemma"):
        return ""
    return (
        f"{model_type} in float16 may overflow, and a request that does ends with an error: it was made for bfloat16, which GPUs have from "
        f"compute capability 8.0 on; --dtype float32 is safe, in twice the memory"
    )


def _refuse(dtype: str, device: Gpu | Processor) -> str:
    """What is said of GPUs are the words that users of vLLM find in its guides."""
    if dtype != "bfloat16":
        return dtype
    if isinstance(device, Processor):
        if not device.bfloat16:
            raise ValueError(
                f"--dtype bfloat16: this processor, {device.title()}, has no bfloat16 products (on x86-64 they take AVX-512 with BW, VL "
                f"and DQ, or AVX-NE-CONVERT); use --dtype float32, or leave the flag out"
            )
    elif device.capability < BFLOAT16_FROM:
        major, minor = device.capability
        raise ValueError(
            f"Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your {device.name} GPU has compute capability "
            f"{major}.{minor}. You can use float16 instead by explicitly setting the `dtype` flag in CLI, for example: --dtype=half."
        )
    return dtype
