"""What one stack on this machine consists of: its run directory and the command line of each of its
services.

Shared by `pagewire serve` and `LLM`. It knows the settings, not the processes.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import Struct, structs
from pagewire_protocol.channels import check_unused, prepare_run_dir
from pagewire_protocol.structs import Role

from ..config import (
    BadSetting,
    FrontendConfig,
    ModelConfig,
    RunConfig,
    SchedulerConfig,
    TokenizerConfig,
    WorkerConfig,
    ranks_share_a_gpu,
    to_flags,
)
from ..frontend.auth import KEYS_VARIABLE
from ..process.announce import Announcer
from .supervisor import Service, ServiceDeath

_numbers = itertools.count()


class StackConfig(Struct, frozen=True):
    """Everything that a stack is started with. `frontend` is None when the program itself holds the
    requests (`LLM`)."""

    run: RunConfig
    model: ModelConfig
    tokenizer: TokenizerConfig
    scheduler: SchedulerConfig
    worker: WorkerConfig
    frontend: FrontendConfig | None = None
    num_frontends: int = 1
    num_tokenizers: int = 1
    num_workers: int = 1


def replicas(cores: int, device: str, has_gpu: bool) -> tuple[int, int]:
    """(frontends, tokenizers) of a machine where nobody said how many. One frontend and one
    tokenizer keep up with a model on a CPU, whose worker wants every core. Beside a GPU, worker,
    scheduler and they take a core each; from 8 cores on, others have nothing else to do."""
    on_gpu = device == "cuda" or (device == "auto" and has_gpu)
    if cores < 8 or not (on_gpu or device == "fake"):
        return 1, 1
    return min(4, cores // 4), 2


def has_gpu() -> bool:
    """Whether a driver for NVIDIA's GPUs is loaded; asking torch would take seconds."""
    return Path("/dev/nvidiactl").exists()


def gpus() -> list[str]:
    """The GPUs that this process may use, by CUDA's numbers or by the names that
    CUDA_VISIBLE_DEVICES gives them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    return list(
        itertools.takewhile(
            lambda name: name not in ("", "-1"), (name.strip() for name in visible.split(","))
        )
    )


def check_workers(config: StackConfig) -> StackConfig:
    """`config` itself. Raises BadSetting when there are more workers than the GPUs have room
    for, and when their ranks cannot be started as asked for."""
    check_backend(config.worker)
    if is_placed_by_ray(config.worker):
        return config  # other hosts of Ray's cluster may have GPUs, too
    visible = gpus() if config.worker.device in ("auto", "cuda") else []
    _check_ranks(config, visible)
    share = config.worker.gpu_memory_utilization
    room_each = int(1 / share + 1e-6)
    room = len(visible) * room_each
    if visible and config.num_workers > room:
        each = f"with room for {room_each} each at --gpu-memory-utilization {share:g}"
        raise BadSetting(
            "num_workers",
            config.num_workers,
            f"there are {len(visible)} GPU(s), {each}; lower one of the two",
        )
    return config


def check_backend(worker: WorkerConfig) -> None:
    """Raises BadSetting when the ranks of a worker cannot be started as asked for."""
    backend = worker.distributed_executor_backend
    ranks = worker.world_size
    if backend == "uni" and ranks > 1:
        raise BadSetting(
            "distributed_executor_backend", backend, f"one process cannot be {ranks} ranks: use mp"
        )
    if backend == "ray" and ranks > 1 and importlib.util.find_spec("ray") is None:
        raise BadSetting(
            "distributed_executor_backend",
            backend,
            "Ray is not installed: pip install 'pagewire[ray]'",
        )


def is_placed_by_ray(worker: WorkerConfig) -> bool:
    """Whether Ray says which GPUs the ranks get, of this host and others."""
    return worker.distributed_executor_backend == "ray" and worker.world_size > 1


def _check_ranks(config: StackConfig, visible: list[str]) -> None:
    """Raises BadSetting when there are more ranks than `visible` GPUs, where there are any."""
    worker = config.worker
    ranks = worker.world_size
    needed = config.num_workers * ranks
    if not visible or ranks == 1 or needed <= len(visible) or ranks_share_a_gpu():
        return
    name, several = "tensor_parallel_size", ""
    if worker.pipeline_parallel_size > 1:
        name, several = "pipeline_parallel_size", f", {ranks} in all"
    if config.num_workers > 1:
        several += f" for each of {config.num_workers} workers"
    raise BadSetting(
        name,
        getattr(worker, name),
        f"a GPU a rank is needed{several}, and there are {len(visible)}: {', '.join(visible)}",
    )


def notes(worker: WorkerConfig, written: Callable[[str, Any], str]) -> list[str]:
    """A line for each setting of a worker that has no effect. `written`: a setting as its user
    wrote it."""
    if worker.distributed_executor_backend == "ray" and worker.world_size == 1:
        setting = written("distributed_executor_backend", "ray")
        return [f"{setting} has no effect: one rank is a process of this machine"]
    return []


def needs_files(config: StackConfig) -> bool:
    """Whether any service reads the model's files at all."""
    return not (config.worker.device == "fake" and config.model.skip_tokenizer_init)


