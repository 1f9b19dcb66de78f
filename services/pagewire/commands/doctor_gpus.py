"""What `pagewire doctor` says about each GPU: whether it can be used, and what would run on it and
how. Works on what torch was seen to see; starts nothing.
"""

from pagewire_kernels.capability import attends_by_torch, captures_experts

from ..config import SchedulerConfig
from ..worker.device.gpus import GIB, Gpu, GpuProbe, NoUsableGpu, check
from ..worker.load.precision import BFLOAT16_FROM

WORKSPACE, WORKSPACE_SHARE = 5 * GIB // 2, 0.05
"""What steps of a model that just fits take beside its weights, and the smallest cache worth
having, about: bytes, or that share of a large GPU."""
SHARE = 0.9
"""--gpu-memory-utilization where nobody says it."""


def describe(gpu: Gpu, probe: GpuProbe) -> tuple[bool, str]:
    """(whether a model can run on it, a line)."""
    major, minor = gpu.capability
    room = f"{gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"
    parts = [f"{gpu.name}, {room}", f"compute capability {major}.{minor}"]
    if gpu.users():
        parts.append(gpu.users())
    try:
        check(gpu, probe.architectures)
    except NoUsableGpu as error:
        return False, "; ".join([*parts, str(error)])
    return True, "; ".join([*parts, *capabilities(gpu)])


def capabilities(gpu: Gpu) -> list[str]:
    """What a model gets there."""
    has_bfloat16 = gpu.capability >= BFLOAT16_FROM
    dtype = "bfloat16" if has_bfloat16 else "float16"
    experts = "with" if captures_experts(gpu.capability) else "without"
    attention = "torch, without CUDA graphs" if attends_by_torch(gpu.capability) else "Triton"
    parts = [
        "bfloat16" if has_bfloat16 else "no bfloat16: float16 is used instead",
        f"attention by {attention}",
    ]
    if not attends_by_torch(gpu.capability):
        parts.append(f"mixtures of experts {experts} CUDA graphs")
    largest = largest_model(gpu)
    fits = (
        f"models up to about {largest:g} billion parameters in {dtype}"
        if largest
        else f"no room for a model in {dtype}"
    )
    steps = SchedulerConfig().step_tokens(True, gpu.total)
    return [*parts, f"steps of up to {steps:,} tokens", fits]


def largest_model(gpu: Gpu) -> float:
    """Billions of parameters of two bytes each that fit into what is free now, about."""
    beside = gpu.total - gpu.free + max(WORKSPACE, WORKSPACE_SHARE * gpu.total)
    billions = max(0.0, (SHARE * gpu.total - beside) / 2e9)
    return float(int(billions)) if billions > 10 else int(2 * billions) / 2
