"""`pagewire doctor`: looks at this machine and says in plain words what works, what does not, and what to do about it.

Each check is a function that returns one finding; torch is looked at in a process of its own, so that a broken installation is a finding
and not a crash.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import hub
from .cli import add_model, new_parser, read_all, take_model
from .config import DEMO_MODEL, FrontendConfig, ModelConfig, WorkerConfig, add_flags
from .version import __version__

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
LOW_MEMORY_GB, LOW_DISK_GB = 2.0, 2.0
TORCH_REPORT = """
import torch
print(torch.__version__, torch.version.cuda or "no CUDA")
for i in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(i)
    major, minor = torch.cuda.get_device_capability(i)
    print(f"{torch.cuda.get_device_name(i)}, capability {major}.{minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
"""


@dataclass(frozen=True)
class Finding:
    mark: Mark
    subject: str
    text: str


def check_versions() -> Finding:
    found, missing = [f"pagewire {__version__}", f"Python {platform.python_version()}"], list[str]()
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    needed = [name for name in missing if name not in OPTIONAL]
    if needed:
        return Finding("BROKEN", "versions", f"{', '.join(needed)} not installed; pip install 'pagewire[all]'")
    return Finding("ok", "versions", ", ".join(found))


def check_torch() -> Finding:
    result = subprocess.run([sys.executable, "-c", TORCH_REPORT], capture_output=True, text=True, timeout=120, check=False)
    if result.returncode:
        return Finding("BROKEN", "torch", (result.stderr.strip().splitlines() or ["it cannot be imported"])[-1])
    version, *devices = result.stdout.strip().splitlines()
    if devices:
        return Finding("ok", "device", f"{'; '.join(devices)} (torch {version}, driver {driver_version()})")
    if shutil.which("nvidia-smi"):
        return Finding(
            "BROKEN", "device", f"a driver is here ({driver_version()}) but torch {version} sees no GPU; install a CUDA build of torch"
        )
    return Finding("note", "device", f"no GPU: the model runs on {os.cpu_count()} CPU cores of {cpu_name()} (torch {version})")


def driver_version() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def check_memory() -> Finding:
    facts = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.split()[1:2]}
    free, total = facts.get("MemAvailable", 0.0), facts.get("MemTotal", 0.0)
    limit = next((int(line) / 2**30 for line in _lines("/sys/fs/cgroup/memory.max") if line.isdecimal()), None)
    text = f"{free:.1f} of {total:.1f} GiB free" + (f", this container may use {limit:.1f} GiB" if limit else "")
    low = min(free, limit or free) < LOW_MEMORY_GB
    return Finding("BROKEN" if low else "ok", "memory", text + ("; the demo alone needs about 2 GiB" if low else ""))


def check_disk() -> Finding:
    place = hub.cache_dir()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    low = free < LOW_DISK_GB
    return Finding("note" if low else "ok", "disk", f"{free:.1f} GiB free in {place}" + ("; downloads may not fit" if low else ""))


def check_run_dir() -> Finding:
    from .stack import new_run_dir, remove_run_dir

    path = new_run_dir()
    remove_run_dir(path)
    return Finding("ok", "run directory", f"{path.parent} can be written")


def check_model(model: ModelConfig) -> Finding:
    cached = hub.cached(model)
    reachable = "the hub is told to be left alone (HF_HUB_OFFLINE)" if hub.offline() else None
    reachable = reachable or ("the hub answers" if hub.hub_reachable() else "the hub does not answer")
    if cached is not None:
        return Finding("ok", "model", f"{model.model} is at {cached}; {reachable}")
    if reachable == "the hub answers":
        return Finding("note", "model", f"{model.model} is not cached yet and will be downloaded; {reachable}")
    if model.model == DEMO_MODEL:
        return Finding("note", "model", f"the demo model is not cached and {reachable}; the package index will be tried")
    return Finding("BROKEN", "model", f"{model.model} is not cached and {reachable}; check the network, a proxy, or give a local path")


def check_port(frontend: FrontendConfig) -> Finding:
    from .launch import open_socket

    open_socket(frontend.host, frontend.port).close()
    return Finding("ok", "port", f"{frontend.host}:{frontend.port} is free")


def check_generation(model: ModelConfig, worker: WorkerConfig) -> Finding:
    """One token through tokenizer, scheduler and worker."""
    from . import LLM, SamplingParams

    began = time.monotonic()
    settings = {
        "device": worker.device,
        "max_num_seqs": 4,
        "max_model_len": min(model.max_model_len or 512, 512),
        "tokenizer": model.tokenizer,
    }
    with LLM(model.model, **{key: value for key, value in settings.items() if value}) as llm:
        ready = time.monotonic() - began
        answer = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    text = answer[0].outputs[0].text
    return Finding("ok", "generation", f"ready in {ready:.1f} s; 'The capital of France is' goes on with {text!r}")


def main(arguments: list[str]) -> int:
    parser = new_parser("doctor", "Check this machine. The exit code is 1 when something is broken.")
    add_model(parser)
    add_flags(parser, ModelConfig, FrontendConfig, WorkerConfig, skip=("socket_fd",))
    parser.add_argument("--no-generation", action="store_true", help="leave out the one-token generation")
    options = parser.parse_args(arguments)
    take_model(parser, options)
    model, frontend, worker = read_all(parser.error, (ModelConfig, FrontendConfig, WorkerConfig), options)
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("versions", check_versions),
        ("device", check_torch),
        ("memory", check_memory),
        ("disk", check_disk),
        ("run directory", check_run_dir),
        ("port", lambda: check_port(frontend)),
        ("model", lambda: check_model(model)),
    ]
    if not options.no_generation:
        checks.append(("generation", lambda: check_generation(model, worker)))
    broken = [subject for subject, check in checks if report(subject, check).mark == "BROKEN"]
    print(f"\nbroken: {', '.join(broken)}" if broken else "\neverything works")
    return 1 if broken else 0


def report(subject: str, check: Callable[[], Finding]) -> Finding:
    """Run one check and print its finding; whatever it raises is the finding."""
    try:
        finding = check()
    except Exception as error:
        finding = Finding("BROKEN", subject, f"{error}" or type(error).__name__)
    print(f"{finding.mark:<7} {finding.subject:<14} {finding.text}", flush=True)
    return finding


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