def early_services(config: StackConfig) -> list[Service]:
    """Those that need no model files: they start before a download has ended."""
    services = []
    if config.frontend is not None:
        fd = config.frontend.socket_fd
        for i in range(config.num_frontends):
            service = _service(
                config.run,
                "frontend",
                i,
                config.model,
                config.frontend,
                fds=(fd,) if fd >= 0 else (),
            )
            drain_s = max(config.frontend.shutdown_timeout, config.run.shutdown_delay)
            services.append(dataclasses.replace(service, drain_s=drain_s))
    return [*services, _service(config.run, "scheduler", 0, config.model, config.scheduler)]


def model_services(config: StackConfig, model: ModelConfig) -> list[Service]:
    """Workers first, since theirs is the longest way to ready; several take turns over the GPUs
    there are. Each is one process or a group of ranks. `model` names local files."""
    homes = gpus() if config.worker.device in ("auto", "cuda") else []
    ranks = config.worker.world_size
    workers: list[Service] = []
    for i in range(config.num_workers):
        run = structs.replace(config.run, name=f"worker-{i}")
        service = worker_service(run, model, config.scheduler, config.worker)
        if homes and config.num_workers > 1:
            # a rank sees the GPUs of its whole group
            own = [homes[(i * ranks + rank) % len(homes)] for rank in range(ranks)]
            place = (("CUDA_VISIBLE_DEVICES", ",".join(own)),)
            service = dataclasses.replace(service, environment=place)
        workers += ranks_of(service, ranks)
    return workers + [
        _service(config.run, "tokenizer", i, model, config.tokenizer)
        for i in range(config.num_tokenizers)
    ]


def worker_service(
    run: RunConfig, model: ModelConfig, scheduler: SchedulerConfig, worker: WorkerConfig
) -> Service:
    """The worker called `run.name`, or after this process."""
    name = run.name or f"worker-{os.getpid()}"
    return _named(run, "worker", name, model, scheduler, worker)


def ranks_of(worker: Service, size: int) -> list[Service]:
    """The processes of a worker: itself, or the ranks of its group, of which the first has the
    worker's name."""
    if size == 1:
        return [worker]
    return [
        dataclasses.replace(
            worker,
            name=rank_name(worker.name, rank),
            arguments=tuple(
                f"--name={rank_name(worker.name, rank)}"
                if word == f"--name={worker.name}"
                else word
                for word in worker.arguments
            ),
            group=worker.name,
            rank=rank,
        )
        for rank in range(size)
    ]


def rank_name(worker: str, rank: int) -> str:
    """The name of a rank's process."""
    return f"{worker}.{rank}" if rank else worker


def announce(announcer: Announcer, death: ServiceDeath) -> None:
    """Tell the stack that one of its services has ended."""
    announcer.announce(
        Role[death.service.kind.upper()],
        death.service.name,
        death.incarnation,
        death.cause,
        death.failures,
        death.pause_s,
    )


def local_model(model: ModelConfig, files: Path, tokenizer: Path | None) -> ModelConfig:
    """`model` with its files in place of its name, so that no service looks for them again."""
    return structs.replace(
        model, model=str(files), tokenizer=str(tokenizer or ""), revision="", download_dir=""
    )


def _service(
    run: RunConfig, kind: str, number: int, *configs: Struct, fds: tuple[int, ...] = ()
) -> Service:
    return _named(run, kind, f"{kind}-{number}", *configs, fds=fds)


def _named(
    run: RunConfig, kind: str, name: str, *configs: Struct, fds: tuple[int, ...] = ()
) -> Service:
    """API keys go through the environment: command lines can be read by everyone on a machine."""
    keys = [
        key for config in configs if isinstance(config, FrontendConfig) for key in config.api_key
    ]
    flags = [
        flag
        for config in (structs.replace(run, name=name), *configs)
        for flag in to_flags(_without_keys(config))
    ]
    secrets = ((KEYS_VARIABLE, json.dumps(keys)),) if keys else ()
    return Service(name, (kind, *flags), fds, environment=secrets)


def _without_keys(config: Struct) -> Struct:
    return structs.replace(config, api_key=()) if isinstance(config, FrontendConfig) else config


def new_run_dir() -> Path:
    """A private directory of this process's own, `/tmp/pagewire-UID/PID-START-N`; those of dead
    processes are removed on the way."""
    root = prepare_run_dir(f"/tmp/pagewire-{os.getuid()}")
    for old in root.iterdir():
        if _is_abandoned(old.name):
            shutil.rmtree(old, ignore_errors=True)
    return prepare_run_dir(f"{root}/{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}")


def take_run_dir(named: str) -> Path:
    """The directory that the user named. Raises AlreadyRunning before any service of a second stack
    could join the first."""
    run_dir = prepare_run_dir(named)
    check_unused(run_dir)
    return run_dir


def remove_run_dir(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(name: str) -> bool:
    fields = name.split("-")
    return (
        len(fields) == 3
        and all(field.isdecimal() for field in fields)
        and _start_time(int(fields[0])) != int(fields[1])
    )


def _start_time(pid: int) -> int:
    """When `pid` started, in clock ticks since boot; -1 when there is no such process. Field 22 of
    proc(5)."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return -1
