"""From samples to figures, and figures to a table and a file."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .interleave import Row
from .load import Sample

GRID = [0.0, *(i / 100 for i in range(1, 100)), 0.995, 0.999, 1.0]
"""Shares at which a distribution is written down."""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `values` do not exceed; NaN when there are
    none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def latencies(samples: list[Sample]) -> dict[str, list[float]]:
    """Milliseconds. TTFT: from the start to the first token. TPOT: a token after the first, by
    request. gap: between arrivals, pooled."""
    good = [sample for sample in samples if not sample.error]
    return {
        "TTFT": [1000 * (s.first - s.began) for s in good if s.first],
        "TPOT": [1000 * (s.last - s.first) / (s.tokens - 1) for s in good if s.tokens > 1],
        "gap": [1000 * gap for s in good for gap in s.gaps],
    }


def distribution(latencies_by_kind: dict[str, list[float]]) -> dict[str, list[float]]:
    """The percentiles of GRID of each kind of latency."""
    shares: dict[str, list[float]] = {}
    for name, values in latencies_by_kind.items():
        ordered = sorted(values)
        shares[name] = (
            [ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in GRID]
            if ordered
            else []
        )
    return shares


def summarize(samples: list[Sample]) -> Row:
    """Throughput in tokens and requests a second, latencies in milliseconds. Tokens are those that
    the server's usage reports."""
    good = [sample for sample in samples if not sample.error]
    seconds = max((s.last for s in good), default=0.0) - min((s.began for s in good), default=0.0)
    tokens = sum(s.tokens for s in good)
    figures: Row = {
        "out tok/s": tokens / seconds if seconds else math.nan,
        "requests/s": len(good) / seconds if seconds else math.nan,
        "seconds": seconds,
        "failed": len(samples) - len(good),
        "chunks/token": sum(max(0, s.chunks - 1) for s in good) / tokens if tokens else math.nan,
    }
    for name, values in latencies(samples).items():
        figures |= {f"{name} p50": percentile(values, 0.5), f"{name} p99": percentile(values, 0.99)}
    return figures


def number(value: Any) -> str:
    """Three digits or so: more would be noise."""
    if not isinstance(value, int | float):
        return str(value)
    if math.isnan(value):
        return "-"
    size = abs(value)
    return (
        f"{value:,.0f}"
        if size >= 100 or value == int(value)
        else f"{value:.1f}"
        if size >= 10
        else f"{value:.2f}"
    )


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns, the first flush left. A column without any cell is left out."""
    cells = [list(header), *([number(cell) for cell in row] for row in rows)]
    kept = [i for i in range(len(header)) if not rows or any(row[i] != "" for row in cells[1:])]
    widths = [max(len(row[i]) for row in cells) for i in kept]
    lines = [
        "  ".join(
            f"{row[i]:{'<' if i == 0 else '>'}{width}}"
            for i, width in zip(kept, widths, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def write_json(path: str, figures: Any) -> None:
    """Written whole or not at all: a reader may come at any time."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(_clean(figures), indent=1) + "\n")
    temporary.replace(path)


def _clean(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list | tuple) else value
