"""What is found out about GPUs, with a driver's tools replaced: processes on them, why torch uses none, which ones run our kernels."""

import os
import subprocess
import sys
import types
from pathlib import Path

import msgspec
import pytest
import torch
from pagewire.worker import gpus, precision
from pagewire.worker.architecture import Unsupported
from pagewire.worker.gpus import GIB, Gpu, NoUsableGpu, Process, Sight

MIB = 1 << 20
T4 = Gpu(0, "Tesla T4", (7, 5), int(14.6 * GIB), 14 * GIB)
A100 = Gpu(0, "NVIDIA A100", (8, 0), 40 * GIB, 39 * GIB)
SMI = """GPU-aa, 4242, /usr/bin/python3, 36900
GPU-bb, 17, other, 10
GPU-aa, 18, a name, with a comma, [N/A]
some line that means nothing
"""


@pytest.fixture
def no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


@pytest.fixture
def smi(tmp_path, monkeypatch, no_nvml):
    """smi(output, status): an nvidia-smi that says so."""

    def make(output: str, status: int = 0) -> None:
        script = tmp_path / "nvidia-smi"
        (tmp_path / "output").write_text(output)
        script.write_text(f"#!/bin/sh\ncat {tmp_path}/output\nexit {status}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


def test_processes_by_nvidia_smi(smi):
    smi(SMI)
    assert gpus.processes("GPU-aa") == [Process(4242, "python3", 36900 * MIB), Process(18, "a name, with a comma", 0)]
    smi("", 9)
    assert gpus.processes("GPU-aa") == []


def test_processes_where_nothing_can_say(tmp_path, monkeypatch, no_nvml):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.processes("GPU-aa") == []


def test_processes_by_nvml(monkeypatch):
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = {"GPU-aa": 5}.__getitem__
    running = [types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB), types.SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None)]
    nvml.nvmlDeviceGetComputeRunningProcesses = {5: running}.__getitem__
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    own, other = gpus.processes("GPU-aa")
    assert own == Process(os.getpid(), Path("/proc/self/comm").read_text().strip(), GIB)
    assert other == Process(2**22 + 1, "a process", 0)


def test_our_own_process_is_none_of_the_others():
    gpu = Gpu(0, "NVIDIA H200", (9, 0), 140 * GIB, 100 * GIB)
    seen = gpus.with_processes(gpu, [Process(os.getpid(), "me", 3 * GIB), Process(7, "you", 36 * GIB)])
    assert seen.own == 3 * GIB and seen.foreign == 37 * GIB and seen.others == (Process(7, "you", 36 * GIB),)
    assert seen.users() == "37.0 GiB are used by other processes: you (pid 7) 36.0 GiB"


def test_others_that_cannot_be_seen_are_counted_and_little_use_is_not_mentioned():
    gpu = Gpu(0, "NVIDIA H200", (9, 0), 140 * GIB, 100 * GIB, own=GIB)
    assert gpu.users() == "39.0 GiB are used by other processes that are not visible here"
    assert Gpu(0, "x", (9, 0), 140 * GIB, 139 * GIB, own=GIB).users() == ""


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12\n", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("something new\n", "unknown"),
    ],
)
def test_driver_version(text, version, tmp_path, monkeypatch):
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(gpus, "DRIVER_FILE", tmp_path / "version")
    assert gpus.driver_version() == version
    monkeypatch.setattr(gpus, "DRIVER_FILE", tmp_path / "none")
    assert gpus.driver_version() == ""


OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). (Triggered internally at x.cpp:1)"


