"""One leased job in this worker: prepared, trained, checkpointed, and ended in exactly one way.

A job is ended by whoever holds its lease; all writes are fenced by the lease's epoch, so what a session
decides too late changes nothing. While the store does not answer, training goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch

from adapter_core.basis import Basis
from adapter_core.errors import Conflict, CorruptRecord, StaleLease, TesseraError, Unavailable
from adapter_core.job_leases import JobLeases, Lease, LeaseState
from adapter_core.store import AdapterStore
from trainer_worker import checkpoint, reports
from trainer_worker.job_reporter import JobReporter
from trainer_worker.metrics import TrainerMetrics
from trainer_worker.preparation import Preparation, Prepared
from trainer_worker.run import RunUpdate, TrainRun
from trainer_worker.train_loop import TrainLoop

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: Reckoned for a job whose data nobody has seen yet.
ASSUMED_TOKENS_PER_STEP = 1024
#: Between two attempts to reach the store.
FIRST_RETRY_S, MAX_RETRY_S = 0.1, 2.0


class Command(IntEnum):
    """Why a session has to stop; of several the highest counts."""

    RELEASE = 1  # the worker ends
    PAUSE = 2
    CANCEL = 3
    LOST = 4


class _Stopped(Exception):
    """A command has come."""


@dataclass(frozen=True)
class Tools:
    """What all sessions of a worker share."""

    leases: JobLeases
    adapters: AdapterStore
    preparation: Preparation
    loop: TrainLoop
    metrics: TrainerMetrics
    adapter_dtype: torch.dtype
    lease_s: float
    checkpoint_every_s: float
    report_every_s: float


class JobSession:
    """The life of one lease. `run` ends when the job is none of this worker's business any more."""

    def __init__(self, lease: Lease, tools: Tools) -> None:
        self.lease = lease
        self.tokens_per_step = ASSUMED_TOKENS_PER_STEP
        self.basis_id = lease.job.spec.basis_id
        #: What broke the training step, if no data explain it: the worker had better start afresh.
        self.failure: Exception | None = None
        self._tools = tools
        self._began = time.monotonic()
        self._command: Command | None = None
        self._wake = asyncio.Event()
        self._news: list[RunUpdate | Exception] = []
        self._run: TrainRun | None = None  # while it is resident
        self._reporter = JobReporter(
            lease,
            tools.leases,
            obey=self.obey,
            metrics=tools.metrics,
            report_every_s=tools.report_every_s,
        )

    @property
    def job_id(self) -> str:
        return self.lease.job.job_id

    def command(self, command: Command) -> None:
        """Stop at the next step. For the worker, from a renewal or at its own end."""
        self._command = max(command, self._command or command)
        self._wake.set()

    def obey(self, state: LeaseState) -> None:
        """What a renewal or a report said of the lease."""
        if state is not LeaseState.HELD:
            self.command(Command[state.name])

    async def run(self) -> None:
        """Never raises but for cancellation."""
        try:
            outcome = await self._work()
        except _Stopped:
            outcome = await self._end(self._stop)
        except Exception as error:
            failure = error
            outcome = await self._end(lambda: self._fail(failure))
        self._tools.metrics.count_job(outcome, self.lease.job.spec.method)
        logger.info("job %s of %s: %s", self.job_id, self.lease.job.tenant, outcome)

    async def _end(self, end: Callable[[], Awaitable[str]]) -> str:
        try:
            return await end()
        except StaleLease as error:
            logger.warning("%s", error)
            self._tools.metrics.stale_commits.inc()
        except Exception:
            logger.exception("job %s could not be handed back; its lease runs out", self.job_id)
        return "lost"

    async def _work(self) -> str:
        prepared = await self._interruptible(self._prepare())
        run = prepared.run
        await self._tools.loop.join(run, prepared.basis, self._on_news)
        self._run = run
        await self._reporter.tell(reports.begin_message(run))
        for code, message in prepared.warnings:
            await self._reporter.warn(code, message)
        await self._follow(run)
        await self._leave()
        if run.progress.finish_reason == "diverged":
            message = "the loss or its gradient was not finite three times; try a smaller learning rate"
            raise TesseraError(message, code="training_diverged", param="hyperparameters")
        return await self._publish(run, prepared.basis)

    async def _prepare(self) -> Prepared:
        """The run, in the state of its last checkpoint if there is one that fits."""
        job, tools = self.lease.job, self._tools
        if job.started_at is not None and job.attempt <= 1:
            tools.metrics.job_wait_seconds.observe(max(0.0, job.started_at - job.created_at))
        prepared = await self._until_available(lambda: tools.preparation.prepare(job))
        content = await self._until_available(lambda: tools.leases.load_checkpoint(job.job_id))
        if content is not None:
            try:
                await asyncio.to_thread(checkpoint.restore, prepared.run, content)
            except (CorruptRecord, Conflict) as error:
                prepared.warnings.append(("checkpoint_unusable", f"training starts afresh: {error.message}"))
        self.tokens_per_step = prepared.run.tokens_per_step
        self.basis_id = prepared.basis.basis_id
        return prepared

    async def _follow(self, run: TrainRun) -> None:
        """Until the run has finished: report its news, write checkpoints. Raises `_Stopped`."""
        due = time.monotonic() + self._tools.checkpoint_every_s
        while True:
            await self._sleep_until(due)
            news, self._news = self._news, []
            updates = [item for item in news if isinstance(item, RunUpdate)]
            await self._reporter.report(run, updates)
            for item in news:
                if isinstance(item, Exception):
                    self._run = None  # its trainer is gone, and the run's memory with it
                    self.failure = None if isinstance(item, TesseraError) else item
                    raise item
            if any(update.finish_reason is not None for update in updates):
                return
            if time.monotonic() >= due:
                await self._checkpoint(run)
                due = time.monotonic() + self._tools.checkpoint_every_s

    async def _checkpoint(self, run: TrainRun) -> None:
        content = await self._tools.loop.snapshot(run.run_id)
        if content is None:
            return
        try:
            await self._tools.leases.checkpoint(self.lease, content)
        except Unavailable as error:
            self._reporter.note_outage(error)
            return
        self._tools.metrics.checkpoints.inc()
        self._tools.metrics.checkpoint_bytes.set(len(content))

    async def _publish(self, run: TrainRun, basis: Basis) -> str:
        """Store the best state as the adapter's next version, then end the job.

        Raises `_Stopped` if the lease was lost or the job cancelled, `StaleLease`, `AdapterDeleted`.
        """
        tools, job = self._tools, self.lease.job
        states = await self._until_available(lambda: tools.leases.renew([self.lease], lease_s=tools.lease_s))
        self.obey(states[job.job_id])
        if self._command in (Command.LOST, Command.CANCEL):
            raise _Stopped
        for code, message in reports.finish_warnings(run):
            await self._reporter.warn(code, message)
        adapter = await asyncio.to_thread(reports.make_adapter, run, basis, job)
        version = await self._until_available(
            lambda: tools.adapters.publish(
                job.tenant,
                job.spec.adapter_id,
                adapter,
                dtype=tools.adapter_dtype,
                generation=job.spec.generation,
                job_id=job.job_id,
                base_model_id=tools.preparation.model_id,
            )
        )
        training_s = time.monotonic() - self._began
        result = reports.result_of(run, version, job, training_s=training_s, warnings=self._reporter.warnings)
        await self._until_available(lambda: tools.leases.complete(self.lease, result))
        tools.metrics.measure_success(run.progress, training_s)
        return "succeeded"

    async def _stop(self) -> str:
        """Do what the command says. Raises `StaleLease`."""
        leases, command = self._tools.leases, self._command
        content = None
        if self._run is not None and command in (Command.PAUSE, Command.RELEASE):
            content = await self._tools.loop.snapshot(self._run.run_id)
        await self._leave()
        if command is Command.LOST:
            return "lost"
        if command is Command.CANCEL:
            await self._until_available(lambda: leases.acknowledge_cancel(self.lease))
            return "cancelled"
        if content is not None:
            await self._until_available(lambda: leases.checkpoint(self.lease, content))
        await self._until_available(lambda: leases.release(self.lease))
        return "released"

    async def _fail(self, error: Exception) -> str:
        """End the attempt. Faults of the data are final, others are tried again. Raises `StaleLease`."""
        await self._leave()
        if isinstance(error, StaleLease):
            raise error
        is_ours = not isinstance(error, TesseraError)
        retryable = is_ours or isinstance(error, Unavailable)
        if isinstance(error, TesseraError):
            problem = {"code": error.code, "message": error.message, "param": error.param}
        else:
            message = f"{type(error).__name__}: {error}"
            problem = {"code": "internal_error", "message": message, "param": None}
        logger.error("job %s: %s", self.job_id, problem["message"], exc_info=error if is_ours else None)
        await self._until_available(lambda: self._tools.leases.fail(self.lease, problem, retryable=retryable))
        is_last = self.lease.job.attempt >= self._tools.leases.max_attempts
        return "retried" if retryable and not is_last else "failed"

    async def _leave(self) -> None:
        if self._run is not None:
            await self._tools.loop.leave(self._run.run_id)
            self._run = None

    def _on_news(self, news: RunUpdate | Exception) -> None:
        self._news.append(news)
        self._wake.set()

    async def _sleep_until(self, due: float) -> None:
        """Until there is news, or the clock says so. Raises `_Stopped`."""
        try:
            async with asyncio.timeout(max(0.0, due - time.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
        if self._command is not None:
            raise _Stopped

    async def _interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Raises `_Stopped` as soon as a command comes; `work` is cancelled then."""
        task, woken = asyncio.create_task(work), asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait({task, woken}, return_when=asyncio.FIRST_COMPLETED)
            if self._command is not None:
                raise _Stopped
            return await task
        finally:
            task.cancel()
            woken.cancel()
            await asyncio.gather(task, woken, return_exceptions=True)

    async def _until_available(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of a call that is repeated as long as the store does not answer."""
        delay_s = FIRST_RETRY_S
        while True:
            try:
                return await call()
            except Unavailable as error:
                self._reporter.note_outage(error)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RETRY_S)
