"""The doctor's findings about GPUs, from what torch might see; and the whole of it on this machine."""

import subprocess
import sys
from dataclasses import replace

import pytest
from pagewire import doctor
from pagewire.config import FrontendConfig, ModelConfig, WorkerConfig
from pagewire.worker.gpus import GIB, Gpu, Process, Sight

H200 = Gpu(0, "NVIDIA H200", (9, 0), 140 * GIB, 139 * GIB, own=GIB)
SEEN = Sight("2.13.0", "13.0", "580.65.06", 1, ("sm_75", "sm_90"), (H200,))


def test_a_gpu_that_works():
    finding = doctor.check_device(SEEN, "auto")
    assert finding.mark == "ok"
    assert finding.text == (
        "GPU 0 (NVIDIA H200, 140.0 GiB), compute capability 9.0, 139.0 GiB free (torch 2.13.0 for CUDA 13.0, driver 580.65.06)"
    )


def test_what_limits_a_gpu_is_noted():
    busy = replace(H200, free=100 * GIB, others=(Process(7, "python", 38 * GIB),))
    finding = doctor.check_device(replace(SEEN, gpus=(busy,)), "auto")
    assert finding.mark == "note" and "39.0 GiB are used by other processes: python (pid 7) 38.0 GiB" in finding.text
    finding = doctor.check_device(replace(SEEN, gpus=(replace(H200, name="Tesla T4", capability=(7, 5)),)), "auto")
    assert finding.mark == "note" and "no bfloat16: float16 is used instead" in finding.text


def test_a_gpu_that_cannot_be_used_is_broken():
    finding = doctor.check_device(replace(SEEN, gpus=(replace(H200, name="Tesla P40", capability=(6, 1)),)), "auto")
    assert finding.mark == "BROKEN" and "Tesla P40" in finding.text and "7.0 or newer is needed" in finding.text
    finding = doctor.check_device(replace(SEEN, architectures=("sm_75",)), "cuda")
    assert finding.mark == "BROKEN" and "built for sm_75 only" in finding.text


@pytest.mark.parametrize(
    ("device", "hidden", "mark"),
    [("auto", False, "BROKEN"), ("auto", True, "note"), ("cuda", True, "BROKEN"), ("cpu", False, "note"), ("fake", False, "note")],
)
def test_a_gpu_that_torch_does_not_see(device, hidden, mark):
    finding = doctor.check_device(Sight("2.13.0+cpu", "", "580.1", reason="the reason", hidden=hidden), device)
    assert finding.mark == mark and finding.text == "the reason (torch 2.13.0+cpu)"


@pytest.mark.parametrize(("device", "mark"), [("auto", "note"), ("cpu", "note"), ("cuda", "BROKEN")])
def test_a_machine_without_a_gpu(device, mark):
    finding = doctor.check_device(Sight("2.13.0+cpu", "", ""), device)
    assert finding.mark == mark and "no GPU: the model runs on" in finding.text


def subjects(monkeypatch, sight: Sight, **settings) -> list[str]:
    monkeypatch.setattr(doctor, "look_at_gpus", lambda: sight)
    return [name for name, _ in doctor.list_checks(ModelConfig(), FrontendConfig(), WorkerConfig(**settings), False)]


def test_tools_of_a_gpu_are_checked_where_there_is_one(monkeypatch):
    assert subjects(monkeypatch, SEEN)[1:4] == ["device", "compiler", "kernel cache"]
    assert "compiler" not in subjects(monkeypatch, SEEN, device="cpu")
    assert "compiler" not in subjects(monkeypatch, Sight("2.13.0", "", ""))


def test_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_compiler() == doctor.Finding("BROKEN", "compiler", doctor.check_compiler().text)
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
    assert doctor.check_kernel_cache() == doctor.Finding("ok", "kernel cache", f"1 compiled kernels in {tmp_path / 'triton'}")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert doctor.check_kernel_cache().mark == "note"


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nImportError: libcudart.so.13: cannot open shared object file\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: failed)
    checks = dict(doctor.list_checks(ModelConfig(), FrontendConfig(), WorkerConfig(), False))
    finding = doctor.report("device", checks["device"])
    assert finding.mark == "BROKEN" and finding.text == "ImportError: libcudart.so.13: cannot open shared object file"
    assert "BROKEN" in capsys.readouterr().out


def test_on_this_machine(tiny):
    """Each check runs and none finds fault; on a GPU's machine there are more of them."""
    command = [sys.executable, "-m", "pagewire", "doctor", str(tiny("llama").path), "--device", "cpu", "--port", "0"]
    done = subprocess.run([*command, "--no-generation"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    subjects = [line[8:22].strip() for line in lines[:-2]]
    assert [name for name in subjects if name not in ("compiler", "kernel cache")] == [
        "versions",
        "device",
        "memory",
        "disk",
        "run directory",
        "port",
        "model",
    ]
    assert lines[-1] == "everything works"
