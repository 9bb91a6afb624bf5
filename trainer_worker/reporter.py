"""What a session tells the queue about its job while it is under way: messages, warnings, metrics, progress.

While the store does not answer, messages are lost and metrics wait; neither holds up the training.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Literal

from tessera.errors import StaleLease, Unavailable
from tessera.queue.leases import JobLeases, Lease, LeaseState
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.outcome import reports
from trainer_worker.training.run import RunUpdate, TrainRun

logger = logging.getLogger(__name__)

#: Metrics that wait for the store, at most; the oldest are dropped.
MAX_WAITING = 200


class JobReporter:
    """The voice of one lease. Every reply may carry an order of the job's owner, which goes to `obey`.

    All methods raise `StaleLease`. warnings: all that were given, for the job's result.
    """

    def __init__(
        self,
        lease: Lease,
        leases: JobLeases,
        *,
        obey: Callable[[LeaseState], None],
        metrics: TrainerMetrics,
        report_every_s: float,
    ) -> None:
        self.warnings: list[tuple[str, str]] = []
        self._lease, self._leases, self._obey = lease, leases, obey
        self._metrics, self._report_every_s = metrics, report_every_s
        self._waiting: list[RunUpdate] = []
        self._reported_at = -report_every_s
        self._telling: asyncio.Task[None] | None = None

    async def tell(
        self, message: str, *, level: Literal["info", "warn"] = "info", data: dict[str, Any] | None = None
    ) -> None:
        """A message for the job's owner."""
        try:
            self._obey(await self._leases.report(self._lease, message=message, level=level, data=data))
        except Unavailable as error:
            self.note_outage(error)

    async def warn(self, code: str, message: str) -> None:
        self.warnings.append((code, message))
        await self.tell(message, level="warn", data={"code": code})

    async def report(self, run: TrainRun, updates: list[RunUpdate]) -> None:
        """The warnings, the evaluations and the end among `updates`, and now and then the latest of them."""
        for update in updates:
            for code, message in update.warnings:
                await self.warn(code, message)
        self._waiting += self._worth_telling(updates)
        del self._waiting[:-MAX_WAITING]
        while self._waiting:
            update = self._waiting[0]
            try:
                state = await self._leases.report(
                    self._lease,
                    type="metrics",
                    message=reports.metrics_message(update),
                    data=reports.metrics_data(update),
                    progress=reports.progress_of(run, update),
                )
            except Unavailable as error:
                self.note_outage(error)
                return
            del self._waiting[0]
            self._reported_at = time.monotonic()
            self._obey(state)

    def note_modules(self, done: int, total: int) -> None:
        """A module of a basis or a start is done. Told now and then, and not waited for."""
        is_due = time.monotonic() - self._reported_at >= self._report_every_s or done == total
        if is_due and (self._telling is None or self._telling.done()):
            self._reported_at = time.monotonic()
            self._telling = asyncio.create_task(self._tell_progress(reports.building_progress(done, total)))

    async def settle(self) -> None:
        """Wait for what `note_modules` began, so that it does not overtake what is told next."""
        if self._telling is not None:
            await self._telling

    async def _tell_progress(self, progress: dict[str, Any]) -> None:
        try:
            self._obey(await self._leases.report(self._lease, progress=progress))
        except Unavailable as error:
            self.note_outage(error)
        except StaleLease:
            self._obey(LeaseState.LOST)

    def note_outage(self, error: Unavailable) -> None:
        self._metrics.store_errors.inc()
        logger.warning("job %s: %s", self._lease.job.job_id, error)

    def _worth_telling(self, updates: list[RunUpdate]) -> list[RunUpdate]:
        is_due = time.monotonic() - self._reported_at >= self._report_every_s
        return [
            update
            for update in updates
            if update.valid_loss is not None
            or update.finish_reason is not None
            or (is_due and update is updates[-1])
        ]
