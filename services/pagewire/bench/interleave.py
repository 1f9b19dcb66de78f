"""Repeated measurements in a bounded time: each once, then all of them again, alternately, while
there is time."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SLACK = 1.1
FAILURES = (ValueError, OSError, RuntimeError)
Row = dict[str, float]


class Budget:
    """A span of time that must not be overrun. `seconds` 0: no bound."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds if seconds else float("inf")

    def left(self) -> float:
        return self._end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        return seconds * SLACK < self.left()


@dataclass
class Result:
    """The rows of one measure, and why it stopped if it failed."""

    rows: list[Row] = field(default_factory=list)
    error: str = ""

    def median(self) -> Row:
        return (
            {key: statistics.median(row[key] for row in self.rows) for key in self.rows[0]}
            if self.rows
            else {}
        )

    def as_json(self) -> dict[str, Any]:
        error = {"error": self.error} if self.error else {}
        return {"median": self.median(), "runs": self.rows, **error}


def run_interleaved(
    measures: Mapping[str, Callable[[int], Row]],
    runs: int,
    budget: Budget,
    done: Callable[[str, Result], None],
) -> dict[str, Result]:
    """Each measure at most `runs` times; it gets the number of the run. Repeats go round all
    measures, so that a machine that changes its speed changes all of them, and are skipped when
    they would not end in time. One that fails is not repeated. `done` hears of each."""
    results = {name: Result() for name in measures}
    took = dict.fromkeys(measures, 0.0)
    for run in range(runs):
        for name, measure in measures.items():
            result = results[name]
            if result.error or not budget.allows(took[name]):
                continue
            began = time.monotonic()
            try:
                result.rows.append(measure(run))
            except FAILURES as error:
                result.error = str(error) or type(error).__name__
            took[name] = time.monotonic() - began
            done(name, result)
    for result in results.values():
        if not result.rows and not result.error:
            result.error = "no time left"
    return results
