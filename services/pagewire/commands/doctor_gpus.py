"""What `pagewire doctor` prints about each GPU: whether it can be used, and what would run on it
and how. Works on what torch reported; starts nothing.
"""

from pagewire_kernels.capability import attends_by_torch

from ..config import SchedulerConfig
from ..worker.device.gpus import GIB, Gpu, GpuProbe, NoUsableGpu, check
from ..worker.load.precision import BFLOAT16_FROM

WORKSPACE = 5 * GIB // 2
WORKSPACE_SHARE = 0.05
"""What the steps of a model need besides its weights, with a small KV cache, roughly: bytes, or
that share of a large GPU, whichever is more."""
SHARE = 0.9
"""The default of --gpu-memory-utilization."""


def describe(gpu: Gpu, probe: GpuProbe) -> tuple[bool, str]:
    """Whether a model can run on the GPU, and a line about it."""
    major, minor = gpu.capability
    room = f"{gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"
    phrases = [f"{gpu.name}, {room}", f"compute capability {major}.{minor}"]
    if gpu.users():
        phrases.append(gpu.users())
    try:
        check(gpu, probe.architectures)
    except NoUsableGpu as error:
        return False, "; ".join([*phrases, str(error)])
    return True, "; ".join([*phrases, *capabilities(gpu)])


def capabilities(gpu: Gpu) -> list[str]:
    """How a model runs there: data type, attention, step length, the largest that fits."""
    has_bfloat16 = gpu.capability >= BFLOAT16_FROM
    dtype = "bfloat16" if has_bfloat16 else "float16"
    attention = "torch, without CUDA graphs" if attends_by_torch(gpu.capability) else "Triton"
    phrases = [
        "bfloat16" if has_bfloat16 else "no bfloat16: float16 is used instead",
        f"attention by {attention}",
    ]
    largest = largest_model(gpu)
    fits = (
        f"models up to about {largest:g} billion parameters in {dtype}"
        if largest
        else f"no room for a model in {dtype}"
    )
    steps = SchedulerConfig().step_tokens(True, gpu.total)
    return [*phrases, f"steps of up to {steps:,} tokens", fits]


def largest_model(gpu: Gpu) -> float:
    """Roughly how many billions of parameters, of two bytes each, fit into the memory that is free
    now."""
    beside = gpu.total - gpu.free + max(WORKSPACE, WORKSPACE_SHARE * gpu.total)
    billions = max(0.0, (SHARE * gpu.total - beside) / 2e9)
    return float(int(billions)) if billions > 10 else int(2 * billions) / 2
