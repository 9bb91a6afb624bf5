"""The worker's Prometheus metrics. No label names a job, tenant or adapter, so the series are bounded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from tessera.methods.catalogue import FORMS, METHODS

if TYPE_CHECKING:
    from trainer_worker.training.run import Progress

_METHODS = {*METHODS, *FORMS}
_WAIT_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 14400)
_TRAIN_BUCKETS = (1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)
_TICK_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_GAIN_BUCKETS = (0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2)


class TrainerMetrics:
    """The metrics of one worker, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        name = "tessera_trainer_{}".format
        self.model_loaded = Gauge(
            name("model_loaded"), "1 once the base model is loaded, for the first job", registry=registry
        )
        self.resident_jobs = Gauge(name("resident_jobs"), "Jobs in training now", registry=registry)
        self.leased_jobs = Gauge(
            name("leased_jobs"), "Jobs this worker holds, those it prepares included", registry=registry
        )
        self.tokens = Counter(
            name("tokens"), "Tokens sent through the model: train, eval, pad", ["kind"], registry=registry
        )
        self.tick_seconds = Histogram(
            name("tick_seconds"), "One step of all resident jobs", buckets=_TICK_BUCKETS, registry=registry
        )
        self.optimizer_steps = Counter(
            name("optimizer_steps"), "Optimisation steps, summed over jobs", registry=registry
        )
        self.jobs = Counter(
            name("jobs"),
            "Jobs that left this worker: succeeded, failed, retried, cancelled, released, lost",
            ["outcome", "method"],
            registry=registry,
        )
        self.job_wait_seconds = Histogram(
            name("job_wait_seconds"),
            "From submission to the first claim",
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self.job_train_seconds = Histogram(
            name("job_train_seconds"), "From claim to publication", buckets=_TRAIN_BUCKETS, registry=registry
        )
        self.validation_gain = Histogram(
            name("validation_gain_nats"),
            "Validation loss of the base model minus that of the adapter, per token",
            buckets=_GAIN_BUCKETS,
            registry=registry,
        )
        self.nonfinite = Counter(name("nonfinite"), "Steps whose loss was not finite", registry=registry)
        self.early_stops = Counter(
            name("early_stops"), "Jobs that ended before their plan", registry=registry
        )
        self.stale_commits = Counter(
            name("stale_commits"), "Writes refused because the lease was over", registry=registry
        )
        self.checkpoints = Counter(name("checkpoints"), "Checkpoints written", registry=registry)
        self.checkpoint_bytes = Gauge(
            name("checkpoint_bytes"), "Size of the last checkpoint written", registry=registry
        )
        self.store_errors = Counter(
            name("store_errors"), "Calls that the store did not answer", registry=registry
        )

    def count_job(self, outcome: str, method: str) -> None:
        """Count a job that has left this worker. Unknown methods share one series."""
        self.jobs.labels(outcome, method if method in _METHODS else "unknown").inc()

    def measure_success(self, progress: Progress, training_s: float, *, is_per_token: bool = True) -> None:
        """Record a job that has succeeded training_s after its claim. is_per_token: its losses are."""
        self.job_train_seconds.observe(training_s)
        initial, best = progress.initial_valid_loss, progress.best_valid_loss
        if is_per_token and initial is not None and best is not None and math.isfinite(initial - best):
            self.validation_gain.observe(initial - best)
        if progress.finish_reason == "early_stop":
            self.early_stops.inc()
