"""A worker before its first job: it watches the queue, and loads the base model when a job is waiting.

Until then the process holds neither torch nor transformers, which take more memory than a small model. The
worker does its other duties from the start: it shows that it is alive, and it queues the jobs of workers that
died.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING

from tessera.errors import Unavailable
from tessera.queue.leases import JobLeases
from tessera.queue.worker_reports import WorkerReport, WorkerReports
from tessera.settings import CommonSettings
from trainer_worker.common.duties import (
    OUTAGE_DELAY_S,
    REPORT_EVERY_S,
    WAIT_FOR_WORK_S,
    Duties,
    Heartbeat,
)
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from tessera.chat.chat_format import ChatFormat
    from tessera.model.base_model import BaseModel

logger = logging.getLogger(__name__)


class IdleWorker:
    """Waits for the first job, then loads the model for it."""

    def __init__(
        self,
        leases: JobLeases,
        settings: WorkerSettings,
        *,
        metrics: TrainerMetrics,
        heartbeat: Heartbeat,
        reports: WorkerReports,
    ) -> None:
        self._leases, self._settings, self._reports = leases, settings, reports
        self._metrics, self._heartbeat = metrics, heartbeat
        self._duties = Duties(leases, settings, heartbeat=heartbeat, note_outage=self._note_outage)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End the wait. For signal handlers."""
        self._stopping.set()

    async def wait_for_first_job(self) -> bool:
        """True once a job can be claimed, False after `stop`."""
        logger.info("idle; the base model will be loaded for the first job")
        waiting = asyncio.create_task(self._wait_for_work())
        stopping = asyncio.create_task(self._stopping.wait())
        await self._duties.beside(waiting, stopping, also=self._report())
        return waiting.done() and not self._stopping.is_set()

    async def load(self, settings: CommonSettings) -> tuple[BaseModel, ChatFormat]:
        """Load the base model and its chat format. Raises `UnsupportedModel`, `InvalidInput`."""
        self._heartbeat.model = "loading"
        loading = asyncio.create_task(asyncio.to_thread(_load, settings, self._settings))
        await self._duties.beside(loading)
        loaded = await loading
        self._heartbeat.model = "loaded"
        self._metrics.model_loaded.set(1)
        return loaded

    async def _wait_for_work(self) -> None:
        while True:
            try:
                if await self._leases.wait_for_work(WAIT_FOR_WORK_S):
                    return
            except Unavailable as error:
                self._note_outage(error)
                await asyncio.sleep(OUTAGE_DELAY_S)

    async def _report(self) -> None:
        """Report that there is a worker with room, forever. It has measured nothing yet."""
        worker_id = self._settings.worker_id or f"{socket.gethostname()}-{os.getpid()}"
        report = WorkerReport(free_slots=self._settings.max_resident_jobs)
        while True:
            try:
                await self._reports.post(worker_id, report)
            except Unavailable as error:
                self._note_outage(error)
            await asyncio.sleep(REPORT_EVERY_S)

    def _note_outage(self, error: Unavailable) -> None:
        self._metrics.store_errors.inc()
        logger.warning("%s", error)


def _load(settings: CommonSettings, worker_settings: WorkerSettings) -> tuple[BaseModel, ChatFormat]:
    from trainer_worker.assembly import load

    return load(settings, worker_settings)
