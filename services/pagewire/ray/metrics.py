"""The metrics of several stacks as one page in Prometheus' text format, with a label that says of
which replica each number is."""

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
LABEL: Final = "replica"


class _Pages(Collector):
    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for replica, page in self._pages.items():
            for family in text_string_to_metric_families(page):
                metric = merged.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, LABEL: replica}
                    metric.samples.append(sample._replace(labels=labels))
        return merged.values()


def merged_page(pages: Mapping[str, str]) -> bytes:
    """One page of all, given each replica's own by its name."""
    registry = CollectorRegistry()
    registry.register(_Pages(pages))
    return generate_latest(registry)
