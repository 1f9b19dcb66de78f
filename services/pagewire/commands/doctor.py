"""`pagewire doctor`: checks this machine and prints in plain words what works, what does not, and
what to do about it.

Each check is a function that returns one finding. Torch is imported in a process of its own, so
that a broken installation is a finding and not a crash.
"""

import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msgspec import structs

from ..cli import add_model, hide, new_parser, read_all, take_model, unread
from ..config import DEMO_MODEL, FrontendConfig, ModelConfig, WorkerConfig, add_flags
from ..hub import huggingface
from ..process.listening import listening_socket
from ..process.parent import how_it_ended
from ..version import __version__
from ..worker.device import kernel_cache
from ..worker.device.gpus import GpuProbe, NoUsableGpu, better, name_of, read_probe, runs
from ..worker.device.gpus import check as check_gpu
from ..worker.load.precision import BFLOAT16_FROM
from .doctor_gpus import describe

Mark = Literal["ok", "note", "BROKEN"]
PACKAGES = (
    "pyzmq",
    "msgspec",
    "uvloop",
    "aiohttp",
    "tokenizers",
    "jinja2",
    "numpy",
    "torch",
    "transformers",
    "safetensors",
    "gguf",
    "tqdm",
)
OPTIONAL = ("uvloop", "tqdm", "triton")
LOW_MEMORY_GB = 2.0
LOW_DISK_GB = 2.0
PROBE_S = 120
"""How long torch may take to find the GPUs."""
TRIAL_BLOCKS = 64
TRIAL_CONTEXT = 512
"""KV blocks and context, in tokens, of the trial generation: so few that it fits beside a running
server."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check, which is one line of the output."""

    mark: Mark
    subject: str
    text: str


def check_versions() -> Finding:
    """Which packages are installed."""
    versions = [f"pagewire {__version__}", f"Python {platform.python_version()}"]
    missing: list[str] = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    needed = [name for name in missing if name not in OPTIONAL]
    if needed:
        return Finding(
            "BROKEN", "versions", f"{', '.join(needed)} not installed; pip install 'pagewire[all]'"
        )
    return Finding("ok", "versions", ", ".join(versions))


def look_at_gpus() -> GpuProbe:
    """What torch sees, asked in a process of its own. Raises RuntimeError with the last line of its
    output where torch cannot be imported."""
    command = [sys.executable, "-m", "pagewire.worker.device.gpus"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    if result.returncode < 0:
        raise RuntimeError(f"the process that imports torch {how_it_ended(result.returncode)}")
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or ["torch cannot be imported"])[-1])
    return read_probe(result.stdout)


def check_device(probe: GpuProbe, device: str) -> Finding:
    """Which device the model would run on. `device` is the flag: that torch cannot use a GPU is no
    defect where the CPU was chosen."""
    built = f"torch {probe.torch}" + (f" for CUDA {probe.cuda}" if probe.cuda else "")
    if probe.gpus:
        return _first_gpu(probe, built, device)
    if probe.reason:
        is_needed = device == "cuda" or (device == "auto" and not probe.hidden)
        return Finding("BROKEN" if is_needed else "note", "device", f"{probe.reason} ({built})")
    none = f"no GPU: the model runs on {os.cpu_count()} CPU cores of {cpu_name()} ({built})"
    return (
        Finding("BROKEN", "device", f"--device cuda, but {none}")
        if device == "cuda"
        else Finding("note", "device", none)
    )


def _first_gpu(probe: GpuProbe, built: str, device: str) -> Finding:
    """The GPU that a worker takes; of several, how to choose a better one."""
    built = f"({built}, driver {probe.driver or 'unknown'})"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device not in ("auto", "cuda"):
        return Finding("ok", "device", f"--device {device}: no GPU is used {built}")
    first, *further = probe.gpus
    further = [gpu for gpu in further if runs(gpu, probe.architectures)]
    try:
        check_gpu(first, probe.architectures)
    except NoUsableGpu as error:
        instead = (
            f"; CUDA_VISIBLE_DEVICES={name_of(further[0].index, visible)} takes {further[0].title()}"
            if further
            else ""
        )
        return Finding("BROKEN", "device", f"{error}{instead}")
    line = better(first, further, visible)
    return Finding(
        "note" if line else "ok",
        "device",
        f"{line or 'the model goes to ' + first.title()} {built}",
    )


