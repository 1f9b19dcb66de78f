"""/metrics in Prometheus' text format. Names that vLLM has are kept, so that its dashboards work;
the others begin with `pagewire:`.

The numbers are in the counters of all frontends and in the scheduler's roster; they are read when
/metrics is.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from pagewire_protocol.stats import ITERATION_TOKENS, REQUEST_PREEMPTIONS, unflattened
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ..requests.counters import Histogram
from .state import State

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_GAUGES: Final = {
    "num_requests_running": "Requests in a worker's batch.",
    "num_requests_waiting": "Requests waiting for a slot in the batch.",
    "kv_cache_usage_perc": "Share of the KV blocks in use; 1 is all.",
}
_COUNTERS: Final = {
    "num_preemptions": "Requests put back to make room for others.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
}
_OLD_NAMES: Final = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "prefix_cache_queries": "gpu_prefix_cache_queries",
    "prefix_cache_hits": "gpu_prefix_cache_hits",
}
"""Names that routers and boards of vLLM's earlier versions read."""
_STEP_TOKENS: Final = "vllm:iteration_tokens_total"
"""A histogram, in spite of its name."""
_SCHEDULER_GAUGES: Final = {
    "num_tokens_waiting": "Tokens of the requests that wait.",
    "requests_parked": "Requests whose clients read nothing; they get no further tokens.",
    "queue_requests_per_second": "Requests that leave the queue, lately, while some wait.",
    "queue_tokens_per_second": "Tokens of those.",
    "max_queued_reqs": "Requests that may wait before further ones get 429.",
    "max_queued_tokens": "Tokens that may wait before further requests get 429.",
    "kv_blocks_total": "KV blocks of all workers.",
    "kv_blocks_free": "KV blocks that can be taken, idle cached ones included.",
    "kv_blocks_cached": "KV blocks that hold a cached prefix.",
    "workers": "Workers that are ready.",
    "services_failing": "Services that failed several times in a row and are tried again with pauses.",
    "steps_in_flight": "Steps sent to workers that have no result yet.",
    "stats_timestamp_seconds": "When the scheduler counted all this, in seconds since 1970.",
    "step_seconds": "Time of a step lately, of the slowest worker.",
    "step_time_ratio": "What steps with prefill took of their estimate lately, of the slowest worker.",
}
_SCHEDULER_COUNTERS: Final = {
    "prompt_tokens": "Prompt tokens of requests that got a slot, cached ones included.",
    "generation_tokens": "Tokens that workers have sampled.",
    "steps": "Steps sent to workers.",
    "starved_steps": "Steps sent ahead that came when a GPU had nothing left to compute: the host was too slow for it.",
    "service_deaths": "Services that ended without being asked to, or hung, since the scheduler started.",
}
_KEY_USAGE: Final = {
    "requests": "Requests of an API key that were let pass.",
    "refused": "Requests of an API key that were refused by its limits.",
    "running": "Requests of an API key that have no complete answer yet.",
    "prompt_tokens": "Prompt tokens of an API key.",
    "generation_tokens": "Tokens generated for an API key.",
}
_HISTOGRAMS: Final = {
    "time_to_first_token_seconds": ("time_to_first_token", "From the request to its first token."),
    "inter_token_latency_seconds": ("inter_token_latency", "Between two rows of output."),
    "time_per_output_token_seconds": (
        "inter_token_latency",
        "As vllm:inter_token_latency_seconds, for older boards.",
    ),
    "request_time_per_output_token_seconds": (
        "time_per_output_token",
        "A request's mean time between two tokens.",
    ),
    "e2e_request_latency_seconds": ("e2e_latency", "From the request to its end."),
    "request_queue_time_seconds": (
        "queue_time",
        "From the request to its slot in a worker's batch.",
    ),
    "request_prefill_time_seconds": ("prefill_time", "From that slot to the first token."),
    "request_decode_time_seconds": ("decode_time", "From the first token to the last."),
    "request_inference_time_seconds": ("inference_time", "From that slot to the last token."),
    "request_prompt_tokens": ("request_prompt_tokens", "Prompt tokens of a request that ended."),
    "request_generation_tokens": (
        "request_generation_tokens",
        "Tokens generated for a request that ended.",
    ),
    "request_max_num_generation_tokens": (
        "request_generation_tokens",
        "As vllm:request_generation_tokens: choices are counted singly.",
    ),
    "request_params_max_tokens": ("params_max_tokens", "max_tokens of a request that ended."),
    "request_params_n": ("params_n", "n of an HTTP request."),
}
"""vLLM's name: the attribute of Counters, and the help text."""


