"""Names of what a scheduler says of itself in a roster, where it is more than one number.

A histogram is its cumulative counts, one entry for each upper bound, the count of all values, and
their sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Final

ITERATION_TOKENS: Final = "iteration_tokens"
ITERATION_TOKENS_BOUNDS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a step; vLLM's bounds."""
REQUEST_PREEMPTIONS: Final = "request_preemptions"
REQUEST_PREEMPTIONS_BOUNDS: Final = (0, 1, 2, 5, 10)
"""How often a request that ended was preempted."""
MAX_WAIT_S: Final = 3600
HISTOGRAMS: Final = {
    ITERATION_TOKENS: ITERATION_TOKENS_BOUNDS,
    REQUEST_PREEMPTIONS: REQUEST_PREEMPTIONS_BOUNDS,
}


def flattened(name: str, counts: Sequence[int], total: float) -> Iterator[tuple[str, float]]:
    """The entries of a histogram. counts: by bound, the last of values above all; not
    cumulative."""
    reached = 0
    for bound, count in zip((*HISTOGRAMS[name], "inf"), counts, strict=True):
        reached += count
        yield f"{name}_le_{bound}", float(reached)
    yield f"{name}_sum", total


def unflattened(name: str, stats: Mapping[str, float]) -> tuple[list[tuple[str, float]], float]:
    """(cumulative counts by bound as Prometheus writes them, sum); zeros where they are missing."""
    buckets = [
        (f"{float(bound)}", stats.get(f"{name}_le_{bound}", 0.0)) for bound in HISTOGRAMS[name]
    ]
    buckets.append(("+Inf", stats.get(f"{name}_le_inf", 0.0)))
    return buckets, stats.get(f"{name}_sum", 0.0)


def wait_s(
    requests: float, tokens: float, requests_per_s: float, tokens_per_s: float
) -> int | None:
    """Seconds until a queue of so many is empty, rounded up, at least 1; None while no rate is
    known."""
    if requests_per_s <= 0 or tokens_per_s <= 0:
        return None
    seconds = max(requests / requests_per_s, tokens / tokens_per_s)
    return max(1, min(MAX_WAIT_S, ceil(seconds)))
