"""The worker: claims jobs, keeps their leases, lets them be trained together, hands them back when it ends.

    event loop       claims, renewals, the sessions' reports and commits; never waits for a training step
    training thread  `train_loop.py`

Renewals do not depend on training: a long step costs no lease.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from tessera.errors import Unavailable
from tessera.queue.leases import JobLeases, Lease
from trainer_worker.common.commands import Command
from trainer_worker.common.health import Heartbeat
from trainer_worker.session import JobSession, Tools
from trainer_worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED = 0, 1
#: One wait for the doorbell; the loop looks at the rest of the world in between.
WAIT_FOR_WORK_S = 5.0
#: After a call that the store did not answer.
OUTAGE_DELAY_S = 0.5
#: Renewals per lease: three may fail before the lease does.
RENEWALS_PER_LEASE = 4
#: Between finding a lease expired and taking the job from its worker. One that lives and was held up, or
#: could not reach the store, renews within OUTAGE_DELAY_S and one time-out of the store.
GRACE_S = 5.0
BEAT_EVERY_S = 1.0


def new_worker_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


class Worker:
    """Sessions for as many jobs as fill the token budget."""

    def __init__(
        self, tools: Tools, settings: WorkerSettings, *, heartbeat: Heartbeat, worker_id: str | None = None
    ) -> None:
        self.worker_id = worker_id or settings.worker_id or new_worker_id()
        self._tools, self._settings, self._heartbeat = tools, settings, heartbeat
        self._leases: JobLeases = tools.leases
        self._sessions: dict[str, tuple[JobSession, asyncio.Task[None]]] = {}
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._stopping = asyncio.Event()
        self._status = EXIT_OK

    @property
    def sessions(self) -> list[JobSession]:
        return [session for session, _ in self._sessions.values()]

    def stop(self) -> None:
        """Checkpoint and hand back all jobs, then end. For signal handlers."""
        self._stopping.set()

    async def run(self) -> int:
        """Work until `stop`, or until training breaks; returns the exit status."""
        logger.info("worker %s takes up to %d jobs", self.worker_id, self._settings.max_resident_jobs)
        claiming = asyncio.create_task(self._claim())
        duties = (self._tools.loop.run(), self._renew(), self._reap(), self._beat())
        tasks = [claiming, *map(asyncio.create_task, duties)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done if not self._stopping.is_set() else done - {claiming}:
                logger.critical("worker %s breaks", self.worker_id, exc_info=task.exception())
                self._status = EXIT_FAILED
            self.stop()
            await asyncio.wait({claiming})
            await self._hand_back()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._tools.loop.close()
        return self._status

    async def _claim(self) -> None:
        """Claim one job at a time while there is room; ends when the worker is to stop."""
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
                    self._start(self._session(lease))
                if not leases:
                    await self._unless_stopping(self._leases.wait_for_work(WAIT_FOR_WORK_S))
            except Unavailable as error:
                self._note_outage(error)
                await self._unless_stopping(asyncio.sleep(OUTAGE_DELAY_S))

    async def _unless_stopping(self, wait: Coroutine[Any, Any, object]) -> None:
        """Wait, but no longer when the worker is to stop. Not for claims: a job whose reply is lost waits for
        its lease to run out.
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
        """As many jobs as fill the budget, not as many as fit: more would only make all of them slower."""
        if len(self._sessions) >= self._settings.max_resident_jobs:
            return False
        if any(session.needs_worker_alone for session in self.sessions):
            return False
        return sum(session.tokens_per_step for session in self.sessions) < self._settings.token_budget

    def _common_basis(self) -> str | None:
        counts = Counter(session.basis_id for session in self.sessions if session.basis_id is not None)
        return counts.most_common(1)[0][0] if counts else None

    def _session(self, lease: Lease) -> JobSession:
        """A job that a worker died with has the next one for itself: if it is to blame, it kills no other.

        It is claimed like any other; no further job is claimed until it has ended.
        """
        if lease.job.num_lost_workers == 0:
            return JobSession(lease, self._tools)
        return JobSession(lease, self._tools, alone=self._is_last)

    async def _is_last(self) -> None:
        """Until one session is left: the one that waits for this."""
        while len(self._sessions) > 1:
            self._ended.clear()
            await self._ended.wait()

    def _start(self, session: JobSession) -> None:
        job = session.lease.job
        logger.info("job %s (%s): attempt %d", job.job_id, job.tenant, job.attempt)
        task = asyncio.create_task(session.run())
        self._sessions[job.job_id] = (session, task)
        task.add_done_callback(lambda _: self._on_end(session))
        self._count()

    def _on_end(self, session: JobSession) -> None:
        if self._sessions.get(session.job_id, (None, None))[0] is session:
            del self._sessions[session.job_id]
        self._ended.set()
        self._count()
        if session.failure is not None:
            logger.critical("training broke; the worker starts afresh")
            self._status = EXIT_FAILED
            self.stop()

    def _count(self) -> None:
        self._tools.metrics.leased_jobs.set(len(self._sessions))
        self._heartbeat.num_jobs = len(self._sessions)
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
                if session in self.sessions:  # else it ended during the renewal
                    session.obey(states[session.job_id])

    async def _reap(self) -> None:
        """Queue the jobs of workers that died. Any worker does it."""
        grace_s = min(GRACE_S, self._settings.lease_s / RENEWALS_PER_LEASE)
        while True:
            await asyncio.sleep(self._settings.reap_every_s)
            try:
                for job_id, status in (await self._leases.reap(grace_s=grace_s)).items():
                    logger.warning("job %s was lost by its worker and is %s", job_id, status)
            except Unavailable as error:
                self._note_outage(error)

    async def _beat(self) -> None:
        while True:
            self._heartbeat.beat()
            await asyncio.sleep(BEAT_EVERY_S)

    async def _hand_back(self) -> None:
        """Let every session write its checkpoint and release its lease, for at most stop_timeout_s."""
        tasks = [task for _, task in self._sessions.values()]
        for session in self.sessions:
            session.command(Command.RELEASE)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._settings.stop_timeout_s)
        for task in late:
            task.cancel()
        if late:
            logger.error("%d job(s) could not be handed back; their leases run out", len(late))

    def _note_outage(self, error: Unavailable) -> None:
        self._tools.metrics.store_errors.inc()
        logger.warning("worker %s: %s", self.worker_id, error)
