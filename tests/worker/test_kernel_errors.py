"""What a person is told when a kernel does not fit the GPU or does not compile for it."""

from typing import NoReturn

import pytest
from pagewire.worker.device.gpus import GIB, Gpu
from pagewire.worker.device.kernel_errors import is_triton, kernel_of
from pagewire.worker.load import memory_errors
from pagewire.worker.load.kv_sizing import Sizing
from pagewire.worker.load.memory_errors import GpuFailed, explained

triton = pytest.importorskip("triton")

L4 = Gpu(0, "NVIDIA L4", (8, 9), 22 * GIB, 21 * GIB)
SIZING = Sizing(GIB, 1 << 20, 100, 16, 1600, gpu=L4)


@pytest.fixture(autouse=True)
def same_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_errors, "_now", lambda sizing: L4)


def refused(note: str) -> Exception:
    error = triton.OutOfResources(131_072, 101_376, "shared memory")
    error.add_note(note)
    return error


def told(error: Exception) -> str:
    with pytest.raises(GpuFailed) as caught, explained("capturing graphs", SIZING):
        raise error
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_kernel_that_does_not_fit() -> None:
    line = told(refused("prefill attention (head size 256, 4 bytes an element)"))
    assert line.startswith(
        "prefill attention (head size 256, 4 bytes an element) does not fit GPU 0 (NVIDIA L4, 22.0 GiB): its smallest launch shape needs "
        "131,072 of shared memory, a block may have 101,376. What helps: --dtype bfloat16"
    )


class Broken:
    """A driver at which the launch of a real kernel ends."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def get_current_device(self) -> NoReturn:
        raise self._error


def _made_up(x) -> None:
    """A kernel that does nothing."""


@pytest.mark.parametrize("which", ["PTXASError", "CompilationError"])
def test_a_kernel_that_does_not_compile(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import JITFunction, driver
    from triton.runtime.errors import PTXASError

    words = "ptxas fatal:\n  no such instruction " + "x" * 1000
    error = (
        PTXASError(words)
        if which == "PTXASError"
        else triton.CompilationError("def f():\n    pass", None, words)
    )
    monkeypatch.setattr(driver, "_active", Broken(error))
    with pytest.raises(GpuFailed) as caught, explained("capturing graphs", SIZING):
        JITFunction(_made_up)[(1,)](3)
    line = str(caught.value)
    assert line.startswith(
        f"the kernel _made_up does not compile for GPU 0 (NVIDIA L4, 22.0 GiB) while capturing graphs: {which}: "
    )
    assert (
        "no such instruction" in line
        and "--device cpu" in line
        and "\n" not in line
        and len(line) < 800
    )


def test_what_is_not_tritons_passes() -> None:
    for error in (ValueError("CUDA is a word"), KeyError("CUDA"), RuntimeError("a defect")):
        assert not is_triton(error)
        with pytest.raises(type(error)) as caught, explained("x", SIZING):
            raise error
        assert caught.value is error
    assert kernel_of(triton.OutOfResources(1, 0, "threads")) == "a kernel"