def render(state: State) -> bytes:
    """All metrics, of all frontends of the stack, as Prometheus' text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(state))  # type: ignore[arg-type]
    # Of this frontend: where several share an address, of the one that was asked.
    registry.register(_Process())  # type: ignore[arg-type]
    return generate_latest(registry)


class _Process:
    """The gauges of this process. Its processor time would fall where another frontend is asked the
    next time."""

    def __init__(self) -> None:
        self._collector = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        for family in self._collector.collect():
            if family.type == "gauge":
                yield family


class _Collector:
    def __init__(self, state: State) -> None:
        self._state = state
        self._counters = state.all_counters()
        self._labels = {"engine": "0", "model_name": state.names[0]}

    def collect(self) -> Iterator[Metric]:
        yield from self._scheduler()
        yield from self._requests()
        yield from self._frontend()
        yield from self._services()

    def _scheduler(self) -> Iterator[Metric]:
        stats = self._state.stack.stats
        for name, text in _GAUGES.items():
            value = stats.get(name, 0.0)
            yield self._gauge(f"vllm:{name}", text, value)
            if name in _OLD_NAMES:
                yield self._gauge(
                    f"vllm:{_OLD_NAMES[name]}", f"{text} As vllm:{name}, for older boards.", value
                )
        if stats:
            yield from self._counted_by_scheduler(stats)
        yield self._cache_config(stats)
        for name, text in _SCHEDULER_GAUGES.items():
            yield self._gauge(f"pagewire:scheduler_{name}", text, stats.get(name, 0.0))

    def _counted_by_scheduler(self, stats: Mapping[str, float]) -> Iterator[Metric]:
        """Left out by a frontend that has not heard of them yet: 0 would be a fall."""
        for name, text in _COUNTERS.items():
            value = stats.get(name, 0.0)
            yield self._counter(f"vllm:{name}", text, value)
            if name in _OLD_NAMES:
                yield self._counter(
                    f"vllm:{_OLD_NAMES[name]}", f"{text} As vllm:{name}, for older boards.", value
                )
        yield self._from_stats(_STEP_TOKENS, "Tokens computed in a step.", ITERATION_TOKENS, stats)
        yield self._from_stats(
            "vllm:request_num_preemptions",
            "How often a request that ended was put back.",
            REQUEST_PREEMPTIONS,
            stats,
        )
        for name, text in _SCHEDULER_COUNTERS.items():
            yield self._counter(f"pagewire:scheduler_{name}", text, stats.get(name, 0.0))

    def _cache_config(self, stats: Mapping[str, float]) -> Metric:
        """Settings of the KV cache as labels of a gauge that is always 1, as vLLM has them."""
        labels = {
            "block_size": f"{stats.get('kv_block_size', 0):.0f}",
            "num_gpu_blocks": f"{stats.get('kv_blocks_total', 0):.0f}",
            "enable_prefix_caching": str(bool(stats.get("prefix_caching", 0))),
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Settings of the KV cache.",
            labels=[*self._labels, *labels],
        )
        family.add_metric([*self._labels.values(), *labels.values()], 1.0)
        return family

    def _requests(self) -> Iterator[Metric]:
        counters = self._counters
        yield self._counter(
            "vllm:prompt_tokens", "Prompt tokens of started requests.", counters.prompt_tokens
        )
        yield self._counter(
            "vllm:prompt_tokens_cached",
            "Those of them that need no computing.",
            counters.cached_tokens,
        )
        yield self._counter(
            "vllm:generation_tokens", "Tokens generated.", counters.generation_tokens
        )
        success = CounterMetricFamily(
            "vllm:request_success",
            "Requests that ended.",
            labels=[*self._labels, "finished_reason"],
        )
        for reason, count in counters.reasons.items():
            success.add_metric([*self._labels.values(), reason], count)
        yield success
        for name, (attribute, text) in _HISTOGRAMS.items():
            yield self._histogram(f"vllm:{name}", text, getattr(counters, attribute))

    def _frontend(self) -> Iterator[Metric]:
        state = self._state
        yield self._gauge(
            "pagewire:ready",
            "1 when a tokenizer and a worker are ready, as /ready says.",
            float(state.stack.ready(state.clock())),
        )
        yield self._gauge(
            "pagewire:frontend_streams", "Requests owned by this process.", len(state.owner)
        )
        yield self._gauge(
            "pagewire:frontend_streams_suspended",
            "Those of them waiting for the next attempt.",
            len(state.owner.suspended),
        )
        yield self._gauge(
            "pagewire:frontend_event_loop_lag_seconds", "Lateness of the last timer.", state.lag_s
        )
        yield self._counter(
            "pagewire:frontend_resubmissions",
            "Attempts beyond the first.",
            self._counters.resubmissions,
        )
        yield self._counter(
            "pagewire:frontend_malformed_messages",
            "Messages dropped as malformed.",
            self._counters.malformed,
        )
        yield self._counter(
            "pagewire:cached_prompt_tokens",
            "Prompt tokens that need no computing.",
            self._counters.cached_tokens,
        )
        cpu = CounterMetricFamily(
            "process_cpu_seconds", "Processor time of all frontends, those that are gone included."
        )
        cpu.add_metric([], self._counters.cpu_seconds)
        yield cpu
        yield from self._keys()
        answers = CounterMetricFamily(
            "pagewire:frontend_http_responses", "HTTP answers.", labels=["method", "route", "code"]
        )
        for key, count in sorted(self._counters.responses.items()):
            answers.add_metric(key.split(" "), count)
        yield answers

    def _keys(self) -> Iterator[Metric]:
        """What each key of --api-keys-file has used; nothing where there are none."""
        for what, text in _KEY_USAGE.items():
            kind = GaugeMetricFamily if what == "running" else CounterMetricFamily
            family = kind(f"pagewire:key_{what}", text, labels=["key"])
            for name, count in sorted(self._counters.key_usage.items()):
                counted, _, key = name.partition(" ")
                if counted == what:
                    family.add_metric([key], count)
            if family.samples:
                yield family

    def _services(self) -> Iterator[Metric]:
        services = GaugeMetricFamily(
            "pagewire:service_ready", "1 when the service is ready.", labels=["role", "name"]
        )
        for peer in self._state.stack.roster.peers if self._state.stack.roster else ():
            services.add_metric([peer.role.name.lower(), peer.name], float(peer.ready))
        yield services

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _from_stats(self, name: str, text: str, key: str, stats: Mapping[str, float]) -> Metric:
        buckets, total = unflattened(key, stats)
        family = HistogramMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets, total)  # type: ignore[arg-type]
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), histogram.buckets(), histogram.sum)  # type: ignore[arg-type]
        return family
