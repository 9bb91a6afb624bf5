"""One leased job in this worker: prepared, trained, checkpointed, published, and ended in exactly one way.

A job is ended by whoever holds its lease. All writes are fenced by the epoch of the lease, so a decision that
comes too late changes nothing. While the store does not answer, training goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass

from tessera.errors import InvalidInput, StaleLease, TesseraError, Unavailable
from tessera.model.base_model import BaseModel
from tessera.processes.log_setup import log_fields
from tessera.queue.leases import JobLeases, Lease
from tessera.queue.worker_reports import WorkerReports
from tessera.store.holds import BasisHolds
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.common.pace import Pace
from trainer_worker.common.waits import Command, SessionCommands, Stopped, retrying
from trainer_worker.outcome import payloads
from trainer_worker.outcome.finish_time import FinishTime, PublishTime
from trainer_worker.outcome.job_reports import JobReports
from trainer_worker.outcome.publisher import Publisher
from trainer_worker.preparing.basis_source import Attempt
from trainer_worker.preparing.preparation import Preparation, Prepared
from trainer_worker.reporter import CheckpointWriter, JobReporter
from trainer_worker.train_loop import TrainLoop
from trainer_worker.training import checkpoint
from trainer_worker.training.run import RunUpdate, TrainRun

logger = logging.getLogger(__name__)

#: Assumed for a job before its data are read.
ASSUMED_TOKENS_PER_STEP = 1024
#: The outcomes of a lease after which no other attempt follows.
FINAL_OUTCOMES = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class WorkerServices:
    """The services that all sessions of a worker share."""

    base: BaseModel
    leases: JobLeases
    publisher: Publisher
    holds: BasisHolds
    preparation: Preparation
    loop: TrainLoop
    metrics: TrainerMetrics
    lease_s: float
    checkpoint_every_s: float
    report_every_s: float
    log_every_s: float
    publishing: PublishTime
    pace: Pace
    reports_of_workers: WorkerReports
    reports: JobReports


class JobSession:
    """Everything that one lease goes through. `run` ends when the job has left this worker."""

    def __init__(
        self, lease: Lease, services: WorkerServices, *, worker_is_free: asyncio.Event | None = None
    ) -> None:
        """worker_is_free: for a job that must have the worker to itself; set when no other job is left."""
        self.lease = lease
        self.tokens_per_step = ASSUMED_TOKENS_PER_STEP
        self.basis_id = lease.job.spec.basis_id
        self.needs_worker_alone = worker_is_free is not None
        #: The error of a training step that the job's data do not explain: the worker should restart.
        self.failure: Exception | None = None
        self.commands = SessionCommands()
        self._services, self._worker_is_free = services, worker_is_free
        self._began = self._joined = time.monotonic()
        self._news: list[RunUpdate | Exception] = []
        #: The run, from just before it joins the training thread until it leaves.
        self._run: TrainRun | None = None
        self._finish = FinishTime(services.publishing)
        self._reporter = JobReporter(
            lease,
            services.leases,
            self.commands,
            metrics=services.metrics,
            report_every_s=services.report_every_s,
            log_every_s=services.log_every_s,
            finish=self._finish,
        )
        self._checkpoints = CheckpointWriter(
            lease,
            services.leases,
            self._reporter,
            metrics=services.metrics,
            every_s=services.checkpoint_every_s,
        )
        self._leases = retrying(services.leases, self._reporter.note_outage)
        self._holds = retrying(services.holds, self._reporter.note_outage)
        self._preparation = retrying(services.preparation, self._reporter.note_outage)
        self._publisher = retrying(services.publisher, self._reporter.note_outage)

    @property
    def job_id(self) -> str:
        return self.lease.job.job_id

    async def run(self) -> None:
        """Work on the job until it has left this worker. Raises nothing but a cancellation."""
        job = self.lease.job
        log_fields.set({"job_id": job.job_id, "tenant": job.tenant})  # for the whole task
        try:
            outcome = await self._work()
        except Exception as error:
            outcome = await self._end_early(error)
        if outcome in FINAL_OUTCOMES:
            await self._release(has_succeeded=outcome == "succeeded")
        self._services.metrics.count_job(outcome, job.spec.method)
        logger.info("job %s of %s: %s", self.job_id, job.tenant, outcome)

    async def _work(self) -> str:
        job = self.lease.job
        if job.started_at is not None and job.attempt <= 1:
            self._services.metrics.job_wait_seconds.observe(max(0.0, job.started_at - job.created_at))
        if self._worker_is_free is not None:
            message = "A worker died with this job: it waits to have one for itself"
            await self._reporter.send_message(message, level="warn")
            await self.commands.interruptible(self._worker_is_free.wait())
        return await (self._build_basis() if job.spec.kind == "basis" else self._train())

    async def _build_basis(self) -> str:
        """Build a basis and nothing else. It is kept until its owner deletes it by name."""
        job = self.lease.job
        attempt = Attempt(job, self._reporter)
        found = await self.commands.interruptible(self._preparation.build(attempt))
        await self._reporter.wait_for_progress()
        await self._reporter.send_message(found.message)
        await self._holds.pin(job.tenant, found.basis.basis_id)
        await self._leases.complete(self.lease, found.to_result(building_s=time.monotonic() - self._began))
        return "succeeded"

    async def _train(self) -> str:
        prepared = await self.commands.interruptible(self._prepare())
        run = self._run = prepared.run
        await self.commands.interruptible(self._services.loop.join(run, self._on_news))
        self._finish.begin()
        self._joined = time.monotonic()
        progress = payloads.training_progress(run, run.update(), None)
        await self._reporter.send_message(payloads.start_message(run), progress=progress)
        for code, message in prepared.warnings:
            await self._reporter.warn(code, message)
        await self._follow(run)
        await self._leave()
        if run.progress.finish_reason == "diverged":
            message = "the loss or its gradient was not finite three times; try a smaller learning rate"
            raise TesseraError(message, code="training_diverged", param="hyperparameters")
        return await self._publish(run)

    async def _prepare(self) -> Prepared:
        """Return the run, in the state of its last checkpoint if there is one that fits."""
        saved = await self._leases.load_checkpoint(self.job_id)
        prepared = await self._preparation.prepare(Attempt(self.lease.job, self._reporter), saved)
        run = prepared.run
        self.tokens_per_step, self.basis_id = run.tokens_per_step, run.basis_id or None
        await self._reporter.wait_for_progress()
        for message, data in prepared.messages:
            await self._reporter.send_message(message, data=data)
        if prepared.is_init_costly:  # so that another attempt does not compute it again
            content = await asyncio.to_thread(checkpoint.to_bytes, run)
            await self._checkpoints.write(content, step=run.progress.step)
        return prepared

    async def _follow(self, run: TrainRun) -> None:
        """Report the run's updates and write its checkpoints until it has finished. Raises `Stopped`."""
        due = time.monotonic() + self._checkpoints.interval_s
        while True:
            run.is_stop_requested = self.commands.is_stop_requested
            await self.commands.sleep_until(due)
            news, self._news = self._news, []
            updates = [item for item in news if isinstance(item, RunUpdate)]
            await self._reporter.report_updates(run, updates)
            self.tokens_per_step = run.tokens_per_step  # that of a search falls
            for item in news:
                if isinstance(item, Exception):
                    raise self._note_failure(item)
            with suppress(Unavailable, InvalidInput):  # the next states will do
                await self._services.publisher.publish_states(self.lease.job, run)
            if any(update.finish_reason is not None for update in updates):
                return
            if time.monotonic() >= due:
                await self._checkpoint(run)
                due = time.monotonic() + self._checkpoints.interval_s

    async def _checkpoint(self, run: TrainRun) -> None:
        step = run.progress.step  # read first, so that it is at most the step of the snapshot
        content = await self._services.loop.snapshot(run.run_id) if self._checkpoints.is_enabled else None
        if content is not None:
            await self._checkpoints.try_write(content, step=step)

    async def _publish(self, run: TrainRun) -> str:
        """Store the best state as the adapter's next version, then end the job.

        Raises `Stopped` if the lease was lost or the job cancelled, `StaleLease`, `AdapterDeleted`.
        """
        services, job = self._services, self.lease.job
        began = time.monotonic()
        for code, message in payloads.result_warnings(run):
            await self._reporter.warn(code, message)
        metadata = payloads.adapter_metadata(run, job)
        trained = await asyncio.to_thread(run.to_result, services.base, metadata)
        training_s = time.monotonic() - self._began
        samples = await services.reports.make_samples(run, trained, training_s=training_s)
        states = await self._leases.renew([self.lease], lease_s=services.lease_s)
        self.commands.obey(states[job.job_id])
        if self.commands.command in (Command.LOST, Command.CANCEL):
            raise Stopped
        version = await self._publisher.publish(job, trained)
        training_s = time.monotonic() - self._began
        result = payloads.training_result(
            run, version, job, training_s=training_s, warnings=self._reporter.warnings
        )
        result["result_files"] = await services.reports.store(job, run, result, samples)
        await self._leases.complete(self.lease, result, progress=payloads.final_progress(run))
        services.publishing.note(time.monotonic() - began)
        self._note_pace(run, published_s=time.monotonic() - began, training_s=began - self._joined)
        is_per_token = not run.objective.is_preference
        services.metrics.measure_success(run.progress, training_s, is_per_token=is_per_token)
        return "succeeded"

    def _note_pace(self, run: TrainRun, *, published_s: float, training_s: float) -> None:
        num_evaluations = 1 + sum(row.is_evaluated for row in run.history.rows[1:])
        eval_tokens = num_evaluations * sum(len(row.token_ids) for row in run.data.valid)
        alone_s = self._services.pace.training_seconds(
            steps=run.progress.step, train_tokens=run.progress.trained_tokens, eval_tokens=eval_tokens
        )
        fixed_s = self._joined - self._began + published_s
        self._services.pace.note_job(fixed_s=fixed_s, training_s=training_s, alone_s=alone_s)

    async def _end_early(self, error: Exception) -> str:
        """Obey the command that has stopped the job, or fail the attempt; returns the outcome."""
        try:
            failure = self._take_unread_failure() if isinstance(error, Stopped) else error
            return await (self._stop() if failure is None else self._fail(failure))
        except StaleLease as stale:
            logger.warning("%s", stale)
            self._services.metrics.stale_commits.inc()
        except Exception:
            logger.exception("job %s could not be given back; its lease will expire", self.job_id)
        return "lost"

    async def _stop(self) -> str:
        """Obey the command. Raises `StaleLease`."""
        command = self.commands.command
        content, step = None, 0
        if self._run is not None and command in (Command.PAUSE, Command.RELEASE):
            step = self._run.progress.step
            content = await self._services.loop.snapshot(self._run.run_id)
        await self._leave()
        if command is Command.LOST:
            return "lost"
        if command is Command.CANCEL:
            await self._leases.acknowledge_cancel(self.lease)
            return "cancelled"
        if content is not None:
            await self._checkpoints.write(content, step=step)
        await self._leases.release(self.lease)
        return "released"

    async def _fail(self, error: Exception) -> str:
        """End the attempt. Errors in the data are final, others are retried. Raises `StaleLease`."""
        await self._leave()
        if isinstance(error, StaleLease):
            raise error
        is_ours = not isinstance(error, TesseraError)
        problem = payloads.error_payload(error)
        logger.error("job %s: %s", self.job_id, problem["message"], exc_info=error if is_ours else None)
        status = await self._leases.fail(
            self.lease,
            problem,
            retryable=is_ours or isinstance(error, Unavailable),
            ends_worker=self.failure is not None,
        )
        return status.value if status.is_final else "retried"

    async def _leave(self) -> None:
        await self._reporter.wait_for_progress()
        if self._run is not None:
            await self._services.loop.leave(self._run.run_id)
            self._run = None

    async def _release(self, *, has_succeeded: bool) -> None:
        """Release the bases that were held for the job, and drop the states of one that has not succeeded.

        A failure is repaired later: `holds.py` drops stale holds, and states expire.
        """
        job = self.lease.job
        try:
            if not has_succeeded:
                await self._services.publisher.drop_states(job)
            await self._services.holds.let_go(job.tenant, job.job_id)
        except Exception as error:
            logger.warning("job %s keeps its hold on a basis: %s", self.job_id, error)

    def _on_news(self, news: RunUpdate | Exception) -> None:
        if isinstance(news, RunUpdate):
            self._finish.note(news)
        self._news.append(news)
        self.commands.wake()

    def _note_failure(self, error: Exception) -> Exception:
        self._run = None  # its trainer was dropped, and the run's memory with it
        self.failure = None if isinstance(error, TesseraError) else error
        return error

    def _take_unread_failure(self) -> Exception | None:
        """Note the error that broke the step, if the worker shuts down before this session has read its news.

        Releasing the job would not count the attempt, and the next worker could break in the same way.
        """
        if self.commands.command is not Command.RELEASE:
            return None
        return next((self._note_failure(item) for item in self._news if isinstance(item, Exception)), None)
