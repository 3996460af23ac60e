"""What Prometheus is told: of the whole service, never of a tenant."""

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
    """A registry of its own, so that a process may have several apps."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        told = self.registry
        self.requests = Counter(
            "ragcache_requests", "Requests that were answered", ["route", "status"], registry=told
        )
        self.ttft = Histogram(
            "ragcache_ttft_seconds",
            "From the question's arrival to its first token, waiting included",
            ["mode"],
            buckets=_SECONDS,
            registry=told,
        )
        self.queued = Histogram(
            "ragcache_queued_seconds", "Waiting for the engine", buckets=_SECONDS, registry=told
        )
        self.tokens = Counter(
            "ragcache_tokens",
            "cached: of chunks, loaded and not computed; computed: the rest of the prompt; answer",
            ["kind"],
            registry=told,
        )
        self.misses = Counter(
            "ragcache_chunk_misses",
            "Chunks of prompts that had to be computed",
            ["reason"],
            registry=told,
        )
        self.no_chunks = Counter(
            "ragcache_no_chunks", "Answers to prompts without chunks", registry=told
        )
        self.given_up = Counter(
            "ragcache_given_up",
            "Answers whose client hung up or whose time was over",
            registry=told,
        )
        self.registry.register(_State(service))

    def answered(self, answer: Answer, queued_s: float) -> None:
        """Count a finished answer."""
        report = answer.report
        mode = report.mode.partition("+")[0].partition(":")[0]  # parameters would be endless
        self.ttft.labels(mode).observe(queued_s + report.retrieval_s + report.ttft_s)
        self.queued.observe(queued_s)
        if report.no_chunks is not None:
            self.no_chunks.inc()
        prompt = report.prefix_tokens + report.chunk_tokens + report.question_tokens
        self.tokens.labels("cached").inc(report.reused_tokens)
        self.tokens.labels("computed").inc(prompt - report.reused_tokens)
        self.tokens.labels("answer").inc(len(answer.tokens))
        for chunk in report.chunks:
            if chunk.miss is not None:
                self.misses.labels(chunk.miss).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _State(Collector):
    """Gauges whose values are looked up at every scrape."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def describe(self) -> Iterator[Metric]:
        return iter(())  # or registering would look everything up

    def collect(self) -> Iterator[Metric]:
        waiting, active = self.service.scheduler.depth()
        yield GaugeMetricFamily("ragcache_queue_depth", "Questions that wait", waiting)
        yield GaugeMetricFamily("ragcache_streams", "Answers under way", active)
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
        yield GaugeMetricFamily("ragcache_store_bytes", "Bytes of KV that is stored", held)
        yield CounterMetricFamily("ragcache_evictions", "Chunks that made room", evictions)
        if remote:
            told = GaugeMetricFamily("ragcache_remote", "To and from the remote", labels=["what"])
            for what, count in remote.items():
                told.add_metric([what], count)
            yield told
        if self.service.guard is not None:
            status = self.service.guard.status().items()
            for name, about in _MONITOR.items():
                monitor = GaugeMetricFamily(name, about, labels=["what"])
                for what, value in status:
                    if isinstance(value, (int, float)):
                        monitor.add_metric([what], value)
                yield monitor
