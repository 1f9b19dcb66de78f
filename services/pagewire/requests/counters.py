"""Counts of what happened to requests, cheap enough for every token. Knows nothing of how they are
published."""

from bisect import bisect_left
from typing import Final, Protocol

# Upper bounds of histograms, those of vLLM.
FIRST_TOKEN_S: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
GAP_S: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
LATENCY_S: Final = (
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
)
TOKENS: Final = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
SEQUENCES: Final = (1.0, 2.0, 5.0, 10.0, 20.0)


class Histogram:
    """Counts by upper bound; the last count is of values above all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by bound, as Prometheus wants them."""
        total = 0
        rows = list[tuple[str, float]]()
        for bound, count in zip(
            [*map(str, map(float, self.bounds)), "+Inf"], self.counts, strict=True
        ):
            total += count
            rows.append((bound, total))
        return rows


class Ended(Protocol):
    """What is counted of a request that ended: times in seconds on one clock, 0 for what did not
    happen."""

    arrival_time: float
    scheduled_time: float
    first_token_time: float
    last_token_time: float
    prompt_tokens: int

    @property
    def output_tokens(self) -> int:
        """How many tokens it got."""
        ...

    @property
    def max_tokens(self) -> int:
        """How many it could have got."""
        ...


class Counters:
    """Everything that is counted of requests in one process. Attributes are numbers, numbers by
    name, and histograms of seconds or tokens."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.resubmissions = 0
        self.malformed = 0
        self.cpu_seconds = 0.0
        """Processor time of the process."""
        self.reasons: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.responses: dict[str, int] = {}
        """HTTP answers, by method, route and status, with spaces between."""
        self.key_usage: dict[str, int] = {}
        """Of API keys with names: what is counted and the key's name, with a space between."""
        self.time_to_first_token = Histogram(FIRST_TOKEN_S)
        self.inter_token_latency = Histogram(GAP_S)
        self.time_per_output_token = Histogram(GAP_S)
        self.e2e_latency = Histogram(LATENCY_S)
        self.queue_time = Histogram(LATENCY_S)
        self.inference_time = Histogram(LATENCY_S)
        self.prefill_time = Histogram(LATENCY_S)
        self.decode_time = Histogram(LATENCY_S)
        self.request_prompt_tokens = Histogram(TOKENS)
        self.request_generation_tokens = Histogram(TOKENS)
        self.params_max_tokens = Histogram(TOKENS)
        self.params_n = Histogram(SEQUENCES)
        self.first_token = self.time_to_first_token.observe
        self.gap = self.inter_token_latency.observe

    def finished(self, reason: str) -> None:
        """A request ended: "stop", "length", "abort" or "error"."""
        self.reasons[reason] += 1

    def started(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A request got its first slot on a worker."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens

    def completed(self, reason: str, request: Ended, now: float) -> None:
        """A request ended with all its output."""
        self.finished(reason)
        self.e2e_latency.observe(now - request.arrival_time)
        self.request_prompt_tokens.observe(request.prompt_tokens)
        self.request_generation_tokens.observe(request.output_tokens)
        self.params_max_tokens.observe(request.max_tokens)
        if request.scheduled_time and request.first_token_time:
            self.queue_time.observe(request.scheduled_time - request.arrival_time)
            self.prefill_time.observe(request.first_token_time - request.scheduled_time)
            self.decode_time.observe(request.last_token_time - request.first_token_time)
            self.inference_time.observe(request.last_token_time - request.scheduled_time)
        if request.output_tokens > 1:
            self.time_per_output_token.observe(
                (request.last_token_time - request.first_token_time) / (request.output_tokens - 1)
            )

    def responded(self, method: str, route: str, status: int) -> None:
        """An HTTP answer of this status. route: the pattern of a route, not what was asked for, of
        which there may be any number."""
        key = f"{method} {route} {status}"
        self.responses[key] = self.responses.get(key, 0) + 1
