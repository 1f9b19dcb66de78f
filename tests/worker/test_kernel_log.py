"""`--log-kernels`: what is told of the kernels that ran, and when. The profiler and the GPU are
stand-ins."""

import logging

import pytest
import torch
from pagewire.worker.gpu import kernel_profile
from pagewire.worker.gpu.kernel_profile import Kernel, KernelProfile, kind_of, summary

US = 1000


class Event:
    """Of a GPU that is done when it is told so."""

    done = True

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.done


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(kernel_profile, "time", clock)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "done", True)
    return clock


def test_names_have_their_kinds() -> None:
    names = (
        "_decode",
        "_decode_inputs",
        "nvjet_sm90_tst_128x64",
        "void cublasLt::splitKreduce_kernel<32>",
        "_norm",
        "Memcpy HtoD",
        "x",
    )
    found = [kind_of(name) for name in names]
    assert found == [
        "decode attention",
        "other",
        "GEMMs",
        "GEMMs",
        "norms",
        "copies",
        "other",
    ]


def test_the_summary_adds_up() -> None:
    kernels: list[Kernel] = [
        ("nvjet_a", 0, 600 * US),
        ("_norm", 900 * US, 1000 * US),
        ("_norm", 950 * US, 1050 * US),
        ("nvjet_b", 0, 100 * US),
    ]
    lines = list(summary(kernels, 3))
    assert lines[0] == "3 steps, 4 kernels in 1 ms, busy for 71.4%; ms: GEMMs 1, norms 0"
    assert [line.split()[-1] for line in lines[1:]] == ["nvjet_a", "_norm", "nvjet_b"]
    assert lines[2].split()[:6] == ["0.2", "ms", "26.7%", "2", "x", "100.0"]


@pytest.mark.parametrize(
    ("pause", "busy", "told"), [(0.05, False, 0), (0.3, False, 1), (0.3, True, 0), (25.0, True, 1)]
)
def test_a_record_is_told_by_the_first_step_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
    pause: float,
    busy: bool,
    told: int,
) -> None:
    started: list[float] = []
    monkeypatch.setattr(kernel_profile, "_start", lambda: started.append(clock.now))
    monkeypatch.setattr(kernel_profile, "_stop", lambda: [("_sample", 0, 5 * US)])
    made = KernelProfile()
    with caplog.at_level(logging.INFO):
        for wait in (0.0, 0.01, 0.01, pause):
            clock.now += wait
            monkeypatch.setattr(Event, "done", not busy)
            made.begin()
            made.end(7)
    assert (
        len(started) == 1 + told
        and [r.getMessage().split(",")[0] for r in caplog.records][:1] == ["3 steps"] * told
    )


def test_nothing_recorded_is_nothing_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    monkeypatch.setattr(kernel_profile, "_start", lambda: None)
    monkeypatch.setattr(kernel_profile, "_stop", list)
    made = KernelProfile()
    made.begin()
    clock.now += 1
    made.begin()
    assert not caplog.records
