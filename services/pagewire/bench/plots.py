"""Figures as pictures: throughput against concurrency, and how latencies are distributed. The only
module that knows matplotlib."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import workloads
from .workloads import AGAINST_SUFFIX

KINDS = {
    "TTFT": "time to the first token (milliseconds)",
    "TPOT": "time per token after the first (milliseconds)",
    "gap": "pause between two pieces of a stream (milliseconds)",
}


def draw(report: dict[str, Any], path: str) -> None:
    """A PNG of a report's loads. Raises OSError when it cannot be written."""
    loads: dict[str, Any] = {name: load for name, load in report["loads"].items() if load["runs"]}
    lines = curves(loads)
    quantities = [
        quantity
        for quantity in KINDS
        if any(any(_drawable(load, quantity)) for load in loads.values())
    ]
    panels = max(1, len(quantities) + bool(lines))
    columns = min(2, panels)
    figure = Figure(figsize=(6 * columns, 4.2 * -(-panels // columns)), layout="constrained")
    figure.suptitle(
        f"{report['model']}, {report['machine'].get('gpu') or 'no GPU'}, {report['machine']['date']}",
        fontsize=9,
    )
    axes = iter([figure.add_subplot(-(-panels // columns), columns, i + 1) for i in range(panels)])
    if lines:
        _throughput(next(axes), lines)
    for quantity in quantities:
        _distribution(next(axes), quantity, loads, report["grid"])
    figure.savefig(path, dpi=120)


def curves(loads: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(streams, output tokens a second) by the lengths of the requests; those measured with one
    number of streams only make no curve unless nothing else does."""
    points_by_shape: dict[str, list[tuple[int, float]]] = {}
    for name, load in loads.items():
        plain = name.removesuffix(AGAINST_SUFFIX)
        workload = workloads.parse(plain) if "x" in plain else None
        if workload is not None and not workload.rate:
            shape = plain.partition("x")[2] + name[len(plain) :]
            points_by_shape.setdefault(shape, []).append(
                (workload.streams, load["median"]["out tok/s"])
            )
    long = {shape: sorted(points) for shape, points in points_by_shape.items() if len(points) > 1}
    return long or {shape: points for shape, points in points_by_shape.items() if points}


def _drawable(load: dict[str, Any], quantity: str) -> list[float]:
    return [
        value
        for value in load["distribution"].get(quantity, [])
        if value is not None and value == value
    ]


def _throughput(axes: Axes, lines: dict[str, list[tuple[int, float]]]) -> None:
    for shape, points in lines.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=shape)
    streams = sorted({x for points in lines.values() for x, _ in points})
    axes.set(
        xlabel="requests running at the same time",
        ylabel="output tokens per second, all requests together",
        xscale="log",
        ylim=(0, None),
    )
    axes.set_xticks(streams, [str(n) for n in streams], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="tokens per request, in/out", fontsize=8)


def _distribution(axes: Axes, quantity: str, loads: dict[str, Any], grid: list[float]) -> None:
    for name, load in loads.items():
        values = _drawable(load, quantity)
        if values and len(values) == len(grid):
            axes.plot(values, [100 * share for share in grid], label=name)
    what = "pauses" if quantity == "gap" else "requests"
    axes.set(
        xlabel=KINDS[quantity],
        ylabel=f"{what} that took at most so long (%)",
        ylim=(0, 100),
        xlim=(0, None),
    )
    if quantity == "gap":
        axes.set(xscale="log", xlim=(0.1, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
