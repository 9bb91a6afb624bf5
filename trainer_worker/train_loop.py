"""The training thread, seen from the event loop.

One thread does all that touches tensors; what is asked of it (join, leave, snapshot, tick) queues up behind
the running step, so everything happens between two steps. The event loop never waits for a step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tessera.formats.basis import Basis
from trainer_worker.common.health import Heartbeat
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.common.model_lock import ModelLock
from trainer_worker.trainer_pool import Tick, TrainerPool
from trainer_worker.training.run import RunUpdate, TrainRun

T = TypeVar("T")

#: Called in the event loop with what a tick brought a run, or with what broke it.
Listener = Callable[[RunUpdate | Exception], None]


class TrainLoop:
    """Ticks as long as somebody is resident."""

    def __init__(
        self, pool: TrainerPool, model_lock: ModelLock, *, metrics: TrainerMetrics, heartbeat: Heartbeat
    ) -> None:
        self._pool, self._model_lock, self._metrics, self._heartbeat = pool, model_lock, metrics, heartbeat
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train")
        self._listeners: dict[str, Listener] = {}
        self._somebody = asyncio.Event()

    async def run(self) -> None:
        """For ever: a tick, then its news to the listeners."""
        while True:
            await self._somebody.wait()
            async with self._model_lock:
                tick = await self._in_thread(self._timed_tick)
            self._measure(tick)
            for update in tick.updates:
                self._tell(update.run_id, update)
            for run_id, error in tick.failures.items():
                self._tell(run_id, error)
                self._forget(run_id)

    async def join(self, run: TrainRun, basis: Basis | None, listener: Listener) -> None:
        """From the next tick on the run is trained. Raises `BasisMismatch`, `UnsupportedModel`.

        Waits for the model lock, because it may put layers into the model.
        """
        async with self._model_lock:
            await self._in_thread(lambda: self._pool.join(run, basis))
        self._listeners[run.run_id] = listener
        self._somebody.set()

    async def leave(self, run_id: str) -> TrainRun | None:
        """The run with its tensors, after the running step; None if it is not resident."""
        self._forget(run_id)
        return await self._in_thread(lambda: self._pool.leave(run_id))

    async def snapshot(self, run_id: str) -> bytes | None:
        """The run's checkpoint, after the running step; None if it is not resident."""
        return await self._in_thread(lambda: self._pool.snapshot(run_id))

    async def close(self) -> None:
        """After the running step."""
        await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _timed_tick(self) -> Tick:
        self._heartbeat.begin_step()
        began = time.perf_counter()
        try:
            return self._pool.tick()
        finally:
            self._heartbeat.end_step()
            self._metrics.tick_seconds.observe(time.perf_counter() - began)

    def _measure(self, tick: Tick) -> None:
        metrics = self._metrics
        for kind, count in vars(tick.tokens).items():
            metrics.tokens.labels(kind).inc(count)
        metrics.optimizer_steps.inc(sum(update.train_loss is not None for update in tick.updates))
        metrics.nonfinite.inc(sum(len(update.warnings) for update in tick.updates))
        metrics.resident_jobs.set(len(self._listeners))

    def _tell(self, run_id: str, news: RunUpdate | Exception) -> None:
        listener = self._listeners.get(run_id)
        if listener is not None:  # it may have left while the tick ran
            listener(news)

    def _forget(self, run_id: str) -> None:
        self._listeners.pop(run_id, None)
        self._metrics.resident_jobs.set(len(self._listeners))
        if not self._listeners:
            self._somebody.clear()
