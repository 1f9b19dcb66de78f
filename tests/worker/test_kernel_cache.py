"""Compiled kernels are kept where the next start finds them, or somewhere at least, and the images
and compose files give them a volume."""

import os
import re
from pathlib import Path

import pytest
import yaml
from pagewire.worker.device import kernel_cache

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in (kernel_cache.VARIABLE, "XDG_CACHE_HOME", "PAGEWIRE_CACHE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_usually_in_the_users_cache(home, tmp_path):
    place = kernel_cache.prepare(tmp_path / "run")
    assert place == home / ".cache" / "pagewire" / "triton" and place.is_dir()
    assert os.environ["TRITON_CACHE_DIR"] == str(place)
    assert not list(place.iterdir()) and not (tmp_path / "run").exists()


def test_where_the_user_says(home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kernel_cache.prepare(tmp_path) == tmp_path / "xdg" / "pagewire" / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    assert kernel_cache.prepare(tmp_path) == tmp_path / "own"


def test_without_a_writable_home_the_run_directory_serves(home, tmp_path, monkeypatch, caplog):
    home.rmdir()
    home.write_text("no directory")
    assert kernel_cache.prepare(tmp_path / "run") == tmp_path / "run" / "triton"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "run" / "triton")
    (record,) = caplog.records
    assert (
        "cannot be kept" in record.getMessage()
        and "set TRITON_CACHE_DIR to a directory that stays" in record.getMessage()
    )


def test_what_was_compiled_is_counted(home, tmp_path, caplog):
    caplog.set_level("INFO", "pagewire.worker")

    def compile_one(name: str) -> None:
        (kernel_cache.usual() / name).mkdir()
        (kernel_cache.usual() / name / "kernel.cubin").touch()

    with kernel_cache.kept(tmp_path):
        compile_one("a")
        compile_one("b")
    with kernel_cache.kept(tmp_path):
        pass
    said = [record.getMessage().partition(" in ")[0] for record in caplog.records]
    assert said == ["2 kernels compiled, 0 found", "0 kernels compiled, 2 found"]


@pytest.mark.parametrize(("name", "service"), [("default", "worker"), ("single", "pagewire")])
def test_containers_keep_them_in_a_named_volume(name, service):
    (place,) = re.findall(r"^ENV TRITON_CACHE_DIR=(\S+)", (ROOT / "Dockerfile").read_text(), re.M)
    compose = yaml.safe_load((ROOT / "compose" / f"{name}.yaml").read_text())
    mounts = dict(
        volume.split(":")[:2][::-1]
        for volume in compose["services"][service]["volumes"]
        if "${" not in volume
    )
    (volume,) = [source for target, source in mounts.items() if Path(place).is_relative_to(target)]
    assert volume in compose["volumes"] and not compose["volumes"][volume], (
        "a volume on disk, not in memory"
    )