def check_each_gpu(probe: GpuProbe) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """A check for each GPU, with its subject."""
    for gpu in probe.gpus:
        subject = f"GPU {gpu.index}"
        usable, text = describe(gpu, probe)
        limited = not usable or gpu.users() or gpu.capability < BFLOAT16_FROM
        yield subject, functools.partial(Finding, "note" if limited else "ok", subject, text)


def check_compiler() -> Finding:
    """Whether there is a C compiler, which Triton builds its launchers with."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        return Finding(
            "BROKEN",
            "compiler",
            f"no C compiler ({', '.join(names)}), which the GPU's kernels need: install gcc",
        )
    return Finding("ok", "compiler", compiler)


def check_kernel_cache() -> Finding:
    """Whether compiled kernels can be kept from one start to the next."""
    try:
        directory = kernel_cache.usual()
        kernel_cache.try_writing(directory)
    except (OSError, RuntimeError) as error:
        text = f"compiled kernels cannot be kept, so that each start compiles them: {error}; set {kernel_cache.VARIABLE}"
        return Finding("note", "kernel cache", text)
    return Finding(
        "ok", "kernel cache", f"{kernel_cache.compiled(directory)} compiled kernels in {directory}"
    )


def cpu_name() -> str:
    """The processor's model name."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def check_memory() -> Finding:
    """How much of the host's memory is free, and how much this container may use."""
    facts = {
        line.split(":")[0]: int(line.split()[1]) / 2**20
        for line in _lines("/proc/meminfo")
        if line.split()[1:2]
    }
    free = facts.get("MemAvailable", 0.0)
    total = facts.get("MemTotal", 0.0)
    limit = next(
        (int(line) / 2**30 for line in _lines("/sys/fs/cgroup/memory.max") if line.isdecimal()),
        None,
    )
    text = f"{free:.1f} of {total:.1f} GiB free" + (
        f", this container may use {limit:.1f} GiB" if limit else ""
    )
    low = min(free, limit or free) < LOW_MEMORY_GB
    return Finding(
        "BROKEN" if low else "ok",
        "memory",
        text + ("; the demo alone needs about 2 GiB" if low else ""),
    )


def check_disk() -> Finding:
    """How much room there is for downloads."""
    directory = huggingface.cache_dir()
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free / 2**30
    low = free < LOW_DISK_GB
    return Finding(
        "note" if low else "ok",
        "disk",
        f"{free:.1f} GiB free in {directory}" + ("; downloads may not fit" if low else ""),
    )


def check_run_dir() -> Finding:
    """Whether the directory of the services' sockets can be made."""
    from ..launch.stack import new_run_dir, remove_run_dir

    path = new_run_dir()
    remove_run_dir(path)
    return Finding("ok", "run directory", f"{path.parent} can be written")


def check_model(model: ModelConfig) -> Finding:
    """Whether the model's files are here, or can be downloaded."""
    cached = huggingface.cached(model)
    is_offline = huggingface.offline()
    answers = not is_offline and huggingface.hub_reachable()
    hub = "the hub answers" if answers else "the hub does not answer"
    if is_offline:
        hub = "downloads from the hub are forbidden (HF_HUB_OFFLINE)"
    if cached is not None:
        return Finding("ok", "model", f"{model.model} is at {cached}; {hub}")
    if answers:
        text = f"{model.model} is not cached yet and will be downloaded; {hub}"
        return Finding("note", "model", text)
    if model.model == DEMO_MODEL:
        text = f"the demo model is not cached and {hub}; the package index will be tried"
        return Finding("note", "model", text)
    text = (
        f"{model.model} is not cached and {hub}; check the network, a proxy, or give a local path"
    )
    return Finding("BROKEN", "model", text)


def check_port(frontend: FrontendConfig) -> Finding:
    """Whether the server could listen."""
    listening_socket(frontend.host, frontend.port).close()
    return Finding("ok", "port", f"{frontend.host}:{frontend.port} is free")


