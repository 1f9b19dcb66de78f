"""When a start compiles ahead, what it compiles first, and what a rehearsal that fails leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pagewire.worker.gpu import first_start
from pagewire.worker.gpu.first_start import Launches, compile_kernels, rehearse
from pagewire_kernels import compile_ahead, workspace

NOTHING = Launches([], [])


class Compiler:
    """In place of compile_all and the GPU."""

    def __init__(self) -> None:
        self.compiled: list[list[Any]] = []

    def compile_all(self, wanted: list[Any], *rest: Any) -> None:
        self.compiled.append(list(wanted))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    made = Compiler()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream before")
    monkeypatch.setattr(compile_ahead, "compile_all", made.compile_all)
    return made


def start(*what: object, share: tuple[int, int] = (0, 1)) -> None:
    compile_kernels(lambda: NOTHING, what, share, lambda fraction: None)


def test_once_for_the_same_model_card_and_kernels(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_start, "rehearse", lambda launches: ["a", "b"])
    start("a model")
    start("a model")
    assert compiler.compiled == [["a", "b"]]
    start("another model")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another card")
    start("a model")
    assert len(compiler.compiled) == 3


def test_each_rank_begins_elsewhere(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_start, "rehearse", lambda launches: [1, 2, 3, 4, 5])
    start("a", share=(0, 2))
    start("b", share=(1, 2))
    assert compiler.compiled == [[1, 2, 3, 4, 5], [3, 4, 5, 1, 2]]


def test_a_rehearsal_that_fails_keeps_what_it_found(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    streams: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)

    def found() -> None:
        hook: Any = compile_ahead.knobs.runtime.jit_cache_hook
        told = {"specialization_data": "of a kernel", "constants": {}}
        assert hook(fn=Function("kernel"), compile=told)

    def fails() -> None:
        raise RuntimeError("an operation that cannot be captured")

    wanted = rehearse(Launches([found, found, fails, unreachable], []))
    assert [one.specialization for one in wanted] == ["of a kernel"]
    assert "one after the other: an operation that cannot be captured" in caplog.text
    assert streams == ["the stream before"]
    assert compile_ahead.knobs.runtime.jit_cache_hook is None


class Function:
    def __init__(self, name: str) -> None:
        self.jit_function = name


def unreachable() -> None:
    raise AssertionError("ran after a failure")


def test_counters_of_a_rehearsed_graph_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph would own their memory, and never clears them."""
    device = torch.device("meta")

    def made() -> torch.Tensor:
        return workspace.counters(device, "a rehearsal", 1)

    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    with workspace.rehearsing():
        assert made() is not made()
    with pytest.raises(RuntimeError, match="a rehearsal: the first call"):
        made()
    monkeypatch.undo()
    assert made() is made()
