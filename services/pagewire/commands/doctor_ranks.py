"""What `pagewire doctor` says of a model that is divided among several ranks: whether it can be,
whether the machine has what they need, how they reach each other, and what each of them holds.

The arithmetic of memory is done in a process of its own, which imports torch.
"""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from ..config import ModelConfig, SchedulerConfig, WorkerConfig
from ..hub import huggingface
from ..launch import stack
from ..worker.device.gpu_kinds import check_alike
from ..worker.device.gpus import GIB, Connection, Gpu, GpuProbe, NoUsableGpu, check
from ..worker.load import early
from ..worker.load.sources import locate
from ..worker.models import FAMILIES, describe
from ..worker.models.architecture import read_config
from ..worker.models.ranks import check_ranks, check_undivided, possible_sizes

Result = tuple[Literal["ok", "note", "BROKEN"], str]
"""The mark (ok, note or BROKEN) and the text of a finding."""
FORECAST: Final = "pagewire.worker.load.rank_forecast"
FORECAST_S: Final = 120
SHARED_MEMORY: Final = Path("/dev/shm")
LEAST_SHARED_MEMORY: Final = GIB // 4
"""Of what NCCL and torch share between processes on GPUs."""
NVLINK: Final = "NV"
"""What nvidia-smi's names of NVLink connections begin with; others go over PCIe."""


def list_checks(
    model: ModelConfig, worker: WorkerConfig, probe: GpuProbe
) -> Iterator[tuple[str, Callable[[], Result]]]:
    """The checks with their subjects; none where there is one rank."""
    if worker.tensor_parallel_size == 1:
        return
    gpus = ranks_gpus(worker, probe)
    yield "ranks", lambda: check_places(worker, probe)
    if gpus:
        yield "peers", lambda: check_peers(probe.connections, gpus)
        yield "shared memory", check_shared_memory
    path = huggingface.cached(model)
    if path is not None and worker.device != "fake":
        yield "division", lambda: check_division(path, model, worker)
        yield "rank memory", lambda: check_memory(path, model, worker, gpus)


def ranks_gpus(worker: WorkerConfig, probe: GpuProbe) -> tuple[Gpu, ...]:
    """Of the ranks, in their order, as far as there are any; none on CPUs."""
    if worker.device not in ("auto", "cuda"):
        return ()
    return probe.gpus[: worker.tensor_parallel_size]


def check_places(worker: WorkerConfig, probe: GpuProbe) -> Result:
    """Whether there is a GPU for each rank, and who starts them. Raises config.BadSetting."""
    stack.check_backend(worker)
    size = worker.tensor_parallel_size
    by_ray = worker.distributed_executor_backend == "ray"
    placed = f"; placed by Ray {importlib.metadata.version('ray')}" if by_ray else ""
    if worker.device not in ("auto", "cuda") or not probe.gpus:
        cores = stack.cores()
        each = worker.threads or max(1, cores // size)
        text = (
            f"{size} processes with {each} thread(s) each on {cores} core(s), connected by gloo: "
            f"slower than one process with all cores{placed}"
        )
        return ("note" if size > cores else "ok"), text
    gpus = ranks_gpus(worker, probe)
    titles = ", ".join(gpu.title() for gpu in gpus)
    if len(gpus) < size:
        return (
            "BROKEN",
            f"a GPU a rank is needed, {size} in all, and there are {len(gpus)}: {titles}",
        )
    try:
        for gpu in gpus:
            check(gpu, probe.architectures)
        line = check_alike(gpus)
    except NoUsableGpu as error:
        return "BROKEN", str(error)
    busy = [f"{gpu.title()}: {users}" for gpu in gpus if (users := gpu.users())]
    notes = [line, *busy] if line else busy
    text = "; ".join([f"{size} ranks on {titles}", *notes]) + placed
    return ("note" if notes else "ok"), text


def check_peers(connections: Sequence[Connection], gpus: Sequence[Gpu]) -> Result:
    """Whether the ranks reach each other's memory, and over what."""
    indices = {gpu.index for gpu in gpus}
    between = [each for each in connections if {each.first, each.second} <= indices]
    apart = [each for each in between if not each.reachable]
    if apart:
        pairs = ", ".join(f"GPU {each.first} and GPU {each.second}{_kind(each)}" for each in apart)
        return "note", (
            f"{pairs} cannot use each other's memory: all collective operations go through NCCL, "
            "which is slower for few rows"
        )
    kinds = sorted({each.kind for each in between} - {""})
    over = f" over {', '.join(kinds)}" if kinds else ""
    slow = [kind for kind in kinds if not kind.startswith(NVLINK)]
    text = f"the ranks' GPUs can use each other's memory{over}"
    if slow:
        return "note", f"{text}; {', '.join(slow)} is PCIe, and every layer waits for it twice"
    return "ok", text


def _kind(connection: Connection) -> str:
    return f" ({connection.kind})" if connection.kind else ""


def check_shared_memory() -> Result:
    """Whether a container has some for the GPUs' libraries."""
    facts = os.statvfs(SHARED_MEMORY)
    size = facts.f_frsize * facts.f_blocks
    text = f"{size / GIB:.2f} GiB in {SHARED_MEMORY}"
    if size < LEAST_SHARED_MEMORY:
        return (
            "note",
            f"{text}, which NCCL may find too small: start a container with --shm-size=1g",
        )
    return "ok", text


def check_division(path: Path, model: ModelConfig, worker: WorkerConfig) -> Result:
    """Whether the model at `path` can be divided so. Raises Unsupported with what could be."""
    size = worker.tensor_parallel_size
    early.check(path, model)
    location = locate(path, model.load_format)
    if not location.path.is_dir():
        return "note", "whether a GGUF file's model can be divided is seen when it is loaded"
    config = read_config(location.path)
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        check_undivided(kind, size)
    arch = describe(config)
    check_ranks(arch, size)
    possible = ", ".join(map(str, possible_sizes(arch)))
    return "ok", f"this {kind} model can be divided among {possible} ranks"


def check_memory(
    path: Path, model: ModelConfig, worker: WorkerConfig, gpus: Sequence[Gpu]
) -> Result:
    """What each rank holds, in numbers."""
    size = worker.tensor_parallel_size
    if gpus and len(gpus) < size:
        return "note", f"not reckoned: there are {len(gpus)} GPUs for {size} ranks"
    request = {
        "path": str(path),
        "model": model,
        "scheduler": SchedulerConfig(),
        "worker": worker,
        "gpus": gpus,
    }
    done = subprocess.run(
        [sys.executable, "-m", FORECAST],
        input=msgspec.json.encode(request),
        capture_output=True,
        timeout=FORECAST_S,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        return "BROKEN", lines[-1].partition(": ")[2] or lines[-1]
    forecast = msgspec.json.decode(done.stdout.splitlines()[-1])
    if forecast["reason"]:
        return "BROKEN", forecast["reason"]
    weights, cache = forecast["weights"] / GIB, forecast["cache"] / GIB
    return "ok", (
        f"each rank holds {weights:.2f} GiB of weights and {cache:.2f} GiB of KV cache, "
        f"{forecast['tokens']:,} tokens in all; contexts of up to {forecast['max_model_len']:,}"
    )