def check_ranks(
    model: ModelConfig, worker: WorkerConfig, probe: GpuProbe
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """A check for each thing that several ranks need, with its subject."""
    from . import doctor_ranks

    def as_finding(subject: str, check: Callable[[], tuple[Mark, str]]) -> Finding:
        mark, text = check()
        return Finding(mark, subject, text)

    for subject, check in doctor_ranks.list_checks(model, worker, probe):
        yield subject, functools.partial(as_finding, subject, check)


def check_generation(model: ModelConfig, worker: WorkerConfig) -> Finding:
    """Whether one token comes through tokenizer, scheduler and worker."""
    from .. import LLM, SamplingParams

    began = time.monotonic()
    settings = {
        **structs.asdict(model),
        **structs.asdict(worker),
        "max_num_seqs": 4,
        "max_model_len": min(model.max_model_len or TRIAL_CONTEXT, TRIAL_CONTEXT),
        "num_kv_blocks": max(TRIAL_BLOCKS, -(-TRIAL_CONTEXT // worker.block_size)),
        "kv_cache_memory_bytes": 0,
        "enforce_eager": True,
    }
    with LLM(**{name: value for name, value in settings.items() if value != ""}) as llm:
        ready = time.monotonic() - began
        answer = llm.generate(
            "The capital of France is", SamplingParams(temperature=0, max_tokens=1), use_tqdm=False
        )
    text = answer[0].outputs[0].text
    return Finding(
        "ok",
        "generation",
        f"ready in {ready:.1f} s; 'The capital of France is' goes on with {text!r}",
    )


def main(arguments: list[str]) -> int:
    """`pagewire doctor`. Returns 1 when a check found a defect."""
    parser = new_parser(
        "doctor", "Check this machine. The exit code is 1 when something is broken."
    )
    add_model(parser)
    add_flags(parser, ModelConfig, FrontendConfig, WorkerConfig, skip=("socket_fd",))
    hide(parser, unread({FrontendConfig: ("host", "port")}))
    parser.add_argument(
        "--no-generation", action="store_true", help="leave out the one-token generation"
    )
    options = parser.parse_args(arguments)
    take_model(parser, options)
    model, frontend, worker = read_all(
        parser.error, (ModelConfig, FrontendConfig, WorkerConfig), options
    )
    checks = list_checks(model, frontend, worker, not options.no_generation)
    broken = [subject for subject, check in checks if report(subject, check).mark == "BROKEN"]
    print(f"\nbroken: {', '.join(broken)}" if broken else "\neverything works")
    return 1 if broken else 0


def list_checks(
    model: ModelConfig, frontend: FrontendConfig, worker: WorkerConfig, generate: bool
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """The checks in order, with their subjects. Those that concern GPUs alone are left out where
    there is none."""
    probe = functools.cache(look_at_gpus)
    yield "versions", check_versions
    yield "device", lambda: check_device(probe(), worker.device)
    with contextlib.suppress(RuntimeError, subprocess.SubprocessError):  # the finding above says so
        yield from check_each_gpu(probe())
        if probe().gpus and worker.device != "cpu":
            yield from (("compiler", check_compiler), ("kernel cache", check_kernel_cache))
    yield "memory", check_memory
    yield "disk", check_disk
    yield "run directory", check_run_dir
    yield "port", lambda: check_port(frontend)
    yield "model", lambda: check_model(model)
    if worker.world_size > 1:
        with contextlib.suppress(RuntimeError, subprocess.SubprocessError):
            yield from check_ranks(model, worker, probe())
    if generate:
        yield "generation", lambda: check_generation(model, worker)


def report(subject: str, check: Callable[[], Finding]) -> Finding:
    """Run one check and print its finding; an exception is a finding too."""
    try:
        finding = check()
    except Exception as error:  # whatever is broken must not hide the checks that follow
        finding = Finding("BROKEN", subject, f"{error}" or type(error).__name__)
    print(f"{finding.mark:<7} {finding.subject:<14} {finding.text}", flush=True)
    return finding


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
