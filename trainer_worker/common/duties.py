"""The duties of every worker, with or without a job: show that it is alive, and queue lost jobs again.

The worker is healthy while its event loop runs and its training thread is not stuck in one step. The thread
of the health server (`health.py`) measures both by checking the heartbeat, so a pause of the whole process
does not count. Health does not depend on the store: a worker that cannot reach it goes on training, and a
restart would not help.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from tessera.errors import Unavailable
from tessera.processes.tasks import end_tasks
from tessera.queue.leases import JobLeases
from tessera.queue.worker_reports import ALIVE_S
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
#: Time between two reports of a worker on itself; a third of what counts as alive.
REPORT_EVERY_S = ALIVE_S / 3
#: The event loop beats every BEAT_EVERY_S; silence for this long means that it is stuck.
MAX_SILENCE_S = 15.0
#: A step of 8,192 tokens through an 8B model takes 0.6 s on an H100; minutes mean a stuck device.
MAX_STEP_S = 300.0
#: At most this much of the time between two checks counts. The server's thread checks every half second; a
#: later check was delayed by a pause of the whole process or by a machine without a free processor.
MAX_LOOK_S = 2.0


class Heartbeat:
    """Measures how long the event loop has been silent and how long the training thread has been in a step.

    All methods may be called from any thread. The reader of the report calls `look` regularly, because only
    the time between two punctual checks counts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = clock()
        self._silent_s = self._step_s = 0.0
        self._is_in_step = False
        self._guard = threading.Lock()
        self.num_jobs = 0
        #: The base model is loaded for the first job.
        self.model: Literal["not loaded", "loading", "loaded"] = "not loaded"

    def beat(self) -> None:
        with self._guard:
            self._silent_s = 0.0

    def begin_step(self) -> None:
        with self._guard:
            self._is_in_step, self._step_s = True, 0.0

    def end_step(self) -> None:
        with self._guard:
            self._is_in_step, self._step_s = False, 0.0

    def look(self) -> None:
        """Add the time since the last check, up to `MAX_LOOK_S`, to the silence and to the step."""
        with self._guard:
            now = self._clock()
            elapsed_s, self._looked_at = min(now - self._looked_at, MAX_LOOK_S), now
            self._silent_s += elapsed_s
            if self._is_in_step:
                self._step_s += elapsed_s

    def report(self) -> tuple[bool, dict[str, Any]]:
        """Return whether the worker is healthy, and the figures that show it."""
        self.look()
        silent_s, step_s = self._silent_s, self._step_s
        is_healthy = silent_s < MAX_SILENCE_S and step_s < MAX_STEP_S
        status = "ok" if is_healthy else "stuck"
        return is_healthy, {
            "status": status,
            "jobs": self.num_jobs,
            "model": self.model,
            "event_loop_silent_s": round(silent_s, 3),
            "step_s": round(step_s, 3),
        }


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

    async def beside(self, *tasks: asyncio.Task[Any], also: Coroutine[Any, Any, None] | None = None) -> None:
        """Do all duties, and `also`, until one of the tasks is done, then cancel the others.

        Raises errors of duties.
        """
        more = () if also is None else (also,)
        duties = [asyncio.create_task(duty) for duty in (self.beat(), self.reap(), *more)]
        try:
            done, _ = await asyncio.wait([*tasks, *duties], return_when=asyncio.FIRST_COMPLETED)
            for duty in done.intersection(duties):
                duty.result()
        finally:
            await end_tasks(*tasks, *duties)
