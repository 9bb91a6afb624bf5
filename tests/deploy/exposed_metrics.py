"""Every metric that the code exposes, by the code's own word: what dashboards and alerts may use."""

from __future__ import annotations

from functools import cache

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.engine.wire.messages import EngineStats
from service.metrics.collector import STORE_MEMORY, ServiceCollector, StoreFigures, StoreSampler
from service.metrics.service_metrics import Metrics
from tessera.queue.client import JobQueue, JobStatus, QueueStats
from tessera.redis.client import connect
from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine
from trainer_worker.common.metrics import TrainerMetrics

#: Prometheus adds them to what it scrapes.
SCRAPE_LABELS = {"job", "instance"}


#: An engine with something to say about every kind.
STATS = EngineStats(
    memory_bytes={"weights": 1, "kv": 1, "adapters": 1, "bases": 1, "workspace": 0, "process_rss": 4},
    adapter_loads_total={"cached": 1, "resident": 1},
    adapter_evictions_total={"cached": 0, "resident": 0},
)


@cache
def exposed_labels() -> dict[str, set[str]]:
    """Sample name (tessera_http_requests_total, … _bucket, up) → its labels, over service and worker."""
    found: dict[str, set[str]] = {"up": set()}
    for registry in (service_registry(), worker_registry()):
        text = generate_latest(registry).decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def service_registry() -> CollectorRegistry:
    """The service's registry, with each labelled metric used once so that it is exposed."""
    metrics = Metrics()
    metrics.http_answered("/v1/completions", "POST", 200, 0.1)
    metrics.generation_ended("finished", 0.1, 1)
    redis = connect("redis://127.0.0.1:1")  # never used: the figures are given
    sampler = StoreSampler(redis, AdapterStore(redis), JobQueue(redis))
    queue = QueueStats(dict.fromkeys(JobStatus, 1), delayed=0, oldest_queued_s=0.0, backlog_cost=0)
    sampler.figures = StoreFigures(True, 1, dict.fromkeys(STORE_MEMORY.values(), 1), queue)
    engine = FakeEngine()
    engine.stats = STATS
    metrics.registry.register(ServiceCollector(engine, sampler))
    return metrics.registry


def worker_registry() -> CollectorRegistry:
    """The worker's registry, with each labelled metric used once."""
    metrics = TrainerMetrics()
    metrics.tokens.labels("train").inc()
    metrics.jobs.labels("succeeded", "lora_xs").inc()
    return metrics.registry