@pytest.mark.parametrize(
    ("cuda", "driver", "device", "warning", "visible", "said"),
    [
        ("13.0", "", False, "", None, ""),
        ("", "", False, "", None, ""),
        ("13.0", "580.65", False, "", None, "no GPU is given to this process; start a container with --gpus all"),
        ("", "580.65", True, "", None, "built without CUDA; install a CUDA build"),
        ("13.0", "580.65", True, "", "", "CUDA_VISIBLE_DEVICES='' hides every GPU"),
        (
            "13.0",
            "470.57.02",
            True,
            OLD,
            None,
            "driver 470.57.02 is too old for this torch, built for CUDA 13.0: install driver 580 or newer",
        ),
        ("12.8", "470.57.02", True, OLD, None, "install driver 525 or newer"),
        (
            "12.8",
            "550.1",
            True,
            "CUDA initialization: system not yet initialized (Triggered",
            None,
            "cannot use the GPU: system not yet init",
        ),
        ("12.8", "550.1", True, "", None, "`nvidia-smi` may say why"),
    ],
)
def test_why_torch_uses_no_gpu(cuda, driver, device, warning, visible, said):
    text = gpus.why_none(cuda, driver, device, warning, visible)
    assert said in text and (said or not text) and "\n" not in text


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs as torch shows them, the second of them half taken by another process."""
    cuda = torch.cuda
    facts = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, uuid="aa")
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "get_arch_list", lambda: ["sm_90"])
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: ((139, 70)[index] * GIB, 140 * GIB))
    monkeypatch.setattr(cuda, "memory_reserved", lambda index: 0)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: facts)


def test_the_record_of_a_gpu(two_gpus, smi):
    smi("GPU-aa, 4242, python, 70000\n")
    sight = gpus.look()
    assert (sight.count, sight.architectures, sight.reason) == (2, ("sm_90",), "")
    idle, taken = sight.gpus
    assert (idle.title(), idle.capability, idle.uuid, idle.others) == ("GPU 0 (NVIDIA H200, 140.0 GiB)", (9, 0), "GPU-aa", ())
    assert taken.others == (Process(4242, "python", 70000 * MIB),) and taken.foreign == 70 * GIB - gpus.CONTEXT
    assert gpus.look(detailed=False).gpus == ()
    assert gpus.read_sight(msgspec.json.encode(sight).decode()) == sight


def sees(monkeypatch, sight: Sight) -> None:
    gpus.usable.cache_clear()
    monkeypatch.setattr(gpus, "look", lambda detailed: sight)


def test_choice_of_device(monkeypatch, caplog):
    caplog.set_level("INFO", "pagewire.worker")
    sees(monkeypatch, Sight("2.13", "13.0", "580.1", 1, ("sm_90",)))
    assert gpus.usable("auto") and gpus.usable("cuda")
    sees(monkeypatch, Sight("2.13", "", ""))
    assert not gpus.usable("auto") and not caplog.records
    with pytest.raises(NoUsableGpu, match="--device cuda: there is no NVIDIA GPU"):
        gpus.usable("cuda")
    sees(monkeypatch, Sight("2.13", "", "580.1", reason="this torch was built without CUDA"))
    assert not gpus.usable("auto") and not gpus.usable("auto")
    assert [record.getMessage() for record in caplog.records] == ["running on the CPU: this torch was built without CUDA"]
    with pytest.raises(NoUsableGpu, match="--device cuda: this torch was built without CUDA"):
        gpus.usable("cuda")
    gpus.usable.cache_clear()


def test_old_gpus_are_refused_by_name():
    with pytest.raises(NoUsableGpu, match=r"GPU 2 \(Tesla P100, 16\.0 GiB\) has compute capability 6\.0, and 7\.0 or newer is needed"):
        gpus.check(Gpu(2, "Tesla P100", (6, 0), 16 * GIB, 15 * GIB), ())
    gpus.check(T4, ("sm_75", "sm_80"))
    gpus.check(A100, ())


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 9), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("sm_80", "compute_80"), True),
        ((10, 3), ("sm_90", "sm_100"), True),
        ((7, 0), ("sm_75", "sm_120", "compute_120"), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a", "unheard_of"), False),
    ],
)
def test_what_torch_was_built_for(capability, built, runs):
    gpu = Gpu(0, "some GPU", capability, GIB, GIB)
    if runs:
        return gpus.check(gpu, built)
    with pytest.raises(NoUsableGpu, match=f"built for {', '.join(built)} only; install a torch that was built for sm_"):
        gpus.check(gpu, built)


@pytest.mark.parametrize(
    ("asked", "saved", "gpu", "dtype", "note"),
    [
        ("auto", "bfloat16", A100, "bfloat16", ""),
        ("auto", "torch.float16", A100, "float16", ""),
        ("auto", "float32", A100, "bfloat16", "float32: using bfloat16"),
        ("auto", "float32", T4, "float16", "float32: using float16"),
        ("auto", "bfloat16", T4, "float16", "a Tesla T4 (compute capability 7.5) does not have: using float16"),
        ("auto", "float16", T4, "float16", ""),
        ("half", "bfloat16", T4, "float16", ""),
        ("float", "bfloat16", T4, "float32", ""),
        ("bfloat16", "float32", A100, "bfloat16", ""),
        ("auto", "bfloat16", None, "bfloat16", ""),
        ("auto", "float32", None, "float32", ""),
        ("auto", "float16", None, "bfloat16", "slow on a CPU: using bfloat16"),
        ("float16", "float16", None, "float16", ""),
        ("bfloat16", "float32", None, "bfloat16", ""),
    ],
)
def test_dtype(asked, saved, gpu, dtype, note):
    choice = precision.choose(asked, saved, gpu)
    assert choice.dtype == dtype and note in choice.note and bool(note) == bool(choice.note)


def test_bfloat16_on_an_old_gpu_is_refused_in_the_known_words():
    with pytest.raises(ValueError) as caught:
        precision.choose("bfloat16", "bfloat16", T4)
    assert str(caught.value) == (
        "Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has compute capability 7.5. "
        "You can use float16 instead by explicitly setting the `dtype` flag in CLI, for example: --dtype=half."
    )


def test_types_that_nothing_computes_in():
    with pytest.raises(Unsupported, match="weights of type 'float8_e4m3fn' are not supported"):
        precision.choose("auto", "float8_e4m3fn", A100)


def test_the_report_of_this_machine_can_be_read():
    """As the doctor does it, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "pagewire.worker.gpus"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    sight = gpus.read_sight(done.stdout)
    assert sight.torch and sight.count == len(sight.gpus)
