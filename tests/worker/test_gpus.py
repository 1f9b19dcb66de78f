"""What is found out about GPUs, with a driver's tools replaced: processes on them, why torch uses
none, which ones run our kernels."""

import os
import subprocess
import sys
import types
from pathlib import Path

import msgspec
import pytest
import torch
from pagewire.worker.device import driver, gpus, processor
from pagewire.worker.device.gpus import GIB, Gpu, GpuProbe, NoUsableGpu, Process
from pagewire.worker.device.processor import Processor
from pagewire.worker.load import loader, precision
from pagewire.worker.models.architecture import Unsupported

MIB = 1 << 20
T4 = Gpu(0, "Tesla T4", (7, 5), int(14.6 * GIB), 14 * GIB)
XEON, LAPTOP = Processor("Some Xeon", "AVX512", True), Processor("Some i7", "AVX2", False)
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
    assert gpus.processes("GPU-aa") == [
        Process(4242, "python3", 36900 * MIB),
        Process(18, "a name, with a comma", 0),
    ]
    smi("", 9)
    assert gpus.processes("GPU-aa") == []


def test_processes_where_nothing_can_say(tmp_path, monkeypatch, no_nvml):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.processes("GPU-aa") == []


def test_processes_by_nvml(monkeypatch):
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = {"GPU-aa": 5}.__getitem__
    running = [
        types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB),
        types.SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None),
    ]
    nvml.nvmlDeviceGetComputeRunningProcesses = {5: running}.__getitem__
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    own, other = gpus.processes("GPU-aa")
    assert own == Process(os.getpid(), Path("/proc/self/comm").read_text().strip(), GIB)
    assert other == Process(2**22 + 1, "a process", 0)


def test_our_own_process_is_none_of_the_others():
    gpu = Gpu(0, "NVIDIA H200", (9, 0), 140 * GIB, 100 * GIB)
    seen = gpus.with_processes(
        gpu, [Process(os.getpid(), "me", 3 * GIB), Process(7, "you", 36 * GIB)]
    )
    assert (
        seen.own == 3 * GIB
        and seen.foreign == 37 * GIB
        and seen.others == (Process(7, "you", 36 * GIB),)
    )
    assert seen.users() == "37.0 GiB are used by other processes: you (pid 7) 36.0 GiB"


def test_others_that_cannot_be_seen_are_counted_and_little_use_is_not_mentioned():
    gpu = Gpu(0, "NVIDIA H200", (9, 0), 140 * GIB, 100 * GIB, own=GIB)
    assert gpu.users() == "39.0 GiB are used by other processes that are not visible here"
    assert Gpu(0, "x", (9, 0), 140 * GIB, 139 * GIB, own=GIB).users() == ""


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12\n",
            "535.129.03",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
            "580.65.06",
        ),
        ("something new\n", "unknown"),
    ],
)
def test_driver_version(text, version, tmp_path, monkeypatch):
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(driver, "DRIVER_FILE", tmp_path / "version")
    assert driver.driver_version() == version
    monkeypatch.setattr(driver, "DRIVER_FILE", tmp_path / "none")
    assert driver.driver_version() == ""


OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). (Triggered internally at x.cpp:1)"


