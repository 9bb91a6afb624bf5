"""The duties of every worker, with or without a job: show that it is alive, and queue lost jobs again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from tessera.errors import Unavailable
from tessera.processes.tasks import end_tasks
from tessera.queue.leases import JobLeases
from trainer_worker.common.health import Heartbeat
from trainer_worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

#: Longest wait for the doorbell, after which the loop tries to claim anyway.
WAIT_FOR_WORK_S = 5.0
#: Pause after a call that the store did not answer.
OUTAGE_DELAY_S = 0.5
#: Renewals per lease: three may fail before the lease expires.
RENEWALS_PER_LEASE = 4
#: Time between finding a lease expired and taking the job from its worker. A worker that is alive but was
#: delayed, or could not reach the store, renews within OUTAGE_DELAY_S and one time-out of the store.
GRACE_S = 5.0
BEAT_EVERY_S = 1.0


class Duties:
    """The periodic duties of one worker."""

    def __init__(
        self,
        leases: JobLeases,
        settings: WorkerSettings,
        *,
        heartbeat: Heartbeat,
        note_outage: Callable[[Unavailable], None],
    ) -> None:
        """note_outage: called whenever the store does not answer."""
        self._leases, self._settings, self._heartbeat = leases, settings, heartbeat
        self._note_outage = note_outage

    async def beat(self) -> None:
        """Show that the event loop runs, forever."""
        while True:
            self._heartbeat.beat()
            await asyncio.sleep(BEAT_EVERY_S)

    async def reap(self) -> None:
        """Queue the jobs of workers that died, forever. Every worker does this."""
        grace_s = min(GRACE_S, self._settings.lease_s / RENEWALS_PER_LEASE)
        while True:
            await asyncio.sleep(self._settings.reap_every_s)
            try:
                for job_id, status in (await self._leases.reap(grace_s=grace_s)).items():
                    logger.warning("job %s was lost by its worker and is now %s", job_id, status)
            except Unavailable as error:
                self._note_outage(error)

    async def beside(self, *tasks: asyncio.Task[Any]) -> None:
        """Do all duties until one of the tasks is done, then cancel the others. Raises errors of duties."""
        duties = [asyncio.create_task(duty) for duty in (self.beat(), self.reap())]
        try:
            done, _ = await asyncio.wait([*tasks, *duties], return_when=asyncio.FIRST_COMPLETED)
            for duty in done.intersection(duties):
                duty.result()
        finally:
            await end_tasks(*tasks, *duties)
