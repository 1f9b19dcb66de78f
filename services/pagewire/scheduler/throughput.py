"""One log line every ten seconds while there is work: what the stack does, as vLLM's engine says
it. Knows counters and gauges, no requests."""

import logging
from collections.abc import Callable, Mapping
from typing import Final

log = logging.getLogger("pagewire.scheduler")
PERIOD_S: Final = 10.0


class ThroughputLog:
    """`tick` is called often; it reads `stats` (see SchedulerState.stats) when a line is due."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._stats = stats
        self._last: Mapping[str, float] = {}
        self._last_time = 0.0

    def tick(self, now: float) -> None:
        """now: monotonic seconds. A line of zeros follows the last one with work, once."""
        if self._last and now - self._last_time < PERIOD_S:
            return
        stats = self._stats()
        previous = self._last
        seconds = now - self._last_time
        self._last, self._last_time = stats, now
        if previous and (self._busy(stats, previous) or previous.get("reported")):
            self._report(stats, previous, seconds)
            self._last = {**stats, "reported": float(self._busy(stats, previous))}

    def _busy(self, stats: Mapping[str, float], previous: Mapping[str, float]) -> bool:
        return bool(
            stats["num_requests_running"]
            or stats["num_requests_waiting"]
            or stats["prompt_tokens"] != previous["prompt_tokens"]
            or stats["generation_tokens"] != previous["generation_tokens"]
        )

    def _report(
        self, stats: Mapping[str, float], previous: Mapping[str, float], seconds: float
    ) -> None:
        def grown(name: str) -> float:
            return stats[name] - previous[name]

        queries = grown("prefix_cache_queries")
        fields = {
            "prompt_tokens_per_s": round(grown("prompt_tokens") / seconds, 1),
            "generation_tokens_per_s": round(grown("generation_tokens") / seconds, 1),
            "running": int(stats["num_requests_running"]),
            "waiting": int(stats["num_requests_waiting"]),
            "kv_cache_usage": round(stats["kv_cache_usage_perc"], 4),
            "prefix_cache_hit_rate": round(grown("prefix_cache_hits") / queries, 4)
            if queries
            else 0.0,
        }
        log.info(
            "prompt %s tok/s, generation %s tok/s, running %d, waiting %d, KV cache %.1f%%, prefix cache hits %.1f%%",
            fields["prompt_tokens_per_s"],
            fields["generation_tokens_per_s"],
            fields["running"],
            fields["waiting"],
            100 * fields["kv_cache_usage"],
            100 * fields["prefix_cache_hit_rate"],
            extra={"fields": fields},
        )
