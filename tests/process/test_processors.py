"""How many processors a process may use."""

import os
from pathlib import Path

import pytest
from pagewire.process import processors
from pagewire.worker.step import matcher_pool


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("max 100000", 12),
        ("9900000 100000", 12),
        (None, 12),
    ],
)
def test_affinity_and_quota(
    quota: str | None, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also for the most matcher processes that a worker starts."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setattr(processors, "QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert processors.usable() == expected
    assert matcher_pool.max_matchers() == expected
