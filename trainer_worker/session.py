"""One leased job in this worker: prepared, trained, checkpointed, and ended in exactly one way.

A job is ended by whoever holds its lease; all writes are fenced by the lease's epoch, so what a session
decides too late changes nothing. While the store does not answer, training goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from tessera.errors import StaleLease, TesseraError, Unavailable
from tessera.formats.basis import Basis
from tessera.queue.leases import JobLeases, Lease, LeaseState
from tessera.store.holds import BasisHolds
from trainer_worker.checkpoints import JobCheckpoints
from trainer_worker.common.commands import Command, Orders, Stopped, until_available
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.outcome import reports
from trainer_worker.outcome.dedicated_publisher import DedicatedPublisher
from trainer_worker.outcome.publication import Publisher
from trainer_worker.preparing import starting
from trainer_worker.preparing.basis_source import Attempt
from trainer_worker.preparing.preparation import Preparation, Prepared
from trainer_worker.reporter import JobReporter
from trainer_worker.train_loop import TrainLoop
from trainer_worker.training import checkpoint
from trainer_worker.training.lora.form import LoraRun
from trainer_worker.training.run import RunUpdate, TrainRun

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: Reckoned for a job whose data nobody has seen yet.
ASSUMED_TOKENS_PER_STEP = 1024
#: How a job's lease may end so that no other attempt follows.
FINAL_OUTCOMES = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Tools:
    """What all sessions of a worker share."""

    leases: JobLeases
    publisher: Publisher
    dedicated: DedicatedPublisher
    holds: BasisHolds
    preparation: Preparation
    loop: TrainLoop
    metrics: TrainerMetrics
    lease_s: float
    checkpoint_every_s: float
    report_every_s: float


class JobSession:
    """The life of one lease. `run` ends when the job is none of this worker's business any more."""

    def __init__(
        self, lease: Lease, tools: Tools, *, alone: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """alone: to be waited for before anything is done, for a job that must have the worker for itself."""
        self.lease = lease
        self.tokens_per_step = ASSUMED_TOKENS_PER_STEP
        self.basis_id = lease.job.spec.basis_id
        self.needs_worker_alone = alone is not None
        #: What broke the training step, if no data explain it: the worker had better start afresh.
        self.failure: Exception | None = None
        self._tools = tools
        self._alone = alone
        self._began = time.monotonic()
        self._orders = Orders()
        self._news: list[RunUpdate | Exception] = []
        self._run: TrainRun | None = None  # while it is resident, or about to be
        self._reporter = JobReporter(
            lease,
            tools.leases,
            obey=self.obey,
            metrics=tools.metrics,
            report_every_s=tools.report_every_s,
        )
        self._checkpoints = JobCheckpoints(
            lease, tools.leases, self._reporter, metrics=tools.metrics, every_s=tools.checkpoint_every_s
        )

    @property
    def job_id(self) -> str:
        return self.lease.job.job_id

    def command(self, command: Command) -> None:
        """Stop at the next step. For the worker, from a renewal or at its own end."""
        self._orders.give(command)

    def obey(self, state: LeaseState) -> None:
        """What a renewal or a report said of the lease."""
        self._orders.obey(state)

    async def run(self) -> None:
        """Never raises but for cancellation."""
        try:
            outcome = await self._work()
        except Exception as error:
            failure = self._unread_failure() if isinstance(error, Stopped) else error
            outcome = await self._end(self._stop if failure is None else lambda: self._fail(failure))
        if outcome in FINAL_OUTCOMES:
            await self._let_go()
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

    async def _let_go(self) -> None:
        """Of the bases that were held for the job. What fails here is found later (`holds.py`)."""
        job = self.lease.job
        try:
            await self._tools.holds.let_go(job.tenant, job.job_id)
        except Exception as error:
            logger.warning("job %s keeps its hold on a basis: %s", self.job_id, error)

    async def _work(self) -> str:
        job = self.lease.job
        if job.started_at is not None and job.attempt <= 1:
            self._tools.metrics.job_wait_seconds.observe(max(0.0, job.started_at - job.created_at))
        if self._alone is not None:
            await self._orders.interruptible(self._wait_alone())
        return await (self._build() if job.spec.kind == "basis" else self._train())

    async def _wait_alone(self) -> None:
        assert self._alone is not None
        await self._reporter.tell(
            "A worker died with this job: it waits to have one for itself", level="warn"
        )
        await self._alone()

    async def _build(self) -> str:
        """A basis and nothing else. Its owner keeps it until it is deleted by name."""
        tools, job = self._tools, self.lease.job
        found = await self._orders.interruptible(
            self._until_available(lambda: tools.preparation.build(self._attempt()))
        )
        await self._reporter.settle()
        await self._reporter.tell(reports.basis_message(found))
        await self._until_available(lambda: tools.holds.pin(job.tenant, found.basis.basis_id))
        result = reports.basis_result(found, building_s=time.monotonic() - self._began)
        await self._until_available(lambda: tools.leases.complete(self.lease, result))
        return "succeeded"

    async def _train(self) -> str:
        prepared = await self._orders.interruptible(self._prepare())
        run = self._run = prepared.run
        basis = None if prepared.basis is None else prepared.basis.basis
        await self._orders.interruptible(self._tools.loop.join(run, basis, self._on_news))
        await self._reporter.tell(reports.begin_message(run))
        for code, message in prepared.warnings:
            await self._reporter.warn(code, message)
        await self._follow(run)
        await self._leave()
        if run.progress.finish_reason == "diverged":
            message = "the loss or its gradient was not finite three times; try a smaller learning rate"
            raise TesseraError(message, code="training_diverged", param="hyperparameters")
        return await self._publish(run, basis)

    def _attempt(self) -> Attempt:
        return Attempt(self.lease.job, self._reporter.note_modules, self._reporter.note_outage)

    async def _prepare(self) -> Prepared:
        """The run, in the state of its last checkpoint if there is one that fits."""
        job, tools = self.lease.job, self._tools
        saved = await self._until_available(lambda: tools.leases.load_checkpoint(job.job_id))
        prepared = await self._until_available(lambda: tools.preparation.prepare(self._attempt(), saved))
        self.tokens_per_step = prepared.run.tokens_per_step
        await self._reporter.settle()
        if prepared.basis is not None:
            self.basis_id = prepared.basis.basis.basis_id
            await self._reporter.tell(reports.basis_message(prepared.basis))
        if isinstance(prepared.run, LoraRun):
            await self._reporter.tell(reports.lora_begin_message(prepared.run))
        if prepared.start is not None:
            await self._reporter.tell(starting.told(prepared.start), data=prepared.start.notes)
        if prepared.is_start_costly:  # another attempt must not look for it again
            content = await asyncio.to_thread(checkpoint.to_bytes, prepared.run)
            step = prepared.run.progress.step
            await self._until_available(lambda: self._checkpoints.keep(content, step=step))
        return prepared

    async def _follow(self, run: TrainRun) -> None:
        """Until the run has finished: report its news, write checkpoints. Raises `Stopped`."""
        due = time.monotonic() + self._checkpoints.interval_s
        while True:
            await self._orders.sleep_until(due)
            news, self._news = self._news, []
            updates = [item for item in news if isinstance(item, RunUpdate)]
            await self._reporter.report(run, updates)
            for item in news:
                if isinstance(item, Exception):
                    raise self._note_failure(item)
            if any(update.finish_reason is not None for update in updates):
                return
            if time.monotonic() >= due:
                await self._checkpoint(run)
                due = time.monotonic() + self._checkpoints.interval_s

    def _note_failure(self, error: Exception) -> Exception:
        self._run = None  # its trainer is gone, and the run's memory with it
        self.failure = None if isinstance(error, TesseraError) else error
        return error

    def _unread_failure(self) -> Exception | None:
        """What broke the step, if the worker ends because of it before this session has read its news.

        Releasing the job then would count no attempt, and nobody would learn that it breaks workers.
        """
        if self._orders.command is not Command.RELEASE:
            return None
        return next((self._note_failure(item) for item in self._news if isinstance(item, Exception)), None)

    async def _checkpoint(self, run: TrainRun) -> None:
        step = run.progress.step  # at most what the snapshot has seen
        content = await self._tools.loop.snapshot(run.run_id) if self._checkpoints.are_wanted else None
        if content is not None:
            await self._checkpoints.try_to_keep(content, step=step)

    async def _publish(self, run: TrainRun, basis: Basis | None) -> str:
        """Store the best state as the adapter's next version, then end the job.

        Raises `Stopped` if the lease was lost or the job cancelled, `StaleLease`, `AdapterDeleted`.
        """
        tools, job = self._tools, self.lease.job
        states = await self._until_available(lambda: tools.leases.renew([self.lease], lease_s=tools.lease_s))
        self.obey(states[job.job_id])
        if self._orders.command in (Command.LOST, Command.CANCEL):
            raise Stopped
        for code, message in reports.finish_warnings(run):
            await self._reporter.warn(code, message)
        if isinstance(run, LoraRun):
            made = await asyncio.to_thread(tools.dedicated.make, run, job)
            version = await self._until_available(lambda: tools.dedicated.publish(job, made))
        else:
            assert basis is not None
            adapter = await asyncio.to_thread(reports.make_adapter, run, basis, job)
            version = await self._until_available(lambda: tools.publisher.publish(job, adapter))
        training_s = time.monotonic() - self._began
        result = reports.result_of(run, version, job, training_s=training_s, warnings=self._reporter.warnings)
        await self._until_available(lambda: tools.leases.complete(self.lease, result))
        tools.metrics.measure_success(run.progress, training_s)
        return "succeeded"

    async def _stop(self) -> str:
        """Do what the command says. Raises `StaleLease`."""
        leases, command = self._tools.leases, self._orders.command
        content, step = None, 0
        if self._run is not None and command in (Command.PAUSE, Command.RELEASE):
            step = self._run.progress.step
            content = await self._tools.loop.snapshot(self._run.run_id)
        await self._leave()
        if command is Command.LOST:
            return "lost"
        if command is Command.CANCEL:
            await self._until_available(lambda: leases.acknowledge_cancel(self.lease))
            return "cancelled"
        if content is not None:
            await self._until_available(lambda: self._checkpoints.keep(content, step=step))
        await self._until_available(lambda: leases.release(self.lease))
        return "released"

    async def _fail(self, error: Exception) -> str:
        """End the attempt. Faults of the data are final, others are tried again. Raises `StaleLease`."""
        await self._leave()
        if isinstance(error, StaleLease):
            raise error
        is_ours = not isinstance(error, TesseraError)
        retryable = is_ours or isinstance(error, Unavailable)
        problem = reports.problem_of(error)
        logger.error("job %s: %s", self.job_id, problem["message"], exc_info=error if is_ours else None)
        leases, breaks = self._tools.leases, self.failure is not None
        status = await self._until_available(
            lambda: leases.fail(self.lease, problem, retryable=retryable, ends_worker=breaks)
        )
        return status.value if status.is_final else "retried"

    async def _leave(self) -> None:
        await self._reporter.settle()
        if self._run is not None:
            await self._tools.loop.leave(self._run.run_id)
            self._run = None

    def _on_news(self, news: RunUpdate | Exception) -> None:
        self._news.append(news)
        self._orders.wake()

    async def _until_available(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of a call that is repeated as long as the store does not answer."""
        return await until_available(call, self._reporter.note_outage)
