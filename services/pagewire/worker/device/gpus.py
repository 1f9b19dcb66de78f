"""Which GPUs torch can use, why it can use none, and whose processes hold their memory. Finds out;
decides only what cannot run at all.

`python -m pagewire.worker.device.gpus` prints the same as JSON, so that others can look without
importing torch themselves.
"""

import contextlib
import functools
import itertools
import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from . import driver

log = logging.getLogger("pagewire.worker")
GIB: Final = 1 << 30
LEAST_CAPABILITY: Final = (7, 0)
VOLTA: Final = (
    ", such as PyTorch's builds for CUDA 12.6: those for CUDA 12.8 and later leave it out"
)
CONTEXT: Final = 3 * GIB // 4
"""What the CUDA context of this process takes before any tensor exists, at most; used where NVML
does not say."""
SMI: Final = (
    "--query-compute-apps=gpu_uuid,pid,process_name,used_memory",
    "--format=csv,noheader,nounits",
)
SMI_NUMBERS: Final = ("--query-gpu=index,uuid", "--format=csv,noheader")
SMI_FREE: Final = ("--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits")
MUCH_MORE: Final = 2 * GIB
"""Free memory that another GPU must have beyond the chosen one's to be worth a line, beside a tenth
of that."""


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
    """One GPU as torch numbers it. free, total: bytes; own: bytes that this process holds; others:
    the rest's holders, if visible."""

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
        """Number, name and size, human-readable."""
        return f"GPU {self.index} ({self.name}, {self.total / GIB:.1f} GiB)"

    def users(self) -> str:
        """Who else uses how much of it; empty when it is nothing to speak of."""
        if not self.others and self.foreign < GIB // 4:
            return ""
        largest_first = sorted(self.others, key=lambda process: -process.used)
        named = ", ".join(f"{p.name} (pid {p.pid}) {p.used / GIB:.1f} GiB" for p in largest_first)
        amount = max(self.foreign, sum(process.used for process in largest_first))
        return f"{amount / GIB:.1f} GiB are used by other processes" + (
            f": {named}" if named else " that are not visible here"
        )


@dataclass(frozen=True)
class Connection:
    """Between two GPUs, by torch's numbers. reachable: each can use the other's memory; kind: as
    nvidia-smi calls it, such as NV18 or PHB, empty where it does not say."""

    first: int
    second: int
    reachable: bool
    kind: str = ""


@dataclass(frozen=True)
class GpuProbe:
    """What torch sees. cuda: the release it was built for, "" without; architectures: like sm_90;
    reason: why it can use no GPU, empty where it can, or where there is none; hidden: somebody may
    have wanted it so; driver: empty without one; gpus, connections (of each pair):
    empty unless looked at in detail."""

    torch: str
    cuda: str
    driver: str
    count: int = 0
    architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    reason: str = ""
    hidden: bool = False
    connections: tuple[Connection, ...] = ()


