"""The training thread: the runs that are resident in it, and the loop that the event loop sees.

One thread does everything that touches the runs' tensors. Calls (join, leave, snapshot, tick) wait for the
running step, so everything happens between two steps, and the event loop never waits for a step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from tessera.model.base_model import BaseModel
from trainer_worker.common.duties import Heartbeat
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.common.model_lock import ModelLock
from trainer_worker.common.pace import Pace
from trainer_worker.training import checkpoint
from trainer_worker.training.run import RunTrainer, RunUpdate, TokenCounts, TrainRun

T = TypeVar("T")

#: Trainers that are kept without a run: making one again costs copies of its A and B.
MAX_IDLE_TRAINERS = 1

#: Called in the event loop with each update of a run, or with the error that broke its step.
Listener = Callable[[RunUpdate | Exception], None]


@dataclass
class Tick:
    """The outcome of one step of all runs."""

    updates: list[RunUpdate] = field(default_factory=list)
    #: The errors that ended a trainer's step, by the runs of that trainer.
    failures: dict[str, Exception] = field(default_factory=dict)
    tokens: TokenCounts = field(default_factory=TokenCounts)


class TrainerPool:
    """All resident runs, whatever their basis or form. Synchronous, for one thread.

    There is one trainer per basis, with at most `max_runs` runs, and one for each run of a LoRA form.
    """

    def __init__(self, base: BaseModel, *, max_runs: int, token_budget: int) -> None:
        self._base, self._max_runs, self._token_budget = base, max_runs, token_budget
        self._trainers: list[RunTrainer] = []

    @property
    def num_runs(self) -> int:
        return sum(len(trainer.runs) for trainer in self._trainers)

    def join(self, run: TrainRun) -> None:
        """Make a run resident. Raises `BasisMismatch`, `UnsupportedModel`."""
        if any(trainer.try_join(run) for trainer in self._trainers):
            return
        self._drop_idle()
        self._trainers.append(
            run.make_trainer(self._base, max_runs=self._max_runs, token_budget=self._token_budget)
        )

    def leave(self, run_id: str) -> TrainRun | None:
        """Take a run out, with its tensors; None if it is not resident."""
        for trainer in self._trainers:
            run = trainer.leave(run_id)
            if run is not None:
                if not trainer.is_reusable:
                    self._trainers.remove(trainer)
                return run
        return None

    def snapshot(self, run_id: str) -> bytes | None:
        """Return the checkpoint of a run; None if it is not resident."""
        for trainer in self._trainers:
            for run in trainer.runs:
                if run.run_id == run_id:
                    return checkpoint.to_bytes(run)
        return None

    def tick(self) -> Tick:
        """Make one step of every run. A trainer whose step fails is dropped with its runs."""
        tick = Tick()
        for trainer in list(self._trainers):
            if all(run.is_finished for run in trainer.runs):
                continue
            before = trainer.tokens
            try:
                updates = trainer.step()
                runs = {run.run_id: run for run in trainer.runs}
                for update in updates:
                    runs[update.run_id].note(update)
                tick.updates += updates
            except Exception as error:
                tick.failures |= {run.run_id: error for run in trainer.runs}
                self._trainers.remove(trainer)
            tick.tokens += trainer.tokens - before
        return tick

    def _drop_idle(self) -> None:
        idle = [trainer for trainer in self._trainers if not trainer.runs]
        for trainer in idle[: max(0, len(idle) - MAX_IDLE_TRAINERS)]:
            self._trainers.remove(trainer)


class TrainLoop:
    """Makes one step after the other for as long as a run is resident."""

    def __init__(
        self,
        pool: TrainerPool,
        model_lock: ModelLock,
        *,
        metrics: TrainerMetrics,
        heartbeat: Heartbeat,
        pace: Pace,
    ) -> None:
        self._pool, self._model_lock, self._metrics, self._heartbeat = pool, model_lock, metrics, heartbeat
        self._pace = pace
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train")
        self._listeners: dict[str, Listener] = {}
        self._has_runs = asyncio.Event()

    async def run(self) -> None:
        """Step and notify the listeners, forever."""
        while True:
            await self._has_runs.wait()
            async with self._model_lock:
                tick = await self._in_thread(self._timed_tick)
            self._measure(tick)
            for update in tick.updates:
                self._notify(update.run_id, update)
            for run_id, error in tick.failures.items():
                self._notify(run_id, error)
                self._forget(run_id)

    async def join(self, run: TrainRun, listener: Listener) -> None:
        """Train the run from the next tick on. Raises `BasisMismatch`, `UnsupportedModel`.

        Waits for the model lock, because joining may put layers into the model.
        """
        async with self._model_lock:
            await self._in_thread(lambda: self._pool.join(run))
        self._listeners[run.run_id] = listener
        self._has_runs.set()

    async def leave(self, run_id: str) -> TrainRun | None:
        """Remove and return the run with its tensors, after the running step; None if it is not resident."""
        self._forget(run_id)
        return await self._in_thread(lambda: self._pool.leave(run_id))

    async def snapshot(self, run_id: str) -> bytes | None:
        """Return the run's checkpoint after the running step; None if it is not resident."""
        return await self._in_thread(lambda: self._pool.snapshot(run_id))

    async def close(self) -> None:
        """End the thread, after the running step."""
        await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _timed_tick(self) -> Tick:
        self._heartbeat.begin_step()
        began = time.perf_counter()
        try:
            tick = self._pool.tick()
            self._pace.note_tick(tick.tokens, time.perf_counter() - began)
            return tick
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

    def _notify(self, run_id: str, news: RunUpdate | Exception) -> None:
        listener = self._listeners.get(run_id)
        if listener is not None:  # the run may have left during the tick
            listener(news)

    def _forget(self, run_id: str) -> None:
        self._listeners.pop(run_id, None)
        self._metrics.resident_jobs.set(len(self._listeners))
        if not self._listeners:
            self._has_runs.clear()
