"""The doctor's findings about GPUs, from what torch might see; and the whole of it on this
machine."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from pagewire.commands import doctor, doctor_gpus
from pagewire.config import FrontendConfig, ModelConfig, SchedulerConfig, WorkerConfig
from pagewire.worker.device import driver
from pagewire.worker.device.gpus import GIB, Gpu, GpuProbe, Process
from pagewire.worker.load.gpu_plan import plan_gpu
from pagewire.worker.load.kv_sizing import DoesNotFit
from pagewire.worker.models import describe

H200 = Gpu(0, "NVIDIA H200", (9, 0), 140 * GIB, 139 * GIB, own=GIB)
SEEN = GpuProbe("2.13.0", "13.0", "580.65.06", 1, ("sm_75", "sm_90"), (H200,))


L4 = Gpu(1, "NVIDIA L4", (8, 9), int(22.05 * GIB), int(21.6 * GIB), own=int(0.45 * GIB))
T4 = Gpu(0, "Tesla T4", (7, 5), int(14.6 * GIB), int(14.3 * GIB), own=int(0.3 * GIB))
BUILT = "(torch 2.13.0 for CUDA 13.0, driver 580.65.06)"


def findings_of(probe: GpuProbe) -> list[doctor.Finding]:
    return [check() for _, check in doctor.check_each_gpu(probe)]


def test_a_gpu_that_works():
    finding = doctor.check_device(SEEN, "auto")
    assert (finding.mark, finding.text) == (
        "ok",
        f"the model goes to GPU 0 (NVIDIA H200, 140.0 GiB) {BUILT}",
    )
    (about,) = findings_of(SEEN)
    assert (about.mark, about.subject) == ("ok", "GPU 0")
    assert about.text == (
        "NVIDIA H200, 139.0 of 140.0 GiB free; compute capability 9.0; bfloat16; attention by Triton; "
        "steps of up to 8,192 tokens; models up to about 63 billion parameters in bfloat16"
    )


def test_each_gpu_is_described():
    """Those that a worker does not take, too."""
    found = findings_of(
        replace(SEEN, architectures=("sm_75", "sm_80"), gpus=(T4, L4, replace(H200, index=2)))
    )
    assert [(finding.subject, finding.mark) for finding in found] == [
        ("GPU 0", "note"),
        ("GPU 1", "ok"),
        ("GPU 2", "note"),
    ]
    assert found[0].text == (
        "Tesla T4, 14.3 of 14.6 GiB free; compute capability 7.5; no bfloat16: float16 is used instead; attention by torch, without CUDA "
        "graphs; steps of up to 2,048 tokens; models up to about 5.5 billion parameters in float16"
    )
    assert (
        "attention by Triton; steps of up to 2,048 tokens; models up to about 9 billion"
        in found[1].text
    )
    assert (
        "compute capability 9.0, and this torch was built for sm_75, sm_80 only" in found[2].text
        and "billion" not in found[2].text
    )


def test_what_limits_a_gpu_is_noted():
    busy = replace(H200, free=100 * GIB, others=(Process(7, "python", 38 * GIB),))
    (about,) = findings_of(replace(SEEN, gpus=(busy,)))
    assert (
        about.mark == "note"
        and "39.0 GiB are used by other processes: python (pid 7) 38.0 GiB" in about.text
    )
    (about,) = findings_of(replace(SEEN, gpus=(replace(H200, free=GIB),)))
    assert "no room for a model in bfloat16" in about.text


def test_a_gpu_that_cannot_be_used_is_broken():
    old = replace(H200, name="Tesla P40", capability=(6, 1))
    finding = doctor.check_device(replace(SEEN, gpus=(old,)), "auto")
    assert (
        finding.mark == "BROKEN"
        and "Tesla P40" in finding.text
        and "7.0 or newer is needed" in finding.text
    )
    finding = doctor.check_device(replace(SEEN, architectures=("sm_75",)), "cuda")
    assert finding.mark == "BROKEN" and "built for sm_75 only" in finding.text


def test_a_gpu_that_cannot_be_used_is_no_fault_where_the_cpu_is_asked_for():
    old = replace(SEEN, gpus=(replace(H200, capability=(6, 1)),))
    assert doctor.check_device(old, "cpu") == doctor.Finding(
        "ok", "device", f"--device cpu: no GPU is used {BUILT}"
    )
    assert [finding.mark for finding in findings_of(old)] == ["note"]


def test_of_several_gpus_the_one_to_take_instead_is_named(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    small, large = replace(L4, index=0), replace(H200, index=1)
    finding = doctor.check_device(
        replace(SEEN, architectures=("sm_80", "sm_90"), gpus=(small, large)), "auto"
    )
    assert (
        finding.mark == "note"
        and "the model goes to GPU 0 (NVIDIA L4" in finding.text
        and "CUDA_VISIBLE_DEVICES=1 takes" in finding.text
    )
    old = replace(H200, name="Tesla P40", capability=(6, 1))
    finding = doctor.check_device(replace(SEEN, gpus=(old, large)), "auto")
    assert finding.mark == "BROKEN" and finding.text.endswith(
        "; CUDA_VISIBLE_DEVICES=1 takes GPU 1 (NVIDIA H200, 140.0 GiB)"
    )
    assert doctor.check_device(replace(SEEN, gpus=(H200, large)), "auto").mark == "ok"


@pytest.mark.parametrize(
    "card",
    [
        L4,
        T4,
        H200,
        replace(H200, total=40 * GIB, free=39 * GIB),
        replace(L4, free=12 * GIB, own=GIB),
    ],
)
@pytest.mark.parametrize("share", [1.0, 1.5])
def test_a_model_as_large_as_is_said_fits_and_a_much_larger_one_does_not(card, share):
    """Of Llama's shape, scaled by its layers."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
    config = {
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        **sizes,
    }
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336
    layers = int((share * doctor_gpus.largest_model(card) * 1e9 - 2 * 32000 * 4096) / layer)
    arch = describe({**config, "num_hidden_layers": layers})
    dtype = torch.bfloat16 if card.capability >= (8, 0) else torch.float16

    def plan():
        return plan_gpu(arch, dtype, ModelConfig(), WorkerConfig(), card, SchedulerConfig())

    if share == 1:
        assert plan().sizing.max_model_len >= 2048
    else:
        with pytest.raises(DoesNotFit):
            plan()


