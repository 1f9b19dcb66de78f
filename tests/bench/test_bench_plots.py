"""Plots of loads: axes that say in plain English what is measured, and in which unit."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from pagewire.bench import plots, stats

ABBREVIATIONS = ("TTFT", "TPOT", "ITL", "tok/s", "p50", "ms", "concurrency")


def load(rate: float) -> dict[str, Any]:
    shares = {kind: [1.0 + n for n in range(len(stats.GRID))] for kind in plots.KINDS}
    return {"runs": [{}], "median": {"out tok/s": rate}, "distribution": shares}


def test_axes_are_in_plain_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    report = {
        "model": "tiny",
        "machine": {"gpu": "", "date": "2026-01-01"},
        "grid": stats.GRID,
        "loads": {"1x128/128": load(10.0), "8x128/128": load(60.0)},
    }
    plots.draw(report, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert len(figure.axes) == 1 + len(plots.KINDS)
    labels = [text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())]
    for label in labels:
        words = label.replace("(", " ").replace(")", " ").split()
        assert len(words) >= 5 and not set(words) & set(ABBREVIATIONS), label
    units = ("milliseconds", "per second", "(%)", "at the same time")
    assert all(any(unit in label for unit in units) for label in labels)
    assert figure.axes[0].get_legend().get_title().get_text() == "tokens per request, in/out"
