"""`pagewire doctor` in one of Pagewire's images: what is installed there is what one service needs,
its port is taken by itself, and its file system is read-only on purpose. So the findings are about
that service and the stack that it belongs to.

    docker compose exec worker pagewire doctor
"""

import contextlib
import http.client
import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from pagewire_protocol.channels import Inbox, Outbox, inbox_address, prepare_run_dir
from pagewire_protocol.messages import Heartbeat, Peer, Role, Roster

from ..cli import IMAGE_VARIABLE, READ, parse_structs
from ..config import ModelConfig, WorkerConfig, default_run_dir
from ..version import __version__

PACKAGES: Final = {
    "frontend": ("pyzmq", "msgspec", "uvloop", "aiohttp", "prometheus-client", "PyYAML"),
    "scheduler": ("pyzmq", "msgspec", "numpy", "PyYAML"),
    "tokenizer": ("pyzmq", "msgspec", "numpy", "tokenizers", "jinja2", "huggingface-hub", "gguf"),
    "worker": ("pyzmq", "msgspec", "numpy", "torch", "transformers", "safetensors", "gguf"),
}
"""What an image must have, by its service."""
FOR_RANKS: Final = {
    ModelConfig: READ["worker"][ModelConfig],
    WorkerConfig: (
        "device",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "distributed_executor_backend",
        "dtype",
        "kv_cache_dtype",
        "block_size",
        "num_kv_blocks",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "fit",
        "cpu_kv_cache_gb",
        "threads",
        "enforce_eager",
    ),
}
"""The settings that the forecast for a worker's ranks reads."""
SETTINGS: Final = "/etc/pagewire/settings.yaml"
"""The stack's settings, as compose/default.yaml gives them to each service."""
TIMEOUT_S: Final = 4.0
LOW_MEMORY: Final = 0.05
"""Share of a container's memory that must be free."""
Result = tuple[str, str]
"""The mark (ok, note or BROKEN) and the text of a finding."""


def main(arguments: list[str]) -> int:
    """Returns 1 when a check found a defect."""
    image = os.environ[IMAGE_VARIABLE]
    if Path(SETTINGS).exists() and not any(word.startswith("--config") for word in arguments):
        arguments = [f"--config={SETTINGS}", *arguments]
    model, worker = parse_structs(
        "doctor",
        "Check this container's service and its stack. The exit code is 1 when something is broken.",
        (ModelConfig, WorkerConfig),
        arguments,
        FOR_RANKS,
    )
    broken: list[str] = []
    for subject, check in checks(image, model, worker):
        try:
            mark, text = check()
        except Exception as error:  # whatever is broken must not hide the checks that follow
            mark = "BROKEN"
            text = f"{error}" or type(error).__name__
        print(f"{mark:<7} {subject:<14} {text}", flush=True)
        if mark == "BROKEN":
            broken.append(subject)
    print(f"\nbroken: {', '.join(broken)}" if broken else "\neverything works")
    return 1 if broken else 0


def checks(
    image: str, model: ModelConfig, worker: WorkerConfig
) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Those of an image, with their subjects."""
    yield "versions", lambda: check_versions(image)
    yield "run directory", check_run_dir
    if image in ("worker", "all"):
        yield "device", lambda: check_device(worker.device)
        yield from check_ranks(model, worker)
    yield "memory", check_memory
    if image in ("tokenizer", "worker", "all"):
        yield "model cache", check_cache
    if image in ("frontend", "all"):
        yield "port", check_port
    yield "stack", check_stack


def check_versions(image: str) -> Result:
    """Whether the image has what its service needs."""
    needed = PACKAGES.get(image) or tuple(dict.fromkeys(sum(PACKAGES.values(), ())))
    versions = [f"pagewire {__version__} ({image})", f"Python {platform.python_version()}"]
    missing: list[str] = []
    for name in needed:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return "BROKEN", f"{', '.join(missing)} not installed: build the image again"
    return "ok", ", ".join(versions)


def check_run_dir() -> Result:
    """Whether the sockets' directory can be used."""
    path = prepare_run_dir(default_run_dir())
    if not os.access(path, os.W_OK):
        return "BROKEN", f"user {os.getuid()} cannot write to {path}"
    return "ok", f"{path} can be written"


