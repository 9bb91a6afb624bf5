"""Export figures of the engine, the queue and the store to Prometheus.

The engine sends its figures by itself, and a scrape reports the newest. Figures of the queue and the store
cost round trips, so they are read in the background: a scrape never waits for Redis.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.asyncio import Redis

from service.engine.client.token_engine import TokenEngine
from service.engine.wire.messages import EngineStats
from tessera.errors import TesseraError
from tessera.queue.client import JobQueue, JobStatus, QueueStats
from tessera.redis.client import translate_errors
from tessera.store.adapters import AdapterStore

logger = logging.getLogger(__name__)

#: Names of Redis' memory figures -> the values of our label `kind`.
STORE_MEMORY = {
    "used_memory": "used",
    "used_memory_dataset": "dataset",
    "used_memory_peak": "peak",
    "used_memory_rss": "rss",
    "maxmemory": "limit",
}

_GAUGES = {
    "kv_blocks": "Blocks of the paged KV cache.",
    "kv_blocks_used": "KV blocks that sequences hold.",
    "kv_blocks_cached": "KV blocks kept for prefixes that may come again.",
    "slots": "Places for adapters on the device.",
    "slots_pinned": "Slots that requests in flight use.",
    "host_cache_bytes": "Adapters in host memory.",
    "resident_bases": "Bases on the device.",
}
_COUNTERS = {
    "steps": "Steps of the engine.",
    "prompt_tokens": "Prompt tokens read.",
    "generation_tokens": "Tokens generated.",
    "cached_prompt_tokens": "Prompt tokens found in the prefix cache.",
    "preemptions": "Sequences set back to make room for others.",
    "adapter_load_failures": "Adapters that could not be loaded.",
    "step_failures": "Steps that failed.",
}
#: Names that need the word "engine" to be understood.
_ENGINE_PREFIXED = {"steps", "step_failures"}


@dataclass
class StoreFigures:
    """The figures that were read last. Empty, with is_up False, while the store does not answer."""

    is_up: bool = False
    num_adapters: int | None = None
    memory_bytes: dict[str, int] = field(default_factory=dict)
    queue: QueueStats | None = None


class StoreSampler:
    """Reads the figures of store and queue at regular intervals."""

    def __init__(self, redis: Redis, adapters: AdapterStore, queue: JobQueue) -> None:
        self._redis = redis
        self._adapters = adapters
        self._queue = queue
        self.figures = StoreFigures()

    async def run(self, interval_s: float) -> None:
        """Sample until cancelled."""
        while True:
            await self.sample()
            await asyncio.sleep(interval_s)

    async def sample(self) -> None:
        """Read the figures once. A store that is down is reported as a figure, not as an error."""
        try:
            with translate_errors():
                memory = await self._redis.info("memory")
            sizes = {kind: int(memory[name]) for name, kind in STORE_MEMORY.items() if name in memory}
            num_adapters, queue = await self._adapters.count(), await self._queue.stats()
        except TesseraError as error:
            logger.warning("cannot read the figures of the store: %s", error)
            self.figures = StoreFigures()
        else:
            self.figures = StoreFigures(True, num_adapters, sizes, queue)


class ServiceCollector(Collector):
    """Reports the figures of engine, store and queue at a scrape."""

    def __init__(self, engine: TokenEngine, sampler: StoreSampler) -> None:
        self._engine = engine
        self._sampler = sampler

    def describe(self) -> Iterable[Metric]:
        return []  # nothing to check at registration: the names below are used once each

    def collect(self) -> Iterator[Metric]:
        stats, figures = self._engine.stats, self._sampler.figures
        yield _gauge("engine_up", "Whether the engine is ready.", self._engine.is_ready)
        yield CounterMetricFamily(
            "tessera_engine_restarts", "Engine processes after the first.", self._engine.restarts_total
        )
        yield _by_label("adapters", "Adapters by tier.", "tier", _tiers(stats, figures))
        if stats is not None:
            yield from _engine_metrics(stats)
        yield from _store_metrics(figures)


def _tiers(stats: EngineStats | None, figures: StoreFigures) -> dict[str, int]:
    tiers = {}
    if figures.num_adapters is not None:
        tiers["stored"] = figures.num_adapters
    if stats is not None:
        tiers |= {"cached": stats.host_cache_entries, "resident": stats.slots_resident}
    return tiers


def _engine_metrics(stats: EngineStats) -> Iterator[Metric]:
    states = {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "waiting_for_adapter": stats.num_waiting_for_adapter,
    }
    yield _by_label("sequences", "Sequences in the engine, by state.", "state", states)
    yield _by_label("memory_bytes", "Memory of the engine, by kind.", "kind", stats.memory_bytes)
    for name, text in _GAUGES.items():
        yield _gauge(name, text, getattr(stats, name))
    for name, text in _COUNTERS.items():
        prefix = "tessera_engine_" if name in _ENGINE_PREFIXED else "tessera_"
        yield CounterMetricFamily(prefix + name, text, getattr(stats, f"{name}_total"))
    yield _count_by_label(
        "adapter_loads", "Adapters loaded, by the tier they came to.", "tier", stats.adapter_loads_total
    )
    yield _count_by_label(
        "adapter_evictions", "Adapters that made room, by tier.", "tier", stats.adapter_evictions_total
    )


def _store_metrics(figures: StoreFigures) -> Iterator[Metric]:
    yield _gauge("store_up", "Whether the store answered when it was last asked.", figures.is_up)
    yield _by_label("store_memory_bytes", "Memory of the store, by kind.", "kind", figures.memory_bytes)
    queue = figures.queue
    if queue is None:
        return
    now = (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED)
    jobs = {status.value: queue.jobs.get(status, 0) for status in JobStatus if status in now}
    ended = {status.value: queue.jobs.get(status, 0) for status in JobStatus if status not in now}
    yield _by_label("training_jobs", "Training jobs that have not ended, by status.", "status", jobs)
    yield _count_by_label("training_jobs_ended", "Training jobs that have ended.", "status", ended)
    yield _gauge("training_jobs_delayed", "Queued jobs that may not run yet.", queue.delayed)
    yield _gauge(
        "training_queue_oldest_seconds", "How long the oldest job has waited.", queue.oldest_queued_s
    )
    yield _gauge("training_backlog_tokens", "Estimated tokens of all queued jobs.", queue.backlog_cost)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tessera_{name}", text, float(value))


def _by_label(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"tessera_{name}", text, labels=(label,))
    for key, value in sorted(values.items()):
        family.add_metric((key,), value)
    return family


def _count_by_label(name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"tessera_{name}", text, labels=(label,))
    for key, value in sorted(values.items()):
        family.add_metric((key,), value)
    return family
