"""Which GPUs torch can use, why it can use none, and whose processes hold their memory. Finds out; decides only what cannot run at all.

`python -m pagewire.worker.gpus` prints the same as JSON, so that others can look without importing torch themselves.
"""

import contextlib
import functools
import logging
import os
import re
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

log = logging.getLogger("pagewire.worker")
GIB: Final = 1 << 30
LEAST_CAPABILITY: Final = (7, 0)
CONTEXT: Final = 3 * GIB // 4
"""What the CUDA context of this process takes before any tensor exists, at most; used where NVML does not say."""
SMI: Final = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits")
SMI_S: Final = 20
LEAST_DRIVER: Final = {11: 450, 12: 525, 13: 580}
"""Of each CUDA release (its first number) the oldest driver that runs it, by NVIDIA's table of minor version compatibility."""
HIDDEN: Final = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES that leave no GPU."""
DRIVER_FILE: Final = Path("/proc/driver/nvidia/version")


class NoUsableGpu(ValueError):
    """A GPU that was asked for, or found, cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Process:
    """used: bytes of the GPU's memory."""

    pid: int
    name: str
    used: int


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch numbers it. free, total: bytes; own: bytes that this process holds; others: the rest's holders, if visible."""

    index: int
    name: str
    capability: tuple[int, int]
    total: int
    free: int
    uuid: str = ""
    own: int = CONTEXT
    others: tuple[Process, ...] = ()

    @property
    def foreign(self) -> int:
        """Bytes that other processes use: what is neither free nor ours."""
        return max(0, self.total - self.free - self.own)

    def title(self) -> str:
        return f"GPU {self.index} ({self.name}, {self.total / GIB:.1f} GiB)"

    def users(self) -> str:
        """Who else uses how much of it; empty when it is nothing to speak of."""
        if not self.others and self.foreign < GIB // 4:
            return ""
        known = sorted(self.others, key=lambda process: -process.used)
        named = ", ".join(f"{p.name} (pid {p.pid}) {p.used / GIB:.1f} GiB" for p in known)
        amount = max(self.foreign, sum(process.used for process in known))
        return f"{amount / GIB:.1f} GiB are used by other processes" + (f": {named}" if named else " that are not visible here")


@dataclass(frozen=True)
class Sight:
    """What torch sees. cuda: the release it was built for, "" without; architectures: like sm_90; reason: why it can use no GPU, empty
    where it can, or where there is none; hidden: somebody may have wanted it so; driver: empty without one; gpus: empty unless looked at
    in detail."""

    torch: str
    cuda: str
    driver: str
    count: int = 0
    architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    reason: str = ""
    hidden: bool = False


def look(detailed: bool = True) -> Sight:
    """Imports torch, and starts a CUDA context on every GPU when detailed."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    version, driver, cuda = str(torch.__version__), driver_version(), torch.version.cuda or ""
    if not count:
        first = str(said[0].message) if said else ""
        device, visible = has_device(), os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = not device or (visible is not None and visible.strip() in HIDDEN)
        return Sight(version, cuda, driver, reason=why_none(cuda, driver, device, first, visible), hidden=hidden)
    found = tuple(survey(i) for i in range(count)) if detailed else ()
    return Sight(version, cuda, driver, count, tuple(torch.cuda.get_arch_list()), found)


def survey(index: int) -> Gpu:
    """GPU `index` of torch's numbering, with the processes on it where they hold anything worth asking for."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    facts = torch.cuda.get_device_properties(index)
    uuid = f"GPU-{facts.uuid}" if hasattr(facts, "uuid") else ""
    own = CONTEXT + torch.cuda.memory_reserved(index)
    gpu = Gpu(index, facts.name, (facts.major, facts.minor), total, free, uuid, own)
    return with_processes(gpu, processes(uuid)) if total - free - own > GIB // 4 else gpu


def with_processes(gpu: Gpu, found: Sequence[Process]) -> Gpu:
    """`gpu` with what NVML knows: our own share among it replaces the estimate."""
    own = next((process.used for process in found if process.pid == os.getpid()), 0)
    others = tuple(process for process in found if process.pid != os.getpid())
    return replace(gpu, own=own or gpu.own, others=others)


def processes(uuid: str) -> list[Process]:
    """All processes with memory on the GPU, this one included; none where neither NVML's bindings nor nvidia-smi say."""
    found = _from_nvml(uuid)
    return _from_smi(uuid) if found is None else found


