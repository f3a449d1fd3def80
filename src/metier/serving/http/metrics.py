"""What Prometheus is told: requests and tokens by delta, and how the engine stands.

Counters and histograms are kept here; how many run and wait and where deltas lie is asked of the engine when somebody
looks. The registry is the server's own, so that two servers in a process do not add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from metier.serving.contract import DeltaService, Tier

Outcome = Literal["finished", "failed", "cancelled", "refused"]
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


_MOST_GONE = 64
"""Names whose series are kept although they are not served any more, so that they are seen once more."""


class Metrics:
    """`model` is always a name that is served, else clients could make as many series as they like.

    A server into which deltas come under ever new names does not keep the series of all of them.
    """

    def __init__(self, engine: DeltaService, base_name: str) -> None:
        self._engine, self._base_name = engine, base_name
        self._names: dict[str, None] = {}
        """That have series, in the order in which they came."""
        self._registry = CollectorRegistry()
        self._requests = self._counter("metier_requests", "Requests by how they ended.", "model", "outcome")
        self._prompt = self._counter("metier_prompt_tokens", "Tokens of prompts.", "model")
        self._cached = self._counter("metier_cached_prompt_tokens", "Tokens of prompts found in the cache.", "model")
        self._generated = self._counter("metier_generated_tokens", "Tokens of answers.", "model")
        self._whole = self._histogram("metier_request_seconds", "Whole requests.", _REQUEST_SECONDS)
        self._first = self._histogram("metier_time_to_first_token_seconds", "To first tokens.", _FIRST_TOKEN_SECONDS)
        self._each = self._histogram("metier_time_per_output_token_seconds", "Further tokens, each.", _TOKEN_SECONDS)
        self._arrivals = self._counter(
            "metier_delta_requests", "Requests for a delta by the tier it lay in when they came.", "model", "tier"
        )
        self._metrics: tuple[Counter | Histogram, ...] = (
            *(self._requests, self._prompt, self._cached, self._generated),
            *(self._whole, self._first, self._each, self._arrivals),
        )
        self._registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def count_request(self, model: str, outcome: Outcome, *, seconds: float | None = None) -> None:
        """A request that is over; one that was refused took no time."""
        self._keep_name(model)
        self._requests.labels(model, outcome).inc()
        if seconds is not None:
            self._whole.labels(model).observe(seconds)

    def count_arrival(self, model: str, tier: Tier) -> None:
        """A request for a delta that came here by somebody's choice among several engines."""
        self._keep_name(model)
        self._arrivals.labels(model, tier).inc()

    def count_prompt_tokens(self, model: str, num_tokens: int, num_cached: int) -> None:
        self._prompt.labels(model).inc(num_tokens)
        self._cached.labels(model).inc(num_cached)

    def count_answer(self, model: str, *, num_tokens: int, to_first_token: float, to_last_token: float) -> None:
        """An answer of at least one token; seconds since its request."""
        self._generated.labels(model).inc(num_tokens)
        self._first.labels(model).observe(to_first_token)
        if num_tokens > 1:
            self._each.labels(model).observe((to_last_token - to_first_token) / (num_tokens - 1))

    def _keep_name(self, model: str) -> None:
        if model not in self._names:
            self._names[model] = None
            self._forget_names()

    def _forget_names(self) -> None:
        served = {self._base_name, *(delta.name for delta in self._engine.deltas())}
        gone = [name for name in self._names if name not in served]
        for name in gone[:-_MOST_GONE]:
            del self._names[name]
            for metric in self._metrics:
                metric.remove_by_labels({"model": name})

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("model",), registry=self._registry, buckets=buckets)


class _EngineCollector:
    def __init__(self, engine: DeltaService) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Nothing beforehand: registering must not ask the engine, which need not be up yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        status = self._engine.status()
        yield GaugeMetricFamily("metier_engine_up", "Whether the engine is alive.", float(status.is_alive))
        yield GaugeMetricFamily("metier_running_requests", "Answers in the batch.", status.num_running)
        yield GaugeMetricFamily("metier_waiting_requests", "Answers that wait for the batch.", status.num_waiting)
        yield GaugeMetricFamily("metier_cache_used_ratio", "Share of the KV cache's blocks taken.", status.cache_used)
        tiers = GaugeMetricFamily("metier_tier_bytes", "Bytes of deltas in a tier.", labels=("tier",))
        for tier, num_bytes in status.delta_bytes.items():
            tiers.add_metric((tier,), num_bytes)
        yield tiers
        yield from self._of_deltas()

    def _of_deltas(self) -> Iterator[Metric]:
        sizes = GaugeMetricFamily(
            "metier_delta_bytes", "Bytes of a delta's rows, and its tier.", labels=("model", "tier")
        )
        running = GaugeMetricFamily(
            "metier_delta_running_requests", "Answers in the batch by delta.", labels=("model",)
        )
        for delta in self._engine.deltas():
            sizes.add_metric((delta.name, delta.tier), delta.num_bytes)
            running.add_metric((delta.name,), delta.num_running)
        yield sizes
        yield running
