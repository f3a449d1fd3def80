"""The metrics of several replicas in one text: each series with the replica that it is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families


def merged_metrics(texts: Mapping[str, bytes]) -> bytes:
    """In Prometheus' text format.

    Args:
        texts: the same, by replica.
    """
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)


class _Merged:
    def __init__(self, texts: Mapping[str, bytes]) -> None:
        self._texts = texts

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for of_one in text_string_to_metric_families(text.decode()):
                family = families.setdefault(of_one.name, Metric(of_one.name, of_one.documentation, of_one.type))
                for sample in of_one.samples:
                    family.add_sample(sample.name, {"replica": replica, **sample.labels}, sample.value)
        yield from families.values()
