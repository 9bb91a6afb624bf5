"""The client side of the training queue: submit, read, cancel, pause and resume jobs. Workers use
`leases.py`.

A job is visible only to its own tenant; to others it does not exist (`NotFound`). All steps are atomic on the
server (`client_scripts.py`) and use its clock. This module knows no HTTP, and nothing of how a job is
trained.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from tessera.errors import Conflict, CorruptRecord, InvalidInput, NotFound
from tessera.queue.client_scripts import (
    CANCEL,
    GET,
    LIST,
    LIST_EVENTS,
    PAUSE,
    RESUME,
    SET_SHARE,
    STATS,
    STOP,
    SUBMIT,
)
from tessera.queue.records import Job, JobEvent, JobReply, JobSpec, JobStatus, parse_event, parse_job
from tessera.redis import keys
from tessera.redis.client import Argument, Client, Script

__all__ = ["Job", "JobEvent", "JobQueue", "JobSpec", "JobStatus", "QueueStats"]

logger = logging.getLogger(__name__)

#: Even without a dedupe key, a submission is protected against a repetition by the Redis client.
_REPETITION_TTL_S = 60
_EVENT_ID = re.compile(r"\d{1,19}-\d{1,19}")

JobPage: TypeAlias = tuple[list[Job], bool]
EventPage: TypeAlias = tuple[list[JobEvent], bool]


@dataclass(frozen=True)
class QueueStats:
    """The queue over all tenants."""

    #: Jobs that are queued, running or paused now, and jobs that ever ended in each final state.
    jobs: dict[JobStatus, int]
    #: Queued jobs that may not run yet.
    delayed: int
    #: How long the oldest claimable job has waited; 0 if there is none.
    oldest_queued_s: float
    #: Estimated tokens of all queued jobs.
    backlog_cost: int


#: Prefix of the ids of each kind of job, so that a job of one kind is not found among those of another.
ID_PREFIXES = {"adapter": "ftjob-", "basis": "basisjob-"}


_ADJECTIVES = {"cancel": "cancellable", "pause": "pausable", "resume": "resumable", "stop": "stoppable"}

#: Jobs read at a time while a filtered page is filled.
_PAGE_SIZE = 100


class JobQueue:
    """Jobs of one kind in Redis, as their owners see them. All methods raise `StoreUnavailable`, `StoreFull`.

    Jobs of all kinds wait in one queue; `stats` and `set_share` apply to all of them.
    """

    def __init__(self, redis: Client, *, kind: str = "adapter") -> None:
        self._redis, self._kind, self._prefix = redis, kind, ID_PREFIXES[kind]

    async def submit(
        self,
        tenant: str,
        spec: JobSpec,
        *,
        cost: int,
        dedupe_key: str | None = None,
        not_before: float | None = None,
    ) -> Job:
        """Queue a job.

        cost: estimated tokens, which the fairness between tenants counts. dedupe_key: if the tenant has used
        it within `keys.IDEMPOTENCY_TTL_S`, the job of that time is returned. not_before: Unix time in
        seconds.
        """
        assert spec.kind == self._kind
        ttl_s = keys.IDEMPOTENCY_TTL_S if dedupe_key is not None else _REPETITION_TTL_S
        dedupe = f"{tenant}\n{dedupe_key if dedupe_key is not None else secrets.token_hex(16)}"
        digest = hashlib.sha256(dedupe.encode(errors="surrogatepass")).hexdigest()
        due_ms = 0 if not_before is None else int(not_before * 1000)
        reply: JobReply = await self._run(
            SUBMIT,
            tenant,
            digest,
            ttl_s,
            secrets.token_hex(6),
            spec.to_json(),
            max(1, cost),
            due_ms,
            spec.basis_id or "",
            self._prefix,
        )
        return parse_job(reply)

    async def get(self, tenant: str, job_id: str) -> Job:
        """Return the job as it is now. Raises `NotFound`."""
        reply = await self._run(GET, tenant, self._of_kind(job_id))
        if reply is None:
            raise _not_found(job_id)
        return parse_job(reply)

    async def events(self, tenant: str, job_id: str, after: str | None = None, limit: int = 20) -> EventPage:
        """Return events older than `after`, newest first, and whether there are more. Raises `NotFound`."""
        if after is not None and not _EVENT_ID.fullmatch(after):
            raise InvalidInput(f"{after!r} is not an event id", param="after")
        reply: list[tuple[bytes, list[bytes]]] | None = await self._run(
            LIST_EVENTS, tenant, self._of_kind(job_id), after or "", limit
        )
        if reply is None:
            raise _not_found(job_id)
        return [parse_event(*entry) for entry in reply[:limit]], len(reply) > limit

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel a job: at once if no worker has it, else when its worker has stopped (`cancel_requested`).

        If the worker completes the job first, the job has succeeded. Raises `NotFound`, and `Conflict`
        (job_not_cancellable) if the job has ended.
        """
        return await self._command(CANCEL, tenant, job_id, "cancel")

    async def pause(self, tenant: str, job_id: str) -> Job:
        """Pause a job: at once if no worker has it, else after a checkpoint (`pause_requested`).

        Raises `NotFound`, and `Conflict` (job_not_pausable) if the job has ended or is being cancelled.
        """
        return await self._command(PAUSE, tenant, job_id, "pause")

    async def resume(self, tenant: str, job_id: str) -> Job:
        """Queue a paused job again at its old place in the tenant's backlog, or withdraw a requested pause.

        Raises `NotFound`, and `Conflict` (job_not_resumable) if the job has ended.
        """
        return await self._command(RESUME, tenant, job_id, "resume")

    async def stop(self, tenant: str, job_id: str) -> Job:
        """Let a job end now as succeeded with the best state that it has reached (`stop_requested`).

        A paused job is queued again for it. Raises `NotFound`, and `Conflict` (job_not_stoppable) if the job
        has ended, is being cancelled, or has made no step yet.
        """
        return await self._command(STOP, tenant, job_id, "stop")

    async def set_share(
        self, tenant: str, *, weight: float = 1.0, max_running_jobs: int | None = None
    ) -> None:
        """Give a tenant `weight` times the usual share, and its own cap on running jobs."""
        if not 0 < weight < float("inf"):
            raise InvalidInput("weight must be a positive number", param="weight")
        if max_running_jobs is not None and max_running_jobs < 1:
            raise InvalidInput("max_running_jobs must be at least 1", param="max_running_jobs")
        await self._run(SET_SHARE, tenant, weight, "" if max_running_jobs is None else max_running_jobs)

    async def stats(self) -> QueueStats:
        """Count the jobs of all tenants."""
        waiting, delayed, running, paused, oldest_ms, cost, flat = await self._run(STATS)
        jobs = dict.fromkeys(JobStatus, 0)
        for name, total in zip(flat[::2], flat[1::2], strict=True):
            jobs[JobStatus(name.decode())] = int(total)
        jobs[JobStatus.QUEUED] = waiting + delayed
        jobs[JobStatus.RUNNING] = running
        jobs[JobStatus.PAUSED] = paused
        return QueueStats(jobs, delayed, max(0, oldest_ms) / 1000, cost)

    async def list(
        self,
        tenant: str,
        after: str | None = None,
        limit: int = 20,
        *,
        is_wanted: Callable[[Job], bool] | None = None,
    ) -> JobPage:
        """Return the tenant's jobs older than the job `after`, newest first, and whether there are more.

        is_wanted: a filter; None lists all jobs.
        """
        found: list[Job] = []
        page, has_next = limit if is_wanted is None else _PAGE_SIZE, True
        while has_next and len(found) <= limit:
            reply: list[JobReply] = await self._run(LIST, tenant, after or "", page, self._prefix)
            has_next = len(reply) > page
            jobs = _readable(reply[:page])
            if is_wanted is None:
                return list(jobs), has_next
            found += filter(is_wanted, jobs)
            after = reply[page - 1][0].decode() if has_next else None
        return found[:limit], len(found) > limit

    async def _command(self, script: Script, tenant: str, job_id: str, verb: str) -> Job:
        token = secrets.token_hex(8)
        reply: JobReply | bytes | None = await self._run(script, tenant, self._of_kind(job_id), token)
        if reply is None:
            raise _not_found(job_id)
        if isinstance(reply, bytes):
            adjective = _ADJECTIVES[verb]
            raise Conflict(
                f"cannot {verb} job {job_id}: it is {reply.decode()}",
                param="job_id",
                code=f"job_not_{adjective}",
            )
        return parse_job(reply)

    def _of_kind(self, job_id: str) -> str:
        """Return the id. Raises `NotFound` if it cannot belong to a job of this kind."""
        if not job_id.startswith(self._prefix):
            raise _not_found(job_id)
        return job_id

    async def _run(self, script: Script, *args: Argument) -> Any:
        return await script(self._redis, keys=[keys.QUEUE], args=args)


def _readable(replies: Iterable[JobReply]) -> Iterable[Job]:
    """Parse the jobs, and leave out corrupt records: one must not hide the others of its page."""
    for reply in replies:
        try:
            yield parse_job(reply)
        except CorruptRecord as error:
            logger.error("a job is left out of a list: %s", error)


def _not_found(job_id: str) -> NotFound:
    return NotFound(f"there is no job {job_id!r}", param="job_id", code="job_not_found")
