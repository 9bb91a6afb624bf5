"""The writing of messages, warnings, metrics, progress and checkpoints to the queue while a job runs.

While the store does not answer, messages are lost, metrics wait, and training goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Literal

from tessera.errors import StaleLease, Unavailable
from tessera.queue.leases import JobLeases, Lease, LeaseState
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.common.waits import SessionCommands, retrying
from trainer_worker.outcome import payloads
from trainer_worker.outcome.finish_time import FinishTime
from trainer_worker.training.run import RunUpdate, TrainRun

logger = logging.getLogger(__name__)

#: Metrics that may wait for the store; beyond this the oldest are dropped.
MAX_WAITING = 200
#: The store takes strings of 512 MiB, and must not be busy with one for long. A LoRA form of rank 16 on an 8B
#: model has 704 MB, of rank 4 176 MB; cores have 1 to 15 MB.
MAX_CHECKPOINT_BYTES = 256 * 1024**2
#: Average rate of one job's checkpoints into the store: large ones are written less often.
MAX_CHECKPOINT_BYTES_PER_S = 8 * 1024**2


class JobReporter:
    """Reports on one job. Every reply may hold a command of the job's owner, which goes to `commands`.

    All methods that write raise `StaleLease`.
    """

    def __init__(
        self,
        lease: Lease,
        leases: JobLeases,
        commands: SessionCommands,
        *,
        metrics: TrainerMetrics,
        report_every_s: float,
        log_every_s: float,
        finish: FinishTime,
    ) -> None:
        """finish: knows how long the run still takes."""
        #: All warnings so far as (code, sentence), for the job's result.
        self.warnings: list[tuple[str, str]] = []
        self._lease, self._leases, self._commands = lease, leases, commands
        self._metrics, self._report_every_s = metrics, report_every_s
        self._waiting: list[RunUpdate] = []
        self._log_every_s, self._finish = log_every_s, finish
        self._reported_at = -report_every_s
        self._logged_at = -log_every_s
        self._progress_report: asyncio.Task[None] | None = None

    async def send_message(
        self,
        message: str,
        *,
        level: Literal["info", "warn"] = "info",
        data: dict[str, Any] | None = None,
        progress: dict[str, Any] | None = None,
    ) -> None:
        """Send a message to the job's owner. It is lost if the store does not answer."""
        try:
            state = await self._leases.report(
                self._lease, message=message, level=level, data=data, progress=progress
            )
            self._commands.obey(state)
        except Unavailable as error:
            self.note_outage(error)

    async def warn(self, code: str, message: str) -> None:
        self.warnings.append((code, message))
        await self.send_message(message, level="warn", data={"code": code})

    async def report_updates(self, run: TrainRun, updates: list[RunUpdate]) -> None:
        """Report all warnings, evaluations and the end, and another update every report_every_s."""
        for update in updates:
            for message, data in update.notes:
                await self.send_message(message, data=data)
            for code, message in update.warnings:
                await self.warn(code, message)
        if updates:
            self._log(run, updates[-1])
        self._waiting += self._select(updates)
        del self._waiting[:-MAX_WAITING]
        while self._waiting:
            update = self._waiting[0]
            try:
                state = await self._leases.report(
                    self._lease,
                    type="metrics",
                    message=payloads.metrics_message(update),
                    data=payloads.metrics_data(update),
                    progress=payloads.training_progress(run, update, self._finish.remaining_s(run)),
                )
            except Unavailable as error:
                self.note_outage(error)
                return
            del self._waiting[0]
            self._reported_at = time.monotonic()
            self._commands.obey(state)

    def note_modules(self, done: int, total: int) -> None:
        """Report every report_every_s, in the background, how many modules of a basis are done."""
        is_due = time.monotonic() - self._reported_at >= self._report_every_s or done == total
        if is_due and (self._progress_report is None or self._progress_report.done()):
            self._reported_at = time.monotonic()
            progress = payloads.building_progress(done, total)
            self._progress_report = asyncio.create_task(self._send_progress(progress))

    async def wait_for_progress(self) -> None:
        """Wait for the report that `note_modules` has begun, so that it does not overtake a later one."""
        if self._progress_report is not None:
            await self._progress_report

    def note_outage(self, error: Unavailable) -> None:
        """Count and log a call that the store did not answer."""
        self._metrics.store_errors.inc()
        logger.warning("job %s: %s", self._lease.job.job_id, error)

    async def _send_progress(self, progress: dict[str, Any]) -> None:
        try:
            self._commands.obey(await self._leases.report(self._lease, progress=progress))
        except Unavailable as error:
            self.note_outage(error)
        except StaleLease:
            self._commands.obey(LeaseState.LOST)

    def _log(self, run: TrainRun, update: RunUpdate) -> None:
        """Log where the run stands, every log_every_s."""
        now = time.monotonic()
        if now - self._logged_at < self._log_every_s and update.finish_reason is None:
            return
        self._logged_at = now
        remaining_s = self._finish.remaining_s(run)
        fields = payloads.log_data(run, update, remaining_s)
        logger.info(payloads.log_message(run, update, remaining_s), extra={"fields": fields})

    def _select(self, updates: list[RunUpdate]) -> list[RunUpdate]:
        """Return the updates that are reported."""
        is_due = time.monotonic() - self._reported_at >= self._report_every_s
        return [
            update
            for update in updates
            if update.valid_loss is not None
            or update.finish_reason is not None
            or (is_due and update is updates[-1])
        ]


class CheckpointWriter:
    """Writes the states from which another attempt at the job would continue, unless they are too large."""

    def __init__(
        self,
        lease: Lease,
        leases: JobLeases,
        reporter: JobReporter,
        *,
        metrics: TrainerMetrics,
        every_s: float,
    ) -> None:
        #: False once a checkpoint was too large.
        self.is_enabled = True
        self._lease, self._leases, self._reporter = lease, leases, reporter
        self._metrics, self._every_s = metrics, every_s
        self._num_bytes = 0

    @property
    def interval_s(self) -> float:
        """Seconds between two checkpoints."""
        return max(self._every_s, self._num_bytes / MAX_CHECKPOINT_BYTES_PER_S)

    async def write(self, content: bytes, *, step: int) -> None:
        """Write a checkpoint, as soon as the store answers. Raises `StaleLease`."""
        await self._write(content, step, retrying(self._leases, self._reporter.note_outage))

    async def try_write(self, content: bytes, *, step: int) -> None:
        """Write a checkpoint if the store answers; otherwise the next one will do. Raises `StaleLease`."""
        try:
            await self._write(content, step, self._leases)
        except Unavailable as error:
            self._reporter.note_outage(error)

    async def _write(self, content: bytes, step: int, leases: JobLeases) -> None:
        self._num_bytes = len(content)
        if len(content) <= MAX_CHECKPOINT_BYTES:
            await leases.checkpoint(self._lease, content, step=step)
            self._metrics.checkpoints.inc()
            self._metrics.checkpoint_bytes.set(len(content))
        elif self.is_enabled:
            self.is_enabled = False
            message = f"checkpoints of {len(content)} bytes are too large: an interrupted job starts afresh"
            await self._reporter.warn("no_checkpoints", message)