@pytest.mark.parametrize(
    ("device", "hidden", "mark"),
    [
        ("auto", False, "BROKEN"),
        ("auto", True, "note"),
        ("cuda", True, "BROKEN"),
        ("cpu", False, "note"),
        ("fake", False, "note"),
    ],
)
def test_a_gpu_that_torch_does_not_see(device, hidden, mark):
    finding = doctor.check_device(
        GpuProbe("2.13.0+cpu", "", "580.1", reason="the reason", hidden=hidden), device
    )
    assert finding.mark == mark and finding.text == "the reason (torch 2.13.0+cpu)"


def test_amd_gpus_are_a_note_unless_a_gpu_is_asked_for():
    probe = GpuProbe(
        "2.13.0+rocm6.4", "", "", reason=driver.why_no_rocm("6.4.2", "", False, True), hidden=True
    )
    finding = doctor.check_device(probe, "auto")
    assert finding.mark == "note" and finding.text.startswith(
        "AMD GPUs are not supported (this torch was built for ROCm 6.4.2)"
    )
    assert doctor.check_device(probe, "cuda").mark == "BROKEN"


@pytest.mark.parametrize(
    ("device", "mark"), [("auto", "note"), ("cpu", "note"), ("cuda", "BROKEN")]
)
def test_a_machine_without_a_gpu(device, mark):
    finding = doctor.check_device(GpuProbe("2.13.0+cpu", "", ""), device)
    assert finding.mark == mark and "no GPU: the model runs on" in finding.text


def subjects(monkeypatch, probe: GpuProbe, **settings) -> list[str]:
    monkeypatch.setattr(doctor, "look_at_gpus", lambda: probe)
    return [
        name
        for name, _ in doctor.list_checks(
            ModelConfig(), FrontendConfig(), WorkerConfig(**settings), False
        )
    ]


def test_tools_of_a_gpu_are_checked_where_there_is_one(monkeypatch):
    assert subjects(monkeypatch, SEEN)[1:5] == ["device", "GPU 0", "compiler", "kernel cache"]
    assert subjects(monkeypatch, replace(SEEN, gpus=(H200, replace(H200, index=1))))[1:4] == [
        "device",
        "GPU 0",
        "GPU 1",
    ]
    assert "compiler" not in subjects(monkeypatch, SEEN, device="cpu")
    assert "compiler" not in subjects(monkeypatch, GpuProbe("2.13.0", "", ""))


def test_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_compiler() == doctor.Finding(
        "BROKEN", "compiler", doctor.check_compiler().text
    )
    assert "install gcc" in doctor.check_compiler().text
    (tmp_path / "clang").write_text("#!/bin/sh\n")
    (tmp_path / "clang").chmod(0o755)
    assert doctor.check_compiler() == doctor.Finding("ok", "compiler", str(tmp_path / "clang"))
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert doctor.check_compiler().mark == "BROKEN"


def test_kernel_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (tmp_path / "triton" / "hash").mkdir(parents=True)
    (tmp_path / "triton" / "hash" / "kernel.cubin").touch()
    assert doctor.check_kernel_cache() == doctor.Finding(
        "ok", "kernel cache", f"1 compiled kernels in {tmp_path / 'triton'}"
    )
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert doctor.check_kernel_cache().mark == "note"


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch, capsys):
    failed = subprocess.CompletedProcess(
        [], 1, "", "Traceback ...\nImportError: libcudart.so.13: cannot open shared object file\n"
    )
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: failed)
    checks = dict(doctor.list_checks(ModelConfig(), FrontendConfig(), WorkerConfig(), False))
    finding = doctor.report("device", checks["device"])
    assert (
        finding.mark == "BROKEN"
        and finding.text == "ImportError: libcudart.so.13: cannot open shared object file"
    )
    assert "BROKEN" in capsys.readouterr().out


def test_on_this_machine(tiny):
    """Each check runs and none finds fault; on a GPU's machine there are more of them."""
    command = [
        sys.executable,
        "-m",
        "pagewire",
        "doctor",
        str(tiny("llama").path),
        "--device",
        "cpu",
        "--port",
        "0",
    ]
    done = subprocess.run(
        [*command, "--no-generation"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    subjects = [line[8:22].strip() for line in lines[:-2]]
    assert [
        name
        for name in subjects
        if name not in ("compiler", "kernel cache") and not name.startswith("GPU ")
    ] == [
        "versions",
        "device",
        "memory",
        "disk",
        "run directory",
        "port",
        "model",
    ]
    assert lines[-1] == "everything works"
