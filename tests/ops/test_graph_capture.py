"""How graphs are captured: so that other threads may use the GPU meanwhile."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pagewire_kernels.graph_capture import capture

ROOT = Path(__file__).parents[2]


def test_only_the_capturing_threads_calls_count(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: made.append(options))
    graph: Any = object()
    capture(graph, (0, 1))
    assert made == [{"pool": (0, 1), "capture_error_mode": "thread_local"}]


def test_nothing_captures_in_another_way() -> None:
    """A thread that waits for an event ends a capture of the usual mode with an error."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("services", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bcuda\.graph\(|capture_begin\(", path.read_text())
    ]
    assert found == ["kernels/pagewire_kernels/graph_capture.py"]