def look(detailed: bool = True) -> GpuProbe:
    """Imports torch, and starts a CUDA context on every GPU when detailed."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    version = str(torch.__version__)
    number = driver.driver_version()
    cuda = torch.version.cuda or ""
    device = driver.has_device()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = not device or (visible is not None and visible.strip() in driver.HIDDEN)
    if torch.version.hip:
        reason = driver.why_no_rocm(
            torch.version.hip, number, device, count > 0 or driver.has_amd_device()
        )
        return GpuProbe(version, cuda, number, reason=reason, hidden=hidden)
    if not count:
        first = str(caught[0].message) if caught else ""
        return GpuProbe(
            version,
            cuda,
            number,
            reason=driver.why_none(cuda, number, device, first, visible),
            hidden=hidden,
        )
    gpus = tuple(survey(i) for i in range(count)) if detailed else ()
    return GpuProbe(
        version,
        cuda,
        number,
        count,
        tuple(torch.cuda.get_arch_list()),
        gpus,
        connections=connections(gpus),
    )


def connections(gpus: Sequence[Gpu]) -> tuple[Connection, ...]:
    """Of each pair of `gpus`, as CUDA and nvidia-smi see it."""
    import torch

    pairs = list(itertools.combinations(gpus, 2))
    if not pairs:
        return ()
    numbers = driver.nvidia_smi(*SMI_NUMBERS)
    kinds = driver.nvidia_smi("topo", "-m")
    return tuple(
        Connection(
            first.index,
            second.index,
            torch.cuda.can_device_access_peer(first.index, second.index)
            and torch.cuda.can_device_access_peer(second.index, first.index),
            kind_of_connection(numbers, kinds, first.uuid, second.uuid),
        )
        for first, second in pairs
    )


def kind_of_connection(numbers: str, matrix: str, first: str, second: str) -> str:
    """Of two GPUs by their UUIDs; empty where it is not said. numbers: lines like `0, GPU-1f2e`;
    matrix: what `nvidia-smi topo -m` prints, a table with a line and a column for each GPU."""
    pairs = [line.split(", ") for line in numbers.splitlines() if line.count(", ") == 1]
    names = {uuid.strip(): f"GPU{number.strip()}" for number, uuid in pairs}
    # The table is coloured where it is printed to a terminal.
    plain = re.sub(r"\x1b\[\d*m", "", matrix)
    rows = [line.split("\t") for line in plain.splitlines()]
    header = next((row for row in rows if "GPU0" in row[1:]), [])
    row = next((row for row in rows if row[0] == names.get(first)), [])
    if names.get(second) not in header:
        return ""
    column = header.index(names[second])
    return row[column].strip() if column < len(row) else ""


def survey(index: int) -> Gpu:
    """GPU `index` of torch's numbering, with the processes on it where they hold anything worth
    asking for."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    facts = torch.cuda.get_device_properties(index)
    uuid = uuid_of(facts)
    own = CONTEXT + torch.cuda.memory_reserved(index)
    gpu = Gpu(index, facts.name, (facts.major, facts.minor), total, free, uuid, own)
    return with_processes(gpu, processes(uuid)) if total - free - own > GIB // 4 else gpu


def uuid_of(facts: Any) -> str:
    """As NVIDIA's tools write it; `facts`: torch's properties of a GPU. A slice (MIG) is named so,
    and has one of its own."""
    return (
        f"{'MIG' if ' MIG ' in facts.name else 'GPU'}-{facts.uuid}"
        if hasattr(facts, "uuid")
        else ""
    )


def with_processes(gpu: Gpu, running: Sequence[Process]) -> Gpu:
    """`gpu` with what NVML knows: our own share among it replaces the estimate."""
    own = next((process.used for process in running if process.pid == os.getpid()), 0)
    others = tuple(process for process in running if process.pid != os.getpid())
    return replace(gpu, own=own or gpu.own, others=others)


def processes(uuid: str) -> list[Process]:
    """All processes with memory on the GPU, this one included; none where neither NVML's bindings
    nor nvidia-smi say."""
    listed = _from_nvml(uuid)
    return _from_smi(uuid) if listed is None else listed


def _from_nvml(uuid: str) -> list[Process] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(
            pynvml.nvmlDeviceGetHandleByUUID(uuid)
        )
    except (
        Exception
    ):  # not installed, no driver, no permission: whatever it is, somebody else may know
        return None
    return [Process(p.pid, process_name(p.pid), int(p.usedGpuMemory or 0)) for p in running]


def _from_smi(uuid: str) -> list[Process]:
    return parse_smi(driver.nvidia_smi(*SMI), uuid)


def parse_smi(text: str, uuid: str) -> list[Process]:
    """Lines like `GPU-1f2e, 4242, /usr/bin/python3, 36900` (MiB). A name may hold commas; an amount
    may be [N/A]."""
    running: list[Process] = []
    for line in text.splitlines():
        match = re.fullmatch(r"\s*([^,]+), (\d+), (.*), ([^,]+)", line)
        if match and (not uuid or match[1] == uuid):
            used = int(match[4]) << 20 if match[4].strip().isdecimal() else 0
            running.append(Process(int(match[2]), Path(match[3]).name or match[3], used))
    return running


