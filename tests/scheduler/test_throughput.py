"""The line of throughput: while there is work, every ten seconds, and one of zeros after it."""

import logging
from typing import Any

import pytest
from pagewire.scheduler.throughput import PERIOD_S, ThroughputLog
from scheduler.scheduler_sim import World

NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
)


def test_rates_while_there_is_work(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pagewire.scheduler")
    stats = dict.fromkeys(NAMES, 0.0)
    throughput = ThroughputLog(lambda: dict(stats))

    def at(now: float, **changes: Any) -> list[str]:
        caplog.clear()
        stats.update(changes)
        throughput.tick(now)
        return [record.getMessage() for record in caplog.records]

    assert at(100.0) == []
    assert at(111.0) == [], "nothing happens, nothing is said"
    busy = {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "prompt_tokens": 500,
        "generation_tokens": 2000,
        "prefix_cache_queries": 400,
        "prefix_cache_hits": 100,
    }
    assert at(116.0, **busy) == [], "not before ten seconds are over"
    assert at(121.0) == [
        "prompt 50.0 tok/s, generation 200.0 tok/s, running 3, waiting 2, KV cache 25.0%, prefix cache hits 25.0%"
    ]
    assert caplog.records[0].fields["generation_tokens_per_s"] == 200.0
    (idle,) = at(131.0, num_requests_running=0, num_requests_waiting=0, kv_cache_usage_perc=0.0)
    assert idle.startswith("prompt 0.0 tok/s, generation 0.0 tok/s, running 0, waiting 0")
    assert at(141.0) == [] and at(151.0) == []
    assert len(at(161.0, generation_tokens=2100)) == 1
    assert len(at(171.0)) == 1 and at(181.0) == [], "one line of zeros after the last work"
    (waiting,) = at(191.0, num_requests_waiting=4)
    assert "running 0, waiting 4" in waiting, "what only waits is work too"


@pytest.mark.parametrize("disabled", [False, True])
def test_the_scheduler_says_it_unless_it_shall_not(
    disabled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pagewire.scheduler")
    world = World(disable_log_stats=disabled)
    world.add_worker()
    world.submit([1, 2, 3], world.add_tokenizer(), max_tokens=5)
    for _ in range(3):
        world.tick(PERIOD_S + 0.1)
    lines = [record.getMessage() for record in caplog.records if "tok/s" in record.getMessage()]
    assert bool(lines) is not disabled
