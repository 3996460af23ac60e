"""Prometheus metrics of the whole service; none of them names a tenant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ragcache.errors import StoreError

if TYPE_CHECKING:
    from ragcache.api.service import Service
    from ragcache.types import Answer

#: Gauges of the quality monitor. The second is the name of before, for one more release.
_MONITOR = {
    "ragcache_quality_monitor": "Answers compared with full prefill",
    "ragcache_guard": "Deprecated: ragcache_quality_monitor",
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one app, in a registry of its own, so that a process may have several apps."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "ragcache_requests",
            "HTTP requests by route and status",
            ["route", "status"],
            registry=registry,
        )
        self.ttft = Histogram(
            "ragcache_ttft_seconds",
            "Seconds from a request's arrival to its first token, waiting included",
            ["mode"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.queued = Histogram(
            "ragcache_queued_seconds",
            "Seconds that requests waited for the engine",
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            "ragcache_tokens",
            "cached: of prompts, with loaded KV; computed: the rest of the prompts; answer",
            ["kind"],
            registry=registry,
        )
        self.misses = Counter(
            "ragcache_chunk_misses",
            "Chunks of prompts whose KV was not usable and was computed",
            ["reason"],
            registry=registry,
        )
        self.no_chunks = Counter(
            "ragcache_no_chunks", "Answers to prompts without chunks", registry=registry
        )
        self.escalated = Counter(
            "ragcache_escalated", "Answers that were escalated to full prefill", registry=registry
        )
        self.given_up = Counter(
            "ragcache_given_up",
            "Requests whose client disconnected or whose deadline passed",
            registry=registry,
        )
        self.registry.register(_State(service))

    def record_answer(self, answer: Answer, queued_s: float) -> None:
        """Count a finished answer."""
        report = answer.report
        mode = report.mode.partition("+")[0].partition(":")[
            0
        ]  # without parameters: labels must be few
        self.ttft.labels(mode).observe(queued_s + report.retrieval_s + report.ttft_s)
        self.queued.observe(queued_s)
        if report.no_chunks is not None:
            self.no_chunks.inc()
        if report.escalated:
            self.escalated.inc()
        self.tokens.labels("cached").inc(report.cached_tokens)
        self.tokens.labels("computed").inc(report.prompt_tokens - report.cached_tokens)
        self.tokens.labels("answer").inc(len(answer.tokens))
        for chunk in report.chunks:
            if chunk.miss is not None:
                self.misses.labels(chunk.miss).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _State(Collector):
    """Gauges whose values are read at every scrape."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def describe(self) -> Iterator[Metric]:
        return iter(())  # otherwise registering would call collect

    def collect(self) -> Iterator[Metric]:
        waiting, active = self.service.scheduler.depth()
        yield GaugeMetricFamily(
            "ragcache_queue_depth", "Requests that wait for their first token", waiting
        )
        yield GaugeMetricFamily("ragcache_streams", "Answers being generated", active)
        chunks = held = evictions = 0
        remote: dict[str, int] = {}
        for cache in self.service.caches():
            try:
                stats, traffic = cache.store.stats(), cache.traffic()
            except StoreError:  # closed meanwhile
                continue
            chunks += stats.chunks
            held += stats.payload_bytes
            evictions += stats.evictions
            for what, value in ({} if traffic is None else asdict(traffic)).items():
                if isinstance(value, int):
                    remote[what] = remote.get(what, 0) + value
        yield GaugeMetricFamily("ragcache_store_chunks", "Chunks whose KV is stored", chunks)
        yield GaugeMetricFamily("ragcache_store_bytes", "Bytes of stored KV", held)
        yield CounterMetricFamily("ragcache_evictions", "Chunks evicted to make room", evictions)
        if remote:
            traffic_metric = GaugeMetricFamily(
                "ragcache_remote", "Traffic with the remote store", labels=["what"]
            )
            for what, count in remote.items():
                traffic_metric.add_metric([what], count)
            yield traffic_metric
        if (monitor := self.service.quality_monitor) is not None:
            status = monitor.status().items()
            for name, about in _MONITOR.items():
                quality = GaugeMetricFamily(name, about, labels=["what"])
                for what, value in status:
                    if isinstance(value, (int, float)):
                        quality.add_metric([what], value)
                yield quality
