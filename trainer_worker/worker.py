"""The worker: claims jobs, renews their leases, trains them together, and gives them back when it stops.

    event loop       claims, renewals, the sessions' reports and commits; never waits for a training step
    training thread  `train_loop.py`

Renewals do not depend on training, so a long step does not cost a lease.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from tessera.errors import Unavailable
from tessera.processes.tasks import end_tasks
from tessera.queue.leases import JobLeases, Lease
from trainer_worker.common.duties import (
    OUTAGE_DELAY_S,
    RENEWALS_PER_LEASE,
    REPORT_EVERY_S,
    WAIT_FOR_WORK_S,
    Duties,
    Heartbeat,
)
from trainer_worker.common.waits import Command
from trainer_worker.session import JobSession, WorkerServices
from trainer_worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED = 0, 1


def new_worker_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


class Worker:
    """Runs sessions for as many jobs as fill the token budget."""

    def __init__(
        self,
        services: WorkerServices,
        settings: WorkerSettings,
        *,
        heartbeat: Heartbeat,
        worker_id: str | None = None,
    ) -> None:
        self.worker_id = worker_id or settings.worker_id or new_worker_id()
        self._services, self._settings, self._heartbeat = services, settings, heartbeat
        self._leases: JobLeases = services.leases
        self._duties = Duties(services.leases, settings, heartbeat=heartbeat, note_outage=self._note_outage)
        self._sessions: dict[str, tuple[JobSession, asyncio.Task[None]]] = {}
        self._changed = asyncio.Event()
        #: Set while at most one job is left, for the job that must have the worker to itself.
        self._is_free = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._stopping = asyncio.Event()
        self._status = EXIT_OK

    @property
    def sessions(self) -> list[JobSession]:
        return [session for session, _ in self._sessions.values()]

    def stop(self) -> None:
        """Checkpoint and give back all jobs, then end. For signal handlers."""
        self._stopping.set()

    async def run(self) -> int:
        """Work until `stop` is called or training breaks; returns the exit status."""
        logger.info(
            "worker %s trains up to %d jobs at once", self.worker_id, self._settings.max_resident_jobs
        )
        claiming = asyncio.create_task(self._claim())
        duties = (
            self._services.loop.run(),
            self._renew(),
            self._report(),
            self._duties.reap(),
            self._duties.beat(),
        )
        tasks = [claiming, *map(asyncio.create_task, duties)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done if not self._stopping.is_set() else done - {claiming}:
                logger.critical("worker %s cannot go on", self.worker_id, exc_info=task.exception())
                self._status = EXIT_FAILED
            self.stop()
            await asyncio.wait({claiming})
            await self._give_back()
        finally:
            await end_tasks(*tasks)
            await self._services.loop.close()
        return self._status

    async def _claim(self) -> None:
        """Claim one job at a time while there is room, until the worker stops."""
        while not self._stopping.is_set():
            if not self._has_room():
                self._changed.clear()
                await self._unless_stopping(self._changed.wait())
                continue
            try:
                leases = await self._leases.claim(
                    self.worker_id, limit=1, lease_s=self._settings.lease_s, basis_hint=self._common_basis()
                )
                for lease in leases:
                    self._start(lease)
                if not leases:
                    await self._unless_stopping(self._leases.wait_for_work(WAIT_FOR_WORK_S))
            except Unavailable as error:
                self._note_outage(error)
                await self._unless_stopping(asyncio.sleep(OUTAGE_DELAY_S))

    async def _unless_stopping(self, wait: Coroutine[Any, Any, object]) -> None:
        """Wait for `wait`, but no longer than until the worker stops.

        It must not be used for claims: a job whose reply is lost stays leased.
        """
        waiting, stopping = asyncio.create_task(wait), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                waiting.result()
        finally:
            waiting.cancel()
            stopping.cancel()
            await asyncio.gather(waiting, stopping, return_exceptions=True)

    def _has_room(self) -> bool:
        """Whether another job may be claimed. Beyond the token budget, jobs would only slow each other."""
        if len(self._sessions) >= self._settings.max_resident_jobs:
            return False
        if any(session.needs_worker_alone for session in self.sessions):
            return False
        return sum(session.tokens_per_step for session in self.sessions) < self._settings.token_budget

    def _common_basis(self) -> str | None:
        counts = Counter(session.basis_id for session in self.sessions if session.basis_id is not None)
        return counts.most_common(1)[0][0] if counts else None

    def _start(self, lease: Lease) -> None:
        """Start a session. A job that a worker died with gets this one to itself, so that it breaks no other.

        Such a job is claimed like any other, but no further job is claimed until it has ended.
        """
        job = lease.job
        is_suspect = job.num_lost_workers > 0
        session = JobSession(lease, self._services, worker_is_free=self._is_free if is_suspect else None)
        logger.info("job %s (%s): attempt %d", job.job_id, job.tenant, job.attempt)
        task = asyncio.create_task(session.run())
        self._sessions[job.job_id] = (session, task)
        task.add_done_callback(lambda _: self._on_end(session))
        self._count()

    def _on_end(self, session: JobSession) -> None:
        if self._sessions.get(session.job_id, (None, None))[0] is session:
            del self._sessions[session.job_id]
        self._count()
        self._has_ended.set()
        if session.failure is not None:
            logger.critical("a training step broke; the worker stops, to be restarted")
            self._status = EXIT_FAILED
            self.stop()

    def _count(self) -> None:
        self._services.metrics.leased_jobs.set(len(self._sessions))
        self._heartbeat.num_jobs = len(self._sessions)
        if len(self._sessions) <= 1:
            self._is_free.set()
        else:
            self._is_free.clear()
        self._changed.set()

    async def _renew(self) -> None:
        delay_s = self._settings.lease_s / RENEWALS_PER_LEASE
        while True:
            await asyncio.sleep(delay_s)
            sessions = self.sessions
            try:
                states = await self._leases.renew(
                    [session.lease for session in sessions], lease_s=self._settings.lease_s
                )
            except Unavailable as error:
                self._note_outage(error)
                delay_s = min(OUTAGE_DELAY_S, self._settings.lease_s / RENEWALS_PER_LEASE)
                continue
            delay_s = self._settings.lease_s / RENEWALS_PER_LEASE
            for session in sessions:
                if session in self.sessions:  # otherwise it ended during the renewal
                    session.commands.obey(states[session.job_id])

    async def _report(self) -> None:
        """Report how fast this worker trains and what room it has, also after each job, forever."""
        while True:
            free_slots = self._settings.max_resident_jobs - len(self._sessions) if self._has_room() else 0
            try:
                report = self._services.pace.report(free_slots)
                await self._services.reports_of_workers.post(self.worker_id, report)
            except Unavailable as error:
                self._note_outage(error)
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY_S):
                    await self._has_ended.wait()
            self._has_ended.clear()

    async def _give_back(self) -> None:
        """Let every session write its checkpoint and release its lease, within stop_timeout_s."""
        tasks = [task for _, task in self._sessions.values()]
        for session in self.sessions:
            session.commands.give(Command.RELEASE)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._settings.stop_timeout_s)
        for task in late:
            task.cancel()
        if late:
            logger.error("%d job(s) could not be given back; their leases will expire", len(late))

    def _note_outage(self, error: Unavailable) -> None:
        self._services.metrics.store_errors.inc()
        logger.warning("worker %s: %s", self.worker_id, error)
