"""The metrics that the service counts itself, for Prometheus.

Names are `tessera_…` in base units. No label holds a user, an adapter, a job or a path that a caller chose,
so the number of series is bounded. `collector.py` adds the figures of the engine, the queue and the store.
With several API processes, each writes its counts to files that all of them read.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.multiprocess import MultiProcessCollector

DISTRIBUTION = "tessera-adapters"
#: The variable that is set for API processes that count together, before Prometheus' package is imported.
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"

# Prometheus adds a series to each counter and histogram, with its time of creation, which no query needs.
disable_created_metrics()  # type: ignore[no-untyped-call]

#: A cached prompt takes 1 ms, a prompt in a long queue takes minutes.
TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
#: A decode step takes 5 to 50 ms on a GPU and up to 1 s on two CPU cores.
INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
DURATION_BUCKETS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
DISTINCT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def service_version() -> str:
    """Return the version of the installed package."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0"


class Metrics:
    """The service's own counters and histograms, in a registry of their own."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = _exposed(registry)
        self.http_requests = Counter(
            "tessera_http_requests",
            "HTTP requests answered, by route template, method and status code.",
            ("route", "method", "status"),
            registry=registry,
        )
        self.http_duration = Histogram(
            "tessera_http_request_duration_seconds",
            "From the request's headers to the last byte of its answer.",
            ("route",),
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self.http_in_flight = Gauge(
            "tessera_http_requests_in_flight",
            "HTTP requests being answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.time_to_first_token = Histogram(
            "tessera_time_to_first_token_seconds",
            "From a sequence's submission to its first token.",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "tessera_inter_token_latency_seconds",
            "Between two tokens of a sequence.",
            buckets=INTER_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.generation_duration = Histogram(
            "tessera_generation_duration_seconds",
            "From a request's submission to the last token of its sequences.",
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self.generations = Counter(
            "tessera_generations", "Generation requests ended, by outcome.", ("outcome",), registry=registry
        )
        self.batch_distinct_adapters = Histogram(
            "tessera_batch_distinct_adapters",
            "For each request, the most distinct models (adapters, base) that shared a step with it.",
            buckets=DISTINCT_BUCKETS,
            registry=registry,
        )
        build = Gauge(
            "tessera_build_info",
            "Always 1.",
            ("version", "python"),
            registry=registry,
            multiprocess_mode="max",
        )
        build.labels(service_version(), platform.python_version()).set(1)

    def generation_ended(self, outcome: str, duration_s: float, max_distinct: int) -> None:
        """Count one generation. outcome: finished, failed or cancelled."""
        self.generations.labels(outcome).inc()
        self.generation_duration.observe(duration_s)
        if max_distinct:
            self.batch_distinct_adapters.observe(max_distinct)

    def http_answered(self, route: str, method: str, status: int, duration_s: float) -> None:
        """Count one answered request. route: the route's template, never a path."""
        self.http_requests.labels(route, method, str(status)).inc()
        self.http_duration.labels(route).observe(duration_s)


def _exposed(own: CollectorRegistry) -> CollectorRegistry:
    """Return the registry that a scrape reads: `own`, or one that adds up what all API processes count.

    The latter leaves out the figures of single processes, because a scrape may reach any of them.
    """
    if MULTIPROCESS_DIR in os.environ:
        shared = CollectorRegistry()
        MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return shared
    ProcessCollector(registry=own)
    PlatformCollector(registry=own)
    return own
