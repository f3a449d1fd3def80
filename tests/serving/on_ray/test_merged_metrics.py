"""The metrics of two replicas in one text."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from metier.serving.http.metrics import Metrics
from metier.serving.on_ray.merged_metrics import merged_metrics
from serving.fake_engine import FakeEngine
from serving.made_tokenizers import byte_level


def metrics_of(*tiers: str) -> Metrics:
    metrics = Metrics(FakeEngine(byte_level()), "base")
    for tier in tiers:
        metrics.count_arrival("law", tier)
        metrics.count_request("law", "finished", seconds=0.2)
    return metrics


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(text.decode())
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_each_series_says_of_which_replica_it_is_and_none_is_lost() -> None:
    one, other = metrics_of("accelerator", "disk", "accelerator"), metrics_of("host")
    merged = merged_metrics({"r1": one.text(), "r2": other.text()})
    found = samples(merged)
    assert found["metier_delta_requests_total", "accelerator", "law", "r1"] == 2
    assert found["metier_delta_requests_total", "disk", "law", "r1"] == 1
    assert found["metier_delta_requests_total", "host", "law", "r2"] == 1
    assert found["metier_request_seconds_count", "law", "r1"] == 3
    assert found["metier_request_seconds_bucket", "0.25", "law", "r2"] == 1
    assert len(found) == len(samples(one.text())) + len(samples(other.text()))


def test_each_metric_is_described_once_with_its_kind() -> None:
    text = merged_metrics({"r1": metrics_of("disk").text(), "r2": metrics_of("disk").text()}).decode()
    for line in ("metier_requests_total counter", "metier_request_seconds histogram", "metier_engine_up gauge"):
        assert text.count(f"# TYPE {line}") == 1
