"""The flags that the kinds of measurement have in common, and what they print and write."""

import argparse
import importlib.util
import time
from typing import Any

from ..cli import positive
from . import baselines, stats
from .interleave import Result

BEGAN = time.monotonic()


def add_common(parser: argparse.ArgumentParser, runs: int = 3) -> None:
    parser.add_argument(
        "--runs",
        type=positive,
        default=runs,
        help=f"times to measure each; the median is shown (default: {runs})",
    )
    about = "stop repeating when this much time would be exceeded; 0: no bound (default: 0)"
    parser.add_argument("--budget-s", type=float, default=0.0, metavar="S", help=about)
    parser.add_argument(
        "--scale",
        type=_scale,
        default=1.0,
        metavar="X",
        help="shrink requests and lengths, for a trial (default: 1)",
    )
    parser.add_argument(
        "--json",
        default="",
        metavar="FILE",
        help="also write the figures to this file, after each run",
    )


def add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plot",
        type=_png,
        default=None,
        metavar="FILE",
        help="also draw them (PNG; needs matplotlib)",
    )


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: more than 0 and at most 1 is needed")
    return value


def _png(text: str) -> str:
    """Refused before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(
            "matplotlib is not installed; `pip install 'pagewire[bench]'` brings it"
        )
    return text


def say(text: str) -> None:
    """A line of progress, with the time since the start."""
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def figures_line(result: Result, *names: str) -> str:
    """Some figures of the last run, as a line of progress."""
    if result.error:
        return f"failed: {result.error}"
    return ", ".join(f"{name} {stats.number(result.rows[-1][name])}" for name in names)


def cells(model: str, workload: str, figure: str, value: Any) -> list[Any]:
    """The columns "vLLM", "goal" and "of goal" for a figure of ours; a share of 100% or more meets
    the goal."""
    peer, goal = baselines.beside(model, workload, figure)
    if not goal or not isinstance(value, int | float):
        return [peer, goal, ""]
    target = float(goal.replace(",", ""))
    lower_is_better = "tok/s" not in figure
    return [
        peer,
        goal,
        f"{(target / value if lower_is_better else value / target) if value else 0:.0%}",
    ]