def process_name(pid: int) -> str:
    """Of process `pid`, as /proc says."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "a process"


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
            + VOLTA * (gpu.capability == (7, 0))
            + "; --device cpu runs without it"
        )


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """sm_86 is machine code for 8.6 and later of its major number; compute_90 is compiled by the
    driver for everything later."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return False
    built = int(match[2]), int(match[3])
    if match[4]:
        return built == capability
    return built <= capability and (match[1] == "compute" or built[0] == capability[0])


def idle_elsewhere(chosen: Gpu) -> str:
    """A line where another of torch's GPUs has much more free memory than the chosen one; empty
    where none has. Starts no context there."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return ""
    built = torch.cuda.get_arch_list()
    free = parse_free(driver.nvidia_smi(*SMI_FREE))
    others: list[Gpu] = []
    for index in set(range(count)) - {chosen.index}:
        facts = torch.cuda.get_device_properties(index)
        total = int(facts.total_memory)
        others.append(
            Gpu(
                index,
                facts.name,
                (facts.major, facts.minor),
                total,
                free.get(uuid_of(facts), total - CONTEXT),
            )
        )
    return better(
        chosen,
        [other for other in others if runs(other, built)],
        os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def better(chosen: Gpu, others: Sequence[Gpu], visible: str | None) -> str:
    """The line about the one of `others` with the most free memory, if that is much more. visible:
    CUDA_VISIBLE_DEVICES."""
    best = max(others, key=lambda other: (other.free, -other.index), default=chosen)
    if best.free - chosen.free < max(MUCH_MORE, chosen.free // 10):
        return ""
    return (
        f"the model goes to {chosen.title()}, of which {chosen.free / GIB:.1f} GiB are free; {best.title()} has {best.free / GIB:.1f} GiB "
        f"free: CUDA_VISIBLE_DEVICES={name_of(best.index, visible)} takes that one (CUDA counts the fastest first; "
        f"nvidia-smi's numbers are CUDA's under CUDA_DEVICE_ORDER=PCI_BUS_ID)"
    )


def name_of(index: int, visible: str | None) -> str:
    """What CUDA_VISIBLE_DEVICES, now `visible`, is to be for torch's GPU `index` to be the only
    one."""
    return visible.split(",")[index].strip() if visible else str(index)


def parse_free(text: str) -> dict[str, int]:
    """Bytes by UUID, of lines like `GPU-1f2e, 80424` (MiB)."""
    pairs = [line.split(", ") for line in text.splitlines() if line.count(", ") == 1]
    return {uuid.strip(): int(free) << 20 for uuid, free in pairs if free.strip().isdecimal()}


def runs(gpu: Gpu, architectures: Sequence[str]) -> bool:
    """Whether our kernels run on `gpu` with a torch built for `architectures`."""
    try:
        check(gpu, architectures)
    except NoUsableGpu:
        return False
    return True


@functools.cache
def usable(asked: str) -> bool:
    """Whether the model shall run on a GPU: `asked` is auto or cuda. Raises NoUsableGpu when cuda
    is asked for in vain; says it, once, when there is a GPU that auto cannot have."""
    probe = look(detailed=False)
    if probe.count:
        return True
    if asked == "cuda":
        raise NoUsableGpu(
            f"--device cuda: {probe.reason or 'there is no NVIDIA GPU'}; `pagewire doctor` says more"
        )
    if probe.reason:
        log.warning("running on the CPU: %s", probe.reason)
    return False


def read_probe(text: str) -> GpuProbe:
    """What `python -m pagewire.worker.device.gpus` printed."""
    return msgspec.json.decode(text, type=GpuProbe)


def main() -> None:
    """Print what torch sees, as JSON for `read_probe`."""
    print(msgspec.json.encode(look()).decode())


if __name__ == "__main__":
    main()