@pytest.mark.parametrize(
    ("cuda", "number", "device", "warning", "visible", "said"),
    [
        ("13.0", "", False, "", None, ""),
        ("", "", False, "", None, ""),
        (
            "13.0",
            "580.65",
            False,
            "",
            None,
            "no GPU is given to this process; start a container with --gpus all",
        ),
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
def test_why_torch_uses_no_gpu(cuda, number, device, warning, visible, said):
    text = driver.why_none(cuda, number, device, warning, visible)
    assert said in text and (said or not text) and "\n" not in text


@pytest.fixture
def machine(tmp_path, monkeypatch, smi):
    """machine(devices, library): what /dev has, and whether NVIDIA's library can be loaded; no
    kernel module."""

    def make(*devices: str, library: bool = False) -> None:
        (tmp_path / "dev").mkdir()
        for name in devices:
            (tmp_path / "dev" / name).touch()
        monkeypatch.setattr(driver, "DEVICES", tmp_path / "dev")
        monkeypatch.setattr(driver, "DRIVER_FILE", tmp_path / "none")
        monkeypatch.setattr(driver, "LIBRARY", "libc.so.6" if library else "libnothing.so.1")

    return make


def test_wsl2_without_nvidias_library_has_no_nvidia_driver(machine, caplog):
    """/dev/dxg is there for a GPU of any vendor."""
    machine("dxg")
    assert (driver.driver_version(), driver.has_device()) == ("", False)
    probe = gpus.look(detailed=False)
    assert (probe.reason, probe.driver) == ("", "")
    gpus.usable.cache_clear()
    assert not gpus.usable("auto") and not caplog.records


@pytest.mark.parametrize(
    ("output", "status", "number"),
    [("560.94\n", 0, "560.94"), ("560.94\n560.94\n", 0, "560.94"), ("", 9, "unknown")],
)
def test_wsl2_with_nvidias_library(output, status, number, machine, smi):
    smi(output, status)
    machine("dxg", library=True)
    assert (driver.driver_version(), driver.has_device()) == (number, True)
    least = driver.why_none("13.0", number, True, "", None)
    assert ("560.94 is too old" in least) == (number == "560.94") and "unknown" not in least


@pytest.mark.parametrize(
    ("devices", "found"), [((), False), (("nvidia0", "nvidiactl"), True), (("nvidiactl",), False)]
)
def test_devices_of_nvidia(devices, found, machine):
    machine(*devices)
    assert driver.has_device() == found and driver.driver_version() == ""


@pytest.fixture
def rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.2")
    monkeypatch.setattr(torch.version, "cuda", None)
    gpus.usable.cache_clear()
    yield
    gpus.usable.cache_clear()


AMD = "AMD GPUs are not supported (this torch was built for ROCm 6.4.2); --device cpu runs without one"


def test_amd_gpus_are_refused_in_a_line_and_auto_takes_the_cpu(rocm, two_gpus, machine, caplog):
    """torch shows them as if they were CUDA's."""
    machine("kfd", "dri")
    probe = gpus.look()
    assert (probe.count, probe.reason, probe.hidden, probe.gpus) == (0, AMD, True, ())
    assert not gpus.usable("auto") and not gpus.usable("auto")
    assert [record.getMessage() for record in caplog.records] == [f"running on the CPU: {AMD}"]
    with pytest.raises(NoUsableGpu, match=r"--device cuda: AMD GPUs are not supported"):
        gpus.usable("cuda")


def test_a_torch_for_amd_beside_an_nvidia_gpu_or_none(rocm, machine, monkeypatch):
    machine("nvidia0")
    probe = gpus.look()
    assert (
        "an NVIDIA driver, but this torch was built for AMD GPUs (ROCm 6.4.2); install a CUDA build"
        in probe.reason
        and not probe.hidden
    )
    monkeypatch.setattr(driver, "has_device", lambda: False)
    assert gpus.look().reason == ""


def test_a_slice_of_a_gpu_is_asked_for_by_its_own_name(two_gpus, smi, monkeypatch):
    facts = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", major=9, minor=0, uuid="aa"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    smi("MIG-aa, 4242, python, 900\nGPU-aa, 17, other, 70000\n")
    taken = gpus.survey(1)
    assert (taken.uuid, taken.others) == ("MIG-aa", (Process(4242, "python", 900 * MIB),))


A10 = Gpu(0, "NVIDIA A10", (8, 6), 22 * GIB, 3 * GIB)
UNLIKE = [
    Gpu(1, "NVIDIA A100", (8, 0), 80 * GIB, 79 * GIB),
    Gpu(2, "NVIDIA A10", (8, 6), 22 * GIB, 21 * GIB),
]


@pytest.mark.parametrize(
    ("visible", "name"), [(None, "1"), ("4,GPU-1f2e,0", "GPU-1f2e"), ("3, 2, 1", "2")]
)
def test_a_gpu_with_more_room_is_named_and_how_to_choose_it(visible, name):
    line = gpus.better(A10, UNLIKE, visible)
    assert line.startswith(
        "the model goes to GPU 0 (NVIDIA A10, 22.0 GiB), of which 3.0 GiB are free; GPU 1 (NVIDIA A100, 80.0 GiB) has 79.0 GiB free: "
        f"CUDA_VISIBLE_DEVICES={name} takes that one"
    )
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in line and "\n" not in line


def test_gpus_that_are_alike_are_not_worth_a_line():
    assert gpus.better(A10, [], None) == ""
    assert gpus.better(UNLIKE[0], [A10, UNLIKE[1]], None) == ""
    assert gpus.better(UNLIKE[0], [Gpu(1, "NVIDIA A100", (8, 0), 80 * GIB, 80 * GIB)], None) == ""


def test_other_gpus_are_looked_at_without_a_context_on_them(two_gpus, smi, monkeypatch):
    names = {0: ("NVIDIA A10", 8, 6, "aa", 22 * GIB), 1: ("NVIDIA A100", 8, 0, "bb", 80 * GIB)}
    keys = ("name", "major", "minor", "uuid", "total_memory")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: types.SimpleNamespace(**dict(zip(keys, names[i], strict=True))),
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_86"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    smi("GPU-aa, 20000\nGPU-bb, 4000\n")
    chosen = Gpu(0, "NVIDIA A10", (8, 6), 22 * GIB, 21 * GIB)
    assert gpus.idle_elsewhere(chosen) == "", "it is larger, and taken"
    smi("", 9)
    assert (
        "GPU 1 (NVIDIA A100, 80.0 GiB) has 79.2 GiB free: CUDA_VISIBLE_DEVICES=1 takes that one"
        in gpus.idle_elsewhere(chosen)
    )
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_86"])
    assert gpus.idle_elsewhere(chosen) == "", "this torch has no code for it"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpus.idle_elsewhere(chosen) == ""


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
    monkeypatch.setattr(cuda, "can_device_access_peer", lambda first, second: first < second)


def test_the_record_of_a_gpu(two_gpus, smi):
    smi("GPU-aa, 4242, python, 70000\n")
    probe = gpus.look()
    assert (probe.count, probe.architectures, probe.reason) == (2, ("sm_90",), "")
    idle, taken = probe.gpus
    assert (idle.title(), idle.capability, idle.uuid, idle.others) == (
        "GPU 0 (NVIDIA H200, 140.0 GiB)",
        (9, 0),
        "GPU-aa",
        (),
    )
    assert (
        taken.others == (Process(4242, "python", 70000 * MIB),)
        and taken.foreign == 70 * GIB - gpus.CONTEXT
    )
    assert probe.connections == (gpus.Connection(0, 1, reachable=False),)
    assert gpus.look(detailed=False).gpus == ()
    assert gpus.read_probe(msgspec.json.encode(probe).decode()) == probe


def sees(monkeypatch, probe: GpuProbe) -> None:
    gpus.usable.cache_clear()
    monkeypatch.setattr(gpus, "look", lambda detailed: probe)


def test_choice_of_device(monkeypatch, caplog):
    caplog.set_level("INFO", "pagewire.worker")
    sees(monkeypatch, GpuProbe("2.13", "13.0", "580.1", 1, ("sm_90",)))
    assert gpus.usable("auto") and gpus.usable("cuda")
    sees(monkeypatch, GpuProbe("2.13", "", ""))
    assert not gpus.usable("auto") and not caplog.records
    with pytest.raises(NoUsableGpu, match="--device cuda: there is no NVIDIA GPU"):
        gpus.usable("cuda")
    sees(monkeypatch, GpuProbe("2.13", "", "580.1", reason="this torch was built without CUDA"))
    assert not gpus.usable("auto") and not gpus.usable("auto")
    assert [record.getMessage() for record in caplog.records] == [
        "running on the CPU: this torch was built without CUDA"
    ]
    with pytest.raises(NoUsableGpu, match="--device cuda: this torch was built without CUDA"):
        gpus.usable("cuda")
    gpus.usable.cache_clear()


def test_old_gpus_are_refused_by_name():
    with pytest.raises(
        NoUsableGpu,
        match=r"GPU 2 \(Tesla P100, 16\.0 GiB\) has compute capability 6\.0, and 7\.0 or newer is needed",
    ):
        gpus.check(Gpu(2, "Tesla P100", (6, 0), 16 * GIB, 15 * GIB), ())
    gpus.check(T4, ("sm_75", "sm_80"))
    gpus.check(A100, ())


def test_a_v100_is_told_which_torch_has_code_for_it():
    """It is promised, and the usual torch has none."""
    with pytest.raises(NoUsableGpu) as caught:
        gpus.check(
            Gpu(0, "Tesla V100-SXM2-16GB", (7, 0), 16 * GIB, 15 * GIB), ("sm_75", "sm_80", "sm_90")
        )
    assert (
        "install a torch that was built for sm_70, such as PyTorch's builds for CUDA 12.6"
        in str(caught.value)
    )
    with pytest.raises(NoUsableGpu) as caught:
        gpus.check(A100, ("sm_90",))
    assert "12.6" not in str(caught.value) and str(caught.value).endswith(
        "built for sm_80; --device cpu runs without it"
    )


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
    with pytest.raises(
        NoUsableGpu,
        match=f"built for {', '.join(built)} only; install a torch that was built for sm_",
    ):
        gpus.check(gpu, built)


@pytest.mark.parametrize(
    ("asked", "saved", "gpu", "dtype", "note"),
    [
        ("auto", "bfloat16", A100, "bfloat16", ""),
        ("auto", "torch.float16", A100, "float16", ""),
        ("auto", "float32", A100, "bfloat16", "float32: using bfloat16"),
        ("auto", "float32", T4, "float16", "float32: using float16"),
        (
            "auto",
            "bfloat16",
            T4,
            "float16",
            "a Tesla T4 (compute capability 7.5) does not have: using float16",
        ),
        ("auto", "float16", T4, "float16", ""),
        ("half", "bfloat16", T4, "float16", ""),
        ("float", "bfloat16", T4, "float32", ""),
        ("bfloat16", "float32", A100, "bfloat16", ""),
        ("auto", "bfloat16", XEON, "bfloat16", ""),
        ("auto", "float32", XEON, "float32", ""),
        ("auto", "float16", XEON, "bfloat16", "slow on a CPU: using bfloat16"),
        ("float16", "float16", XEON, "float16", ""),
        ("bfloat16", "float32", XEON, "bfloat16", ""),
        (
            "auto",
            "bfloat16",
            LAPTOP,
            "float32",
            "bfloat16, for which this processor, Some i7 (AVX2), has no products: using float32",
        ),
        ("auto", "float16", LAPTOP, "float32", "float16, for which this processor"),
        ("auto", "float32", LAPTOP, "float32", ""),
        ("float32", "bfloat16", LAPTOP, "float32", ""),
    ],
)
def test_dtype(asked, saved, gpu, dtype, note):
    choice = precision.choose(asked, saved, gpu)
    assert choice.dtype == dtype and note in choice.note and bool(note) == bool(choice.note)


def test_bfloat16_on_a_processor_without_it_is_refused_in_one_line():
    with pytest.raises(
        ValueError,
        match=r"--dtype bfloat16: this processor, Some i7 \(AVX2\), has no .*use --dtype float32",
    ) as caught:
        precision.choose("bfloat16", "bfloat16", LAPTOP)
    assert "\n" not in str(caught.value)


def test_this_processor_is_one():
    found = processor.look()
    assert found.name and found.vectors and found.title().startswith(found.name)


def test_bfloat16_on_an_old_gpu_is_refused_in_the_known_words():
    with pytest.raises(ValueError) as caught:
        precision.choose("bfloat16", "bfloat16", T4)
    assert str(caught.value) == (
        "Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has compute capability 7.5. "
        "You can use float16 instead by explicitly setting the `dtype` flag in CLI, for example: --dtype=half."
    )


def test_gemma_in_float16_is_warned_of():
    for name in ("gemma", "gemma2", "gemma3_text"):
        line = precision.overflow("float16", name)
        assert (
            line.startswith(f"{name} in float16 may overflow")
            and "--dtype float32" in line
            and "\n" not in line
        )
    assert precision.overflow("bfloat16", "gemma2") == precision.overflow("float16", "llama") == ""


def test_a_checkpoint_of_gemma_on_an_old_gpu_says_both(caplog):
    dtype = loader.choose_dtype("auto", {"model_type": "gemma2", "torch_dtype": "bfloat16"}, T4)
    said = [record.getMessage() for record in caplog.records]
    assert dtype == torch.float16 and len(said) == 2
    assert "does not have: using float16" in said[0] and "gemma2 in float16 may overflow" in said[1]
    loader.choose_dtype("auto", {"model_type": "llama", "torch_dtype": "float16"}, T4)
    assert len(caplog.records) == 2


def test_types_that_nothing_computes_in():
    with pytest.raises(Unsupported, match="weights of type 'float8_e4m3fn' are not supported"):
        precision.choose("auto", "float8_e4m3fn", A100)


def test_the_report_of_this_machine_can_be_read():
    """As the doctor does it, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pagewire.worker.device.gpus"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    probe = gpus.read_probe(done.stdout)
    assert probe.torch and probe.count == len(probe.gpus)
