"""What `pagewire doctor` says of a model that is divided among several ranks: whether it can be,
whether the machine has what they need, how they reach each other, and what each of them holds.

The arithmetic of memory is done in a process of its own, which imports torch.
"""

import importlib.metadata
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from ..config import ModelConfig, SchedulerConfig, WorkerConfig
from ..hub import huggingface
from ..launch import stack
from ..process import processors
from ..worker.device.gpu_kinds import check_alike
from ..worker.device.gpus import GIB, Connection, Gpu, GpuProbe, NoUsableGpu, check
from ..worker.load import early
from ..worker.load.sources import locate
from ..worker.models import FAMILIES, describe
from ..worker.models.architecture import read_config
from ..worker.models.ranks import MOST_STAGES, check_ranks, check_undivided, possible_sizes

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
    if worker.world_size == 1:
        return
    gpus = ranks_gpus(worker, probe)
    yield "ranks", lambda: check_places(worker, probe)
    if gpus:
        yield "peers", lambda: check_peers(probe.connections, gpus, worker)
        yield "shared memory", check_shared_memory
    path = huggingface.cached(model)
    if path is not None and worker.device != "fake":
        yield "division", lambda: check_division(path, model, worker)
        yield "rank memory", lambda: check_memory(path, model, worker, gpus)


def ranks_gpus(worker: WorkerConfig, probe: GpuProbe) -> tuple[Gpu, ...]:
    """Of the ranks, in their order, as far as there are any; none on CPUs."""
    if worker.device not in ("auto", "cuda"):
        return ()
    return probe.gpus[: worker.world_size]


def check_places(worker: WorkerConfig, probe: GpuProbe) -> Result:
    """Whether there is a GPU for each rank, and who starts them. Raises config.BadSetting."""
    stack.check_backend(worker)
    gpus = ranks_gpus(worker, probe)
    size = worker.world_size
    by_ray = worker.distributed_executor_backend == "ray"
    placed = f"; placed by Ray {importlib.metadata.version('ray')}" if by_ray else ""
    if not gpus:
        mark, text = _on_cpus(worker)
        return mark, text + placed
    titles = ", ".join(gpu.title() for gpu in gpus)
    if len(gpus) < size and by_ray:
        missing = size - len(gpus)
        return (
            "note",
            f"{size} ranks need {missing} GPU(s) of other hosts beside this one's {len(gpus)}{placed}, "
            "whose cluster is not asked here: `ray status` says what it has",
        )
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
    stages = worker.pipeline_parallel_size
    divided = f", {stages} stages of {worker.tensor_parallel_size}," if stages > 1 else ""
    text = "; ".join([f"{size} ranks{divided} on {titles}", *notes]) + placed
    return ("note" if notes else "ok"), text


def _on_cpus(worker: WorkerConfig) -> Result:
    size = worker.world_size
    stages = worker.pipeline_parallel_size
    cores = processors.usable()
    each = worker.threads or max(1, cores // size)
    processes = f"{size} processes"
    slower = "slower than one process with all cores"
    if stages > 1:
        processes += f", {stages} stages of {worker.tensor_parallel_size} rank(s),"
        slower = f"one request at a time is {slower}"
    text = f"{processes} with {each} thread(s) each on {cores} core(s), connected by gloo: {slower}"
    return ("note" if size > cores else "ok"), text


def check_peers(
    connections: Sequence[Connection], gpus: Sequence[Gpu], worker: WorkerConfig
) -> Result:
    """Whether the ranks reach each other's memory, and over what."""
    has_sums = worker.tensor_parallel_size > 1
    indices = {gpu.index for gpu in gpus}
    between = [each for each in connections if {each.first, each.second} <= indices]
    apart = [each for each in between if not each.reachable]
    if apart:
        pairs = ", ".join(f"GPU {each.first} and GPU {each.second}{_kind(each)}" for each in apart)
        through = (
            "all collective operations go through NCCL, which is slower for few rows"
            if has_sums
            else "NCCL hands on hidden states through the host's memory"
        )
        return "note", f"{pairs} cannot use each other's memory: {through}"
    kinds = sorted({each.kind for each in between} - {""})
    over = f" over {', '.join(kinds)}" if kinds else ""
    slow = [kind for kind in kinds if not kind.startswith(NVLINK)]
    text = f"the ranks' GPUs can use each other's memory{over}"
    if slow:
        waits = "every layer waits for it twice" if has_sums else "hidden states go over it"
        return "note" if has_sums else "ok", f"{text}; {', '.join(slow)} is PCIe, and {waits}"
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
    stages = worker.pipeline_parallel_size
    early.check(path, model)
    location = locate(path, model.load_format)
    if not location.path.is_dir():
        return "note", "whether a GGUF file's model can be divided is seen when it is loaded"
    config = read_config(location.path)
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        check_undivided(kind, size, stages)
    arch = describe(config)
    check_ranks(arch, size, stages)
    possible = ", ".join(map(str, possible_sizes(arch)))
    text = f"this {kind} model can be divided among {possible} ranks"
    if stages > 1:
        most = min(arch.num_layers, MOST_STAGES)
        text = f"{text}, in each of 1 to {most} stages of its {arch.num_layers} layers"
    return "ok", text


def check_memory(
    path: Path, model: ModelConfig, worker: WorkerConfig, gpus: Sequence[Gpu]
) -> Result:
    """What each rank holds, in numbers."""
    size = worker.world_size
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
    return "ok", (
        f"{_held(forecast['stages'])}, {forecast['tokens']:,} tokens in all; contexts of up to "
        f"{forecast['max_model_len']:,}"
    )


def _held(stages: Sequence[dict[str, Any]]) -> str:
    """By each rank, in words; stages that follow each other and have the same are told together."""
    if len(stages) == 1:
        return f"each rank holds {_gib(stages[0])}"
    last = len(stages) - 1
    beside = {0: ", embedding", last: ", head"}
    described = [
        f"({stage['layers']} layer{'s' * (stage['layers'] > 1)}{beside.get(number, '')}) holds {_gib(stage)}"
        for number, stage in enumerate(stages)
    ]
    phrases: list[str] = []
    for phrase, alike in itertools.groupby(range(len(stages)), lambda number: described[number]):
        numbers = list(alike)
        several = f"s {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f" {numbers[0]}"
        phrases.append(f"each rank of stage{several} {phrase}")
    return "; ".join(phrases)


def _gib(stage: dict[str, Any]) -> str:
    weights = stage["weights"] / GIB
    cache = stage["cache"] / GIB
    return f"{weights:.2f} GiB of weights and {cache:.2f} GiB of KV cache"
