"""What every worker does beside its jobs, with and without one: tell that it lives, and reap lost jobs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from tessera.errors import Unavailable
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
    """note_outage: called when the store does not answer."""

    def __init__(
        self,
        leases: JobLeases,
        settings: WorkerSettings,
        *,
        heartbeat: Heartbeat,
        note_outage: Callable[[Unavailable], None],
    ) -> None:
        self._leases, self._settings, self._heartbeat = leases, settings, heartbeat
        self._note_outage = note_outage

    async def beat(self) -> None:
        """For ever: tell that the event loop turns."""
        while True:
            self._heartbeat.beat()
            await asyncio.sleep(BEAT_EVERY_S)

    async def reap(self) -> None:
        """For ever: queue the jobs of workers that died. Any worker does it."""
        grace_s = min(GRACE_S, self._settings.lease_s / RENEWALS_PER_LEASE)
        while True:
            await asyncio.sleep(self._settings.reap_every_s)
            try:
                for job_id, status in (await self._leases.reap(grace_s=grace_s)).items():
                    logger.warning("job %s was lost by its worker and is now %s", job_id, status)
            except Unavailable as error:
                self._note_outage(error)

    async def beside(self, *tasks: asyncio.Task[Any]) -> None:
        """Do all of it until one of the tasks is done, and end the other tasks. Raises what breaks a duty."""
        duties = [asyncio.create_task(duty) for duty in (self.beat(), self.reap())]
        try:
            done, _ = await asyncio.wait([*tasks, *duties], return_when=asyncio.FIRST_COMPLETED)
            for duty in done.intersection(duties):
                duty.result()
        finally:
            for task in (*tasks, *duties):
                task.cancel()
            await asyncio.gather(*tasks, *duties, return_exceptions=True)