def _from_nvml(uuid: str) -> list[Process] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except Exception:  # not installed, no driver, no permission: whatever it is, somebody else may know
        return None
    return [Process(p.pid, process_name(p.pid), int(p.usedGpuMemory or 0)) for p in running]


def _from_smi(uuid: str) -> list[Process]:
    try:
        text = subprocess.run(SMI, capture_output=True, text=True, timeout=SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_smi(text, uuid)


def parse_smi(text: str, uuid: str) -> list[Process]:
    """Lines like `GPU-1f2e, 4242, /usr/bin/python3, 36900` (MiB). A name may hold commas; an amount may be [N/A]."""
    found: list[Process] = []
    for line in text.splitlines():
        match = re.fullmatch(r"\s*([^,]+), (\d+), (.*), ([^,]+)", line)
        if match and (not uuid or match[1] == uuid):
            used = int(match[4]) << 20 if match[4].strip().isdecimal() else 0
            found.append(Process(int(match[2]), Path(match[3]).name or match[3], used))
    return found


def process_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "a process"


def driver_version() -> str:
    """Of NVIDIA's kernel module; empty when none is loaded."""
    with contextlib.suppress(OSError):
        match = re.search(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", DRIVER_FILE.read_text())
        return match[1] if match else "unknown"
    return ""


def has_device() -> bool:
    """Whether this process is given any of NVIDIA's devices (a container may not be); the second name is that of WSL2."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def why_none(cuda: str, driver: str, device: bool, warning: str, visible: str | None) -> str:
    """Why torch, built for CUDA release `cuda` ("" for none), uses no GPU; empty when there is simply none. warning: torch's own words."""
    if not driver and not device:
        return ""
    here = f"there is an NVIDIA driver {driver}".rstrip()
    if not device:
        return f"{here}, but no GPU is given to this process; start a container with --gpus all"
    if not cuda:
        return f"{here}, but this torch was built without CUDA; install a CUDA build of torch"
    if visible is not None and visible.strip() in HIDDEN:
        return f"{here}, but CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
    least = LEAST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    number = driver.partition(".")[0]
    if number.isdecimal() and int(number) < least:
        return (
            f"the NVIDIA driver {driver} is too old for this torch, built for CUDA {cuda}: install driver {least} or newer, "
            f"or a torch built for an older CUDA"
        )
    said = warning.removeprefix("CUDA initialization: ").partition("(Triggered")[0].strip()
    return f"{here}, but torch, built for CUDA {cuda}, cannot use the GPU" + (f": {said}" if said else "; `nvidia-smi` may say why")


def check(gpu: Gpu, architectures: Sequence[str]) -> None:
    """Raises NoUsableGpu when our kernels, or those that torch was built with, cannot run on it."""
    major, minor = gpu.capability
    if gpu.capability < LEAST_CAPABILITY:
        raise NoUsableGpu(
            f"{gpu.title()} has compute capability {major}.{minor}, and 7.0 or newer is needed (V100, T4, RTX 20, A100, L4, H100 "
            f"and later); --device cpu runs without it"
        )
    if architectures and not any(_runs(name, gpu.capability) for name in architectures):
        raise NoUsableGpu(
            f"{gpu.title()} has compute capability {major}.{minor}, and this torch was built for {', '.join(architectures)} only; "
            f"install a torch that was built for sm_{major}{minor}"
        )


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """sm_86 is machine code for 8.6 and later of its major number; compute_90 is compiled by the driver for everything later."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return False
    built = int(match[2]), int(match[3])
    if match[4]:
        return built == capability
    return built <= capability and (match[1] == "compute" or built[0] == capability[0])


@functools.cache
def usable(asked: str) -> bool:
    """Whether the model shall run on a GPU: `asked` is auto or cuda. Raises NoUsableGpu when cuda is asked for in vain; says it, once, when
    there is a GPU that auto cannot have."""
    sight = look(detailed=False)
    if sight.count:
        return True
    if asked == "cuda":
        raise NoUsableGpu(f"--device cuda: {sight.reason or 'there is no NVIDIA GPU'}; `pagewire doctor` says more")
    if sight.reason:
        log.warning("running on the CPU: %s", sight.reason)
    return False


def read_sight(text: str) -> Sight:
    """What `python -m pagewire.worker.gpus` printed."""
    return msgspec.json.decode(text, type=Sight)


def main() -> None:
    print(msgspec.json.encode(look()).decode())


if __name__ == "__main__":
    main()