def check_device(device: str) -> Result:
    """As on any machine."""
    from . import doctor

    finding = doctor.check_device(doctor.look_at_gpus(), device)
    return finding.mark, finding.text


def check_ranks(
    model: ModelConfig, worker: WorkerConfig
) -> Iterator[tuple[str, Callable[[], Result]]]:
    """The same of a worker of several ranks, which are all in one container."""
    if worker.world_size == 1:
        return
    from . import doctor, doctor_ranks

    with contextlib.suppress(RuntimeError):  # the device's finding says so
        yield from doctor_ranks.list_checks(model, worker, doctor.look_at_gpus())


def check_memory() -> Result:
    """What this container may use, and does."""
    limit = _cgroup("memory.max")
    used = _cgroup("memory.current")
    if limit is None or used is None:
        return "ok", "no limit for this container"
    text = f"{used / 2**30:.2f} of {limit / 2**30:.2f} GiB used"
    return ("note" if used > (1 - LOW_MEMORY) * limit else "ok"), text


def _cgroup(name: str) -> int | None:
    """A figure of this container's control group, where it is one."""
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def check_cache() -> Result:
    """Whether models can be kept."""
    path = Path(os.environ.get("HF_HOME", "/cache/huggingface"))
    while not path.exists():
        path = path.parent
    if not os.access(path, os.W_OK):
        return "note", f"user {os.getuid()} cannot write to {path}: models must be there already"
    return "ok", f"{shutil.disk_usage(path).free / 2**30:.1f} GiB free in {path}"


def check_port() -> Result:
    """What this container's frontend answers."""
    port = int(os.environ.get("PORT") or 8000)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("GET", "/ready")
    answer = connection.getresponse()
    text = answer.read(1000).decode(errors="replace")
    if answer.status == 200:
        return "ok", f"/ready on port {port} says 200"
    return "BROKEN", f"/ready on port {port} says {answer.status}: {text}"


def check_stack() -> Result:
    """What the scheduler lists."""
    peers = ask_scheduler(default_run_dir())
    if peers is None:
        return (
            "BROKEN",
            f"the scheduler does not answer in {default_run_dir()} within {TIMEOUT_S:g} s",
        )
    return judge(peers)


def judge(peers: Sequence[Peer]) -> Result:
    """Whether a stack of these can generate, and what each of them lacks."""
    ready = [peer for peer in peers if peer.ready]
    counts = [
        f"{count} {role.name.lower()}{'s' if count > 1 else ''}"
        for role in (Role.FRONTEND, Role.TOKENIZER, Role.WORKER)
        if (count := sum(peer.role is role for peer in ready))
    ]
    waiting = [f"{peer.name}: {peer.stage or 'starting'}" for peer in peers if not peer.ready]
    missing = [
        f"no {role.name.lower()} is ready"
        for role in (Role.TOKENIZER, Role.WORKER)
        if not any(peer.role is role for peer in ready)
    ]
    text = "; ".join([*missing, f"ready: {', '.join(counts) or 'none'}", *waiting])
    if missing:
        return "BROKEN", text
    return ("note" if waiting else "ok"), text


def ask_scheduler(directory: str) -> tuple[Peer, ...] | None:
    """The processes that the scheduler lists; None where none answers. A heartbeat from a process
    that it does not know is answered with the roster."""
    run_dir = prepare_run_dir(directory)
    own = int.from_bytes(f"{socket.gethostname()}-{os.getpid()}".encode()[-7:], "big") | 1
    inbox: Inbox[Roster] = Inbox(run_dir, Role.WORKER, own)  # type: ignore[arg-type]
    outbox = Outbox()
    try:
        address = inbox_address(run_dir, Role.SCHEDULER, 0)  # type: ignore[arg-type]
        outbox.send(address, Heartbeat(inbox.address, own, 0, False))  # type: ignore[arg-type]
        deadline = time.monotonic() + TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0 and inbox.wait(left):
            for message in inbox.drain():
                if isinstance(message, Roster):
                    return message.peers
    finally:
        outbox.close()
        inbox.close()
    return None
