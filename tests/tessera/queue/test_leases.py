"""The worker side of the training queue, on a real server: claims, leases, fences, reports, waiting."""

from __future__ import annotations

import asyncio
import time

import pytest
from redis.asyncio import Redis

from tessera.errors import Conflict, NotFound, StaleLease
from tessera.queue.client import JobQueue, JobStatus
from tessera.queue.leases import MAX_MESSAGE_CHARS, JobLeases, LeaseState
from tessera.redis import keys
from tessera.redis.client import connect
from tests.job_checks import check_queue, expire_lease, make_due, make_spec, submit_and_claim
from tests.waiting import wait_until

BROKEN = {"code": "cuda_error", "message": "the device fell off the bus", "param": None}


async def test_a_claim_leases_jobs_in_the_order_of_submission(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    jobs = [await queue.submit("acme", make_spec(f"a{i}"), cost=10) for i in range(5)]
    claimed = await leases.claim("w1", limit=3, lease_s=60)
    claimed += await leases.claim("w2", limit=3, lease_s=60)
    assert [lease.job.job_id for lease in claimed] == [job.job_id for job in jobs]
    assert [lease.worker_id for lease in claimed] == ["w1"] * 3 + ["w2"] * 2
    for lease in claimed:
        assert (lease.epoch, lease.job.epoch, lease.job.attempt) == (1, 1, 1)
        assert lease.job.status is JobStatus.RUNNING
        assert abs(lease.deadline - lease.job.started_at - 60) < 0.01
    assert await leases.claim("w1", limit=3, lease_s=60) == []
    assert await leases.claim("w1", limit=0, lease_s=60) == []
    await check_queue(redis)


async def test_workers_that_claim_together_never_share_a_job(redis: Redis) -> None:
    queue = JobQueue(redis)
    jobs = await asyncio.gather(*[queue.submit(f"t{i % 7}", make_spec(), cost=1) for i in range(100)])
    claimed = await asyncio.gather(*[JobLeases(redis).claim(f"w{i}", limit=7, lease_s=60) for i in range(20)])
    ids = [lease.job.job_id for batch in claimed for lease in batch]
    assert sorted(ids) == sorted(job.job_id for job in jobs)


async def test_renewal_tells_what_became_of_each_lease(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    for _ in range(4):
        await queue.submit("acme", make_spec(), cost=1)
    held, lost, cancelled, paused = await leases.claim("w", limit=4, lease_s=0.001)
    await leases.complete(lost, {})
    await queue.cancel("acme", cancelled.job.job_id)
    await queue.pause("acme", paused.job.job_id)
    assert await leases.renew([held, lost, cancelled, paused], lease_s=60) == {
        held.job.job_id: LeaseState.HELD,
        lost.job.job_id: LeaseState.LOST,
        cancelled.job.job_id: LeaseState.CANCEL,
        paused.job.job_id: LeaseState.PAUSE,
    }
    assert await leases.renew([], lease_s=60) == {}
    assert await leases.reap() == {}, "renewed leases have not expired"


async def test_completion_is_final_and_repeatable(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    lease = await submit_and_claim(redis)
    await leases.checkpoint(lease, b"moments")
    for _ in range(2):
        await leases.complete(lease, {"version": 3, "loss": float("inf")})
    job = await queue.get("acme", lease.job.job_id)
    assert (job.status, job.result) == (JobStatus.SUCCEEDED, {"version": 3, "loss": None})
    assert job.finished_at >= job.started_at >= job.created_at
    assert await leases.load_checkpoint(job.job_id) is None
    for step in (
        leases.fail(lease, BROKEN, retryable=True),
        leases.release(lease),
        leases.acknowledge_cancel(lease),
        leases.report(lease, message="late"),
        leases.checkpoint(lease, b"late"),
    ):
        with pytest.raises(StaleLease):
            await step
    assert await queue.get("acme", job.job_id) == job
    assert await leases.load_checkpoint(job.job_id) is None
    assert (await queue.events("acme", job.job_id))[0][0].message == "Job succeeded"
    for key in (keys.job_record(job.job_id), keys.job_events(job.job_id)):
        assert keys.JOB_TTL_S - 60 < await redis.ttl(key) <= keys.JOB_TTL_S
    await check_queue(redis)


async def test_an_older_epoch_can_do_nothing(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    stale = await submit_and_claim(redis)
    await expire_lease(redis, stale.job.job_id)
    assert await leases.reap() == {stale.job.job_id: JobStatus.QUEUED}
    with pytest.raises(StaleLease):
        await leases.complete(stale, {})
    [lease] = await JobLeases(redis).claim("w1", limit=1, lease_s=60)  # even by a worker of the same name
    assert (lease.epoch, lease.job.attempt) == (2, 2)
    await leases.checkpoint(lease, b"good")
    await queue.cancel("acme", lease.job.job_id)
    before = await queue.get("acme", lease.job.job_id)
    for step in (
        leases.complete(stale, {}),
        leases.fail(stale, BROKEN, retryable=True),
        leases.fail(stale, BROKEN, retryable=False),
        leases.release(stale),
        leases.acknowledge_cancel(stale),
        leases.report(stale, message="x", progress={"step": 1}),
        leases.checkpoint(stale, b"bad"),
        leases.checkpoint(stale, None),
    ):
        with pytest.raises(StaleLease):
            await step
    assert await leases.renew([stale], lease_s=60) == {lease.job.job_id: LeaseState.LOST}
    assert await queue.get("acme", lease.job.job_id) == before
    assert await leases.load_checkpoint(lease.job.job_id) == b"good"
    await leases.complete(lease, {"version": 1})
    with pytest.raises(StaleLease):  # only the epoch that completed the job may repeat the completion
        await leases.complete(stale, {"version": 2})
    assert (await queue.get("acme", lease.job.job_id)).result == {"version": 1}


async def test_reports_set_progress_and_append_events(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    lease = await submit_and_claim(redis)
    assert await leases.report(lease, progress={"step": 1, "loss": float("nan")}) is LeaseState.HELD
    await leases.report(lease, message="x\ud83d" * 5000, level="warn", data={"step": 1})
    await leases.report(lease, type="metrics", data={"loss": 0.5})
    job = await queue.get("acme", lease.job.job_id)
    assert job.progress == {"step": 1, "loss": None}
    metrics, warning, *_ = (await queue.events("acme", job.job_id))[0]
    assert (metrics.type, metrics.message, metrics.data) == ("metrics", "", {"loss": 0.5})
    assert (warning.type, warning.level, warning.data) == ("message", "warn", {"step": 1})
    assert len(warning.message) == MAX_MESSAGE_CHARS


async def test_a_released_job_is_the_first_again_and_no_attempt_is_counted(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    for tenant in ("acme", "whale"):
        for _ in range(3):
            await queue.submit(tenant, make_spec(), cost=10**6 if tenant == "acme" else 1)
    [lease] = await leases.claim("w1", limit=1, lease_s=60)
    assert lease.job.tenant == "acme"
    await leases.checkpoint(lease, b"state")
    await leases.release(lease)
    await check_queue(redis)
    again = await leases.claim("w2", limit=2, lease_s=60)
    lease_again = next(claimed for claimed in again if claimed.job.tenant == "acme")
    assert lease_again.job.job_id == lease.job.job_id, "its charge came back with it"
    assert (lease_again.job.attempt, lease_again.epoch) == (1, 2)
    assert await leases.load_checkpoint(lease.job.job_id) == b"state"


async def test_release_pauses_or_cancels_if_that_was_asked_for(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    for _ in range(2):
        await queue.submit("acme", make_spec(), cost=1)
    paused, cancelled = await leases.claim("w", limit=2, lease_s=60)
    await queue.pause("acme", paused.job.job_id)
    await queue.cancel("acme", cancelled.job.job_id)
    await leases.checkpoint(paused, b"half way")
    for lease in (paused, cancelled):
        await leases.release(lease)
    job = await queue.get("acme", paused.job.job_id)
    assert (job.status, job.pause_requested) == (JobStatus.PAUSED, False)
    assert (await queue.get("acme", cancelled.job.job_id)).status is JobStatus.CANCELLED
    await check_queue(redis)
    await queue.resume("acme", paused.job.job_id)
    [lease] = await leases.claim("w", limit=2, lease_s=60)
    assert (lease.epoch, lease.job.attempt) == (2, 1)
    assert await leases.load_checkpoint(lease.job.job_id) == b"half way"


async def test_a_cancellation_is_acknowledged_once_it_was_asked_for(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    lease = await submit_and_claim(redis)
    with pytest.raises(Conflict) as caught:
        await leases.acknowledge_cancel(lease)
    assert caught.value.code == "cancel_not_requested"
    await queue.cancel("acme", lease.job.job_id)
    await leases.acknowledge_cancel(lease)
    job = await queue.get("acme", lease.job.job_id)
    assert (job.status, job.cancel_requested) == (JobStatus.CANCELLED, False)
    await check_queue(redis)


async def test_the_first_end_of_a_job_wins_over_its_cancellation(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    lease = await submit_and_claim(redis)
    await queue.cancel("acme", lease.job.job_id)
    await leases.complete(lease, {"version": 1})
    assert (await queue.get("acme", lease.job.job_id)).status is JobStatus.SUCCEEDED
    with pytest.raises(StaleLease):
        await leases.acknowledge_cancel(lease)

    lease = await submit_and_claim(redis)
    await queue.cancel("acme", lease.job.job_id)
    await leases.fail(lease, BROKEN, retryable=True)
    assert (await queue.get("acme", lease.job.job_id)).status is JobStatus.CANCELLED, "never tried again"
    await check_queue(redis)


async def test_a_scheduled_job_waits_for_its_time(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    job = await queue.submit("acme", make_spec(), cost=1, not_before=time.time() + 3600)
    assert job.not_before > time.time() + 3000
    assert await leases.claim("w", limit=1, lease_s=60) == []
    assert not await leases.wait_for_work(0)
    await make_due(redis, job.job_id)
    assert await leases.reap() == {}
    assert (await queue.get("acme", job.job_id)).queue_position == 1
    assert len(await leases.claim("w", limit=1, lease_s=60)) == 1
    past = await queue.submit("acme", make_spec(), cost=1, not_before=time.time() - 3600)
    assert (past.queue_position, past.not_before) == (1, None)


async def test_a_submission_wakes_a_waiting_worker(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)

    async def is_blocked() -> bool:
        return (await redis.info("clients"))["blocked_clients"] == 1

    async def is_woken_by_the_bell() -> bool:
        waiter = asyncio.create_task(leases.wait_for_work(60))
        await wait_until(is_blocked)
        await queue.submit("acme", make_spec(), cost=1)
        assert await waiter
        was_rung = (
            await redis.llen(keys.QUEUE_DOORBELL) == 0
        )  # a mere check of the queue would leave the entry
        assert len(await leases.claim("w", limit=5, lease_s=60)) == 1
        return was_rung

    await queue.submit("acme", make_spec(), cost=1)
    assert await redis.llen(keys.QUEUE_DOORBELL) == 1
    await leases.claim("w", limit=5, lease_s=60)
    # A submission between two blocking reads is found by a check of the queue, so one round may prove
    # nothing.
    await wait_until(is_woken_by_the_bell)


async def test_waiting_ends_after_its_time_out_and_leaves_no_old_rings(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    for _ in range(100):
        await queue.submit("acme", make_spec(), cost=1)
    assert await redis.llen(keys.QUEUE_DOORBELL) <= 64
    assert await leases.wait_for_work(0)
    assert len(await leases.claim("w", limit=100, lease_s=60)) == 64
    assert not await leases.wait_for_work(0.05)
    short = connect(f"unix://{redis.get_connection_kwargs()['path']}", timeout_s=0.2)
    assert not await JobLeases(short).wait_for_work(0.5), "reads shorter than the client's own time-out"
    await short.aclose()


async def test_finished_jobs_leave_the_lists_after_their_lifetime(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    old, young = await submit_and_claim(redis), await submit_and_claim(redis)
    for lease in (old, young):
        await leases.complete(lease, {})
    member = f"acme {old.job.job_id}"
    await redis.zadd(keys.QUEUE_FINISHED, {member: int((time.time() - keys.JOB_TTL_S - 60) * 1000)})
    await redis.delete(keys.job_record(old.job.job_id), keys.job_events(old.job.job_id))
    await leases.reap()
    assert await redis.zrange(keys.job_index("acme"), 0, -1) == [young.job.job_id.encode()]
    assert await redis.zcard(keys.QUEUE_FINISHED) == 1
    with pytest.raises(NotFound):
        await queue.get("acme", old.job.job_id)
