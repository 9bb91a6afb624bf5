"""The worker side of the training queue: claim jobs, keep their leases, report, end them.

`client.py` has the client side. Deadlines follow the clock of the server, never that of a worker. A worker
that is killed loses its leases, and `reap`, which every worker calls every few seconds, queues its jobs
again. So a job is executed at least once. Each claim raises the epoch of the job, and every step on a running
job names the epoch. A worker that lost a job without noticing can therefore no longer change it: at most one
epoch is alive, and a job ends exactly once. This module knows nothing of training.
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from redis.exceptions import TimeoutError

from tessera.errors import Conflict, CorruptRecord, StaleLease
from tessera.queue.lease_scripts import (
    ACKNOWLEDGE_CANCEL,
    CHECKPOINT,
    CLAIM,
    COMPLETE,
    FAIL,
    NEXT_WORK,
    REAP,
    RELEASE,
    RENEW,
    REPORT,
)
from tessera.queue.records import Job, JobReply, JobStatus, parse_job, to_json
from tessera.redis import keys
from tessera.redis.client import Argument, Client, Script, translate_errors

__all__ = ["JobLeases", "Lease", "LeaseState"]

logger = logging.getLogger(__name__)

#: Attempts before a job is given up. Only failures that another attempt may avoid are retried.
MAX_ATTEMPTS = 3
#: Seconds before the second attempt. Each further one waits RETRY_FACTOR times longer: 1, 4, 16 s …
RETRY_BASE_S = 1.0
RETRY_FACTOR = 4
#: Each delay is multiplied by a factor within 1 ± RETRY_JITTER, so that jobs that failed together do not come
#: back together.
RETRY_JITTER = 0.25
#: Cap on the running jobs of one tenant, unless `JobQueue.set_share` has set another. It is high, because
#: most installations have one tenant with many users; a lower cap suits installations in which
#: unrelated tenants share the workers.
MAX_RUNNING_JOBS = 64
#: Longest message of an event. A traceback belongs in the worker's log.
MAX_MESSAGE_CHARS = 2000
#: Longest blocking read while waiting for work. It is also at most half of the client's time-out.
MAX_BLOCK_S = 1.0
_MIN_BLOCK_S = 0.01  # 0 would block forever

_WORKER_DIED = {"code": "worker_died", "message": "the worker died in every attempt", "param": None}


class LeaseState(StrEnum):
    """The state of a lease, as a renewal or a report returns it."""

    HELD = "held"
    LOST = "lost"  # another worker has the job, or it has ended: drop it, write nothing
    CANCEL = "cancel"  # held, but its owner cancels it: stop, then `acknowledge_cancel`
    PAUSE = "pause"  # held, but its owner pauses it: write a checkpoint, then `release`
    STOP = "stop"  # held, but its owner ends it: publish the best state so far, then `complete`


@dataclass(frozen=True)
class Lease:
    """The right to work on a job until the deadline, which a renewal moves."""

    job: Job
    epoch: int  # fencing number of this claim
    worker_id: str
    deadline: float  # Unix seconds of the server's clock


class JobLeases:
    """Leases on training jobs. All methods raise `StoreUnavailable`, `StoreFull`.

    Methods that take a lease raise `StaleLease` if it is no longer alive, in which case nothing was changed.
    All workers of a queue must use the same arguments here.
    """

    def __init__(
        self,
        redis: Client,
        *,
        max_attempts: int = MAX_ATTEMPTS,
        retry_base_s: float = RETRY_BASE_S,
        max_running_jobs: int = MAX_RUNNING_JOBS,
    ) -> None:
        self._redis = redis
        self.max_attempts = max_attempts
        self._retry_base_s = retry_base_s
        self._max_running_jobs = max_running_jobs
        self._claim_token = secrets.token_hex(8)
        time_out_s = redis.get_connection_kwargs().get("socket_timeout")
        self._max_block_s = MAX_BLOCK_S if time_out_s is None else min(MAX_BLOCK_S, time_out_s / 2)

    async def wait_for_work(self, timeout_s: float) -> bool:
        """Wait until a claim may find a job.

        Return False after timeout_s. A submission ends the wait at once.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            next_ms: int = await self._run(NEXT_WORK)
            remaining_s = deadline - time.monotonic()
            if next_ms == 0 or remaining_s <= 0:
                return next_ms == 0
            block_s = min(remaining_s, self._max_block_s)
            if next_ms > 0:
                block_s = min(block_s, next_ms / 1000)
            # A server that replies a little late is not down. If it is down, the next NEXT_WORK raises.
            with translate_errors(), suppress(TimeoutError):
                if await self._redis.blpop([keys.QUEUE_DOORBELL], timeout=max(block_s, _MIN_BLOCK_S)):
                    return True

    async def claim(
        self, worker_id: str, *, limit: int, lease_s: float, basis_hint: str | None = None
    ) -> list[Lease]:
        """Claim up to `limit` jobs, fairly between tenants and in order of submission within each.

        Fewer than `limit` jobs mean that no other job may run now. basis_hint: within a tenant, prefer jobs
        on this basis. If the reply is lost (`StoreUnavailable`), the next call of this object returns the
        same leases, as long as they live.
        """
        reply: list[tuple[bytes, JobReply]] = await self._run(
            CLAIM,
            worker_id,
            limit,
            _milliseconds(lease_s),
            basis_hint or "",
            self._max_running_jobs,
            self._claim_token,
        )
        self._claim_token = secrets.token_hex(8)
        leases = []
        for deadline_ms, view in reply:
            try:
                job = parse_job(view)
            except CorruptRecord as error:
                await self._fail_unreadable(view, error)
            else:
                leases.append(Lease(job, job.epoch, worker_id, float(deadline_ms) / 1000))
        return leases

    async def renew(self, leases: Sequence[Lease], *, lease_s: float) -> dict[str, LeaseState]:
        """Extend the leases to lease_s from now. Return the state of each, by job id."""
        if not leases:
            return {}
        pairs = [item for lease in leases for item in (lease.job.job_id, lease.epoch)]
        states: list[bytes] = await self._run(RENEW, _milliseconds(lease_s), *pairs)
        return {
            lease.job.job_id: LeaseState(state.decode()) for lease, state in zip(leases, states, strict=True)
        }

    async def report(
        self,
        lease: Lease,
        *,
        message: str = "",
        level: Literal["info", "warn", "error"] = "info",
        type: Literal["message", "metrics"] = "message",
        data: Mapping[str, Any] | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> LeaseState:
        """Append an event (if there is a message or data) and replace the progress (if given), in one step.

        Returns HELD, CANCEL, STOP or PAUSE. Unlike a renewal, this does not extend the lease.
        """
        text = message[:MAX_MESSAGE_CHARS].encode(errors="replace")
        kind = type if message or data is not None else ""
        written = "" if progress is None else to_json(progress)
        state = await self._step(REPORT, lease, level, kind, text, to_json(data or {}), written)
        return LeaseState(state)

    async def checkpoint(self, lease: Lease, content: bytes | None, *, step: int | None = None) -> None:
        """Store what a later attempt continues from; None drops it. It is also dropped when the job ends.

        step: how far the job has come with it (see `reap`).
        """
        await self._step(CHECKPOINT, lease, content or b"", "" if step is None else step)

    async def load_checkpoint(self, job_id: str) -> bytes | None:
        """Return the checkpoint of the last attempt, on whichever worker; None if there is none."""
        with translate_errors():
            content = await self._redis.get(keys.job_checkpoint(job_id))
        assert content is None or isinstance(content, bytes)  # the client does not decode
        return content

    async def complete(
        self, lease: Lease, result: Mapping[str, Any], *, progress: Mapping[str, Any] | None = None
    ) -> None:
        """End the job as succeeded, even if its cancellation was requested.

        progress: replaces the last reported one. May be called again after success.
        """
        await self._step(COMPLETE, lease, to_json(result), "" if progress is None else to_json(progress))

    async def fail(
        self, lease: Lease, error: Mapping[str, Any], *, retryable: bool, ends_worker: bool = False
    ) -> JobStatus:
        """End the attempt with an error {code, message, param}, and return the new status of the job.

        retryable: true for faults of the infrastructure. The job is then queued again after a growing delay;
        after the last attempt it fails and is noted in `keys.QUEUE_DEAD`. Otherwise (bad data) the job fails
        at once. An attempt that came further than all before it counts as the first one. ends_worker: the
        worker ends because of this; it is counted in `Job.num_lost_workers`, as if it had died.
        """
        delay_ms = -1
        if retryable:
            jitter = random.uniform(1 - RETRY_JITTER, 1 + RETRY_JITTER)
            delay_ms = int(self._retry_base_s * RETRY_FACTOR ** (lease.job.attempt - 1) * jitter * 1000)
        lost = int(ends_worker)
        return JobStatus(await self._step(FAIL, lease, *_problem(error), delay_ms, self.max_attempts, lost))

    async def release(self, lease: Lease) -> None:
        """Give the job back, for a shutdown or a pause. The attempt does not count.

        The job is queued again at its old place, or paused or cancelled if its owner has requested that.
        """
        await self._step(RELEASE, lease)

    async def acknowledge_cancel(self, lease: Lease) -> None:
        """End the job as cancelled, after the work on it has stopped.

        Raises `Conflict` if nobody cancelled it.
        """
        if await self._step(ACKNOWLEDGE_CANCEL, lease) == "unasked":
            raise Conflict(f"nobody cancelled job {lease.job.job_id}", code="cancel_not_requested")

    async def reap(self, *, grace_s: float = 0.0) -> dict[str, JobStatus]:
        """Take back jobs with an expired lease, and return their new status by job id.

        Any worker may call this every few seconds. A lost worker counts as an attempt; after the last one the
        job fails as "worker_died". But an attempt that came further than all before it, by the `step` of its
        reports and checkpoints, does not count, and the earlier ones are forgotten: its worker may only have
        been starved, and a job that kills its workers does so without getting any further. This also queues
        delayed jobs that have become due, and drops expired ones from the lists.

        grace_s: a lease is lost if it is found expired twice, at least that long apart, without a renewal in
        between. After everything including the store was suspended, all leases have expired by the store's
        clock, and living workers need time to renew theirs. (The caller cannot take care of this itself: a
        call that was under way is carried out as soon as the store goes on.)
        """
        flat: list[bytes] = await self._run(
            REAP, self.max_attempts, to_json(_WORKER_DIED), int(grace_s * 1000)
        )
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return {job_id.decode(): JobStatus(status.decode()) for job_id, status in pairs if status}

    async def _fail_unreadable(self, view: JobReply, error: CorruptRecord) -> None:
        logger.error("a claimed job fails because it cannot be read: %s", error)
        job_id, flat, _ = view
        epoch = dict(zip(flat[::2], flat[1::2], strict=True))[b"epoch"]
        problem = _problem({"code": error.code, "message": error.message})
        await self._run(FAIL, job_id, epoch, secrets.token_hex(8), *problem, -1, self.max_attempts, 0)

    async def _step(self, script: Script, lease: Lease, *args: Argument) -> str:
        """Run a fenced step. Its token makes a repetition by the Redis client harmless."""
        reply: bytes = await self._run(script, lease.job.job_id, lease.epoch, secrets.token_hex(8), *args)
        if reply == b"stale":
            raise StaleLease(
                f"job {lease.job.job_id}: the lease of {lease.worker_id} (epoch {lease.epoch}) has ended"
            )
        return reply.decode()

    async def _run(self, script: Script, *args: Argument) -> Any:
        return await script(self._redis, keys=[keys.QUEUE], args=args)


def _problem(error: Mapping[str, Any]) -> tuple[str, bytes]:
    """Return the error as it is stored, and its message for the event."""
    message = str(error.get("message", ""))[:MAX_MESSAGE_CHARS]
    problem = {"code": error.get("code") or "internal_error", "message": message, "param": error.get("param")}
    return to_json(problem), message.encode(errors="replace")


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))
