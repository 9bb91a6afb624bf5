"""The client side of the training queue, on a real server: submission, lists, commands, statistics."""

from __future__ import annotations

import asyncio
import json
import math
import time

import pytest
from redis.asyncio import Redis

from tessera.errors import Conflict, CorruptRecord, InvalidInput, NotFound, StoreUnavailable
from tessera.queue.client import Job, JobQueue, JobSpec, JobStatus
from tessera.queue.leases import JobLeases, LeaseState
from tessera.redis import keys
from tessera.redis.client import connect
from tests.job_checks import check_queue, make_due, make_spec


async def messages(queue: JobQueue, job: Job) -> list[str]:
    events, _ = await queue.events(job.tenant, job.job_id, limit=100)
    return [event.message for event in reversed(events)]


async def test_a_submitted_job_is_queued_and_reads_back(redis: Redis) -> None:
    queue = JobQueue(redis)
    spec = make_spec(
        hyperparameters={"n_epochs": 3, "learning_rate_multiplier": "auto"},
        metadata={"note": "für Ada \ud83d"},  # a lone surrogate, as JSON can carry it
        basis_id="b1",
    )
    job = await queue.submit("acme", spec, cost=1200)
    assert job.job_id.startswith("ftjob-")
    assert (job.tenant, job.spec, job.status, job.cost) == ("acme", spec, JobStatus.QUEUED, 1200)
    assert (job.attempt, job.epoch, job.queue_position) == (0, 0, 1)
    assert (job.started_at, job.finished_at, job.result, job.error, job.progress) == (None,) * 4 + ({},)
    assert abs(job.created_at - time.time()) < 60
    assert await queue.get("acme", job.job_id) == job
    assert await messages(queue, job) == ["Job queued"]
    await check_queue(redis)


async def test_another_tenants_job_does_not_exist(redis: Redis) -> None:
    queue = JobQueue(redis)
    job = await queue.submit("acme", make_spec(), cost=1)
    for call in (queue.get, queue.events, queue.cancel, queue.pause, queue.resume, queue.stop):
        for tenant, job_id in (("evil", job.job_id), ("acme", "ftjob-none"), ("acme", "")):
            with pytest.raises(NotFound) as caught:
                await call(tenant, job_id)
            assert caught.value.code == "job_not_found"
    assert await queue.list("evil") == ([], False)
    assert await queue.get("acme", job.job_id) == job


async def test_a_dedupe_key_names_one_job_per_tenant(redis: Redis) -> None:
    queue = JobQueue(redis)
    jobs = await asyncio.gather(
        *[queue.submit("acme", make_spec(), cost=5, dedupe_key="k") for _ in range(10)]
    )
    assert len({job.job_id for job in jobs}) == 1
    assert (await queue.submit("other", make_spec(), cost=5, dedupe_key="k")).job_id != jobs[0].job_id
    assert (await queue.submit("acme", make_spec(), cost=5, dedupe_key="k2")).job_id != jobs[0].job_id
    plain = [await queue.submit("acme", make_spec(), cost=5) for _ in range(2)]
    assert plain[0].job_id != plain[1].job_id
    assert (await queue.stats()).backlog_cost == 25

    await queue.cancel("acme", jobs[0].job_id)
    again = await queue.submit("acme", make_spec(), cost=5, dedupe_key="k")
    assert (again.job_id, again.status) == (jobs[0].job_id, JobStatus.CANCELLED)
    lifetimes = [await redis.ttl(key) async for key in redis.scan_iter(match=keys.job_dedupe("*"))]
    assert all(0 < lifetime <= keys.IDEMPOTENCY_TTL_S for lifetime in lifetimes)
    assert max(lifetimes) > keys.IDEMPOTENCY_TTL_S - 600


async def test_lists_are_newest_first_and_paged_by_job_id(redis: Redis) -> None:
    queue = JobQueue(redis)
    submitted = [(await queue.submit("acme", make_spec(f"a{i}"), cost=1)).job_id for i in range(7)]
    await queue.submit("other", make_spec(), cost=1)
    assert submitted == sorted(submitted)

    pages, after = [], None
    while True:
        page, has_more = await queue.list("acme", after=after, limit=3)
        pages.append([job.job_id for job in page])
        if not has_more:
            break
        after = page[-1].job_id
    newest_first = submitted[::-1]
    assert pages == [newest_first[:3], newest_first[3:6], newest_first[6:]]

    # The job of a cursor may have expired, and expired records leave no holes in a page.
    await redis.delete(*[keys.job_record(job_id) for job_id in newest_first[1:4]])
    page, has_more = await queue.list("acme", after=newest_first[1], limit=2)
    assert ([job.job_id for job in page], has_more) == (newest_first[4:6], True)
    assert await queue.list("acme", after="ftjob-0") == ([], False)


async def test_job_ids_rise_even_if_the_servers_clock_goes_back(redis: Redis) -> None:
    queue = JobQueue(redis)
    await redis.set(keys.QUEUE_SEQUENCE, int((time.time() + 3600) * 1e6))
    ids = [(await queue.submit("acme", make_spec(), cost=1)).job_id for _ in range(3)]
    assert [int(job_id[6:19], 16) - int(ids[0][6:19], 16) for job_id in ids] == [0, 1, 2]
    assert [job.job_id for job in (await queue.list("acme"))[0]] == ids[::-1]


async def test_one_damaged_record_does_not_hide_the_others(redis: Redis) -> None:
    queue = JobQueue(redis)
    good = await queue.submit("acme", make_spec(), cost=1)
    bad = await queue.submit("acme", make_spec(), cost=1)
    await redis.hset(keys.job_record(bad.job_id), "spec", "{")
    with pytest.raises(CorruptRecord):
        await queue.get("acme", bad.job_id)
    assert [job.job_id for job in (await queue.list("acme"))[0]] == [good.job_id]


async def test_records_of_other_releases_can_be_read(redis: Redis) -> None:
    queue = JobQueue(redis)
    job = await queue.submit("acme", make_spec(), cost=1)
    newer = {**json.loads(job.spec.to_json()), "from_the_future": 1}
    await redis.hset(keys.job_record(job.job_id), mapping={"spec": json.dumps(newer), "new_field": "x"})
    assert (await queue.get("acme", job.job_id)).spec == job.spec
    older = {"adapter_id": "ada", "training_file": "file-1", "base_model": "tiny"}
    await redis.hset(keys.job_record(job.job_id), "spec", json.dumps(older))
    assert (await queue.get("acme", job.job_id)).spec == JobSpec(**older)


async def test_event_ids_rise_and_page_backwards(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    job = await queue.submit("acme", make_spec(), cost=1)
    [lease] = await leases.claim("w", limit=1, lease_s=60)
    for step in range(5):
        metrics = {"loss": math.nan, "step": step}
        await leases.report(lease, message=f"Step {step}", type="metrics", data=metrics)
    seen, after, has_more = [], None, True
    while has_more:
        page, has_more = await queue.events("acme", job.job_id, after=after, limit=3)
        seen += page
        after = page[-1].event_id
    assert [event.message for event in seen[::-1]] == [
        "Job queued",
        "Training started (attempt 1)",
        *[f"Step {step}" for step in range(5)],
    ]
    times = [tuple(int(part) for part in event.event_id.split("-")) for event in seen]
    assert times == sorted(times, reverse=True)
    assert (seen[0].type, seen[0].level, seen[0].data) == ("metrics", "info", {"loss": None, "step": 4})
    assert await queue.events("acme", job.job_id, after=seen[-1].event_id) == ([], False)
    for bad in ("x", "", "1", "1-2-3", "-", "9" * 40 + "-0"):
        with pytest.raises(InvalidInput) as caught:
            await queue.events("acme", job.job_id, after=bad)
        assert caught.value.param == "after"


async def test_only_the_newest_events_are_kept(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    job = await queue.submit("acme", make_spec(), cost=1)
    [lease] = await leases.claim("w", limit=1, lease_s=60)
    async with redis.pipeline(transaction=False) as pipeline:
        for _ in range(2 * keys.MAX_JOB_EVENTS):
            pipeline.xadd(keys.job_events(job.job_id), {"level": "info"})
        await pipeline.execute()
    await leases.report(lease, message="last")
    assert await redis.xlen(keys.job_events(job.job_id)) < 1.2 * keys.MAX_JOB_EVENTS
    assert (await queue.events("acme", job.job_id, limit=1))[0][0].message == "last"


@pytest.mark.parametrize("state", ["queued", "delayed", "paused"])
async def test_cancelling_a_job_without_a_worker_is_immediate(redis: Redis, state: str) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    not_before = time.time() + 3600 if state == "delayed" else None
    job = await queue.submit("acme", make_spec(), cost=9, not_before=not_before)
    if state == "paused":
        await queue.pause("acme", job.job_id)
    cancelled = await queue.cancel("acme", job.job_id)
    assert (cancelled.status, cancelled.queue_position) == (JobStatus.CANCELLED, None)
    assert cancelled.finished_at is not None
    assert (await messages(queue, job))[-1] == "Job cancelled"
    assert await leases.claim("w", limit=5, lease_s=60) == []
    assert (await queue.stats()).jobs[JobStatus.CANCELLED] == 1
    assert (await queue.stats()).backlog_cost == 0
    await check_queue(redis)


async def test_a_finished_job_refuses_every_command(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    job = await queue.submit("acme", make_spec(), cost=1)
    [lease] = await leases.claim("w", limit=1, lease_s=60)
    await leases.complete(lease, {})
    for command, code in (
        (queue.cancel, "job_not_cancellable"),
        (queue.pause, "job_not_pausable"),
        (queue.resume, "job_not_resumable"),
    ):
        with pytest.raises(Conflict, match="it is succeeded") as caught:
            await command("acme", job.job_id)
        assert caught.value.code == code
    assert (await messages(queue, job))[-1] == "Job succeeded"


async def test_a_job_cancelled_twice_says_that_it_is_cancelled(redis: Redis) -> None:
    queue = JobQueue(redis)
    job = await queue.submit("acme", make_spec(), cost=1)
    await queue.cancel("acme", job.job_id)
    with pytest.raises(Conflict, match="it is cancelled"):
        await queue.cancel("acme", job.job_id)


async def test_a_job_resumed_after_its_time_is_claimable(redis: Redis) -> None:
    queue = JobQueue(redis)
    job = await queue.submit("acme", make_spec(), cost=1, not_before=time.time() + 3600)
    await queue.pause("acme", job.job_id)
    await redis.hset(keys.job_record(job.job_id), "due_ms", 1)
    resumed = await queue.resume("acme", job.job_id)
    assert (resumed.queue_position, resumed.not_before) == (1, None)


@pytest.mark.parametrize("delayed", [False, True])
async def test_pause_and_resume_without_a_worker(redis: Redis, delayed: bool) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    not_before = time.time() + 3600 if delayed else None
    first = await queue.submit("acme", make_spec("first"), cost=1, not_before=not_before)
    second = await queue.submit("acme", make_spec("second"), cost=1)
    for _ in range(2):  # a repetition changes nothing
        assert (await queue.pause("acme", first.job_id)).status is JobStatus.PAUSED
    [lease] = await leases.claim("w", limit=5, lease_s=60)
    assert lease.job.job_id == second.job_id
    assert (await queue.stats()).jobs[JobStatus.PAUSED] == 1

    third = await queue.submit("acme", make_spec("third"), cost=1)
    for _ in range(2):
        resumed = await queue.resume("acme", first.job_id)
        assert resumed.status is JobStatus.QUEUED
        assert resumed.queue_position == (None if delayed else 1), "its old place, before the third"
    await check_queue(redis)
    if delayed:
        await make_due(redis, first.job_id)
    claimed = await leases.claim("w", limit=5, lease_s=60)
    assert [lease.job.job_id for lease in claimed] == [first.job_id, third.job_id]
    assert await messages(queue, first) == [
        "Job queued",
        "Job paused",
        "Job resumed",
        "Training started (attempt 1)",
    ]


async def test_commands_on_a_running_job_reach_its_worker(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    job = await queue.submit("acme", make_spec(), cost=1)
    [lease] = await leases.claim("w", limit=1, lease_s=60)

    paused = await queue.pause("acme", job.job_id)
    assert (paused.status, paused.pause_requested) == (JobStatus.RUNNING, True)
    assert await leases.renew([lease], lease_s=60) == {job.job_id: LeaseState.PAUSE}
    resumed = await queue.resume("acme", job.job_id)
    assert (resumed.status, resumed.pause_requested) == (JobStatus.RUNNING, False)
    assert await leases.renew([lease], lease_s=60) == {job.job_id: LeaseState.HELD}

    await queue.pause("acme", job.job_id)
    for _ in range(2):
        cancelled = await queue.cancel("acme", job.job_id)
        assert (cancelled.status, cancelled.cancel_requested) == (JobStatus.RUNNING, True)
    assert await leases.report(lease, message="still here") is LeaseState.CANCEL
    with pytest.raises(Conflict, match="being cancelled"):
        await queue.pause("acme", job.job_id)
    assert (await messages(queue, job)).count("Cancellation requested") == 1
    await check_queue(redis)


async def test_stats_count_jobs_by_state(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    empty = await queue.stats()
    assert set(empty.jobs) == set(JobStatus)
    assert (sum(empty.jobs.values()), empty.delayed, empty.oldest_queued_s, empty.backlog_cost) == (0,) * 4
    jobs = [await queue.submit("acme", make_spec(), cost=10) for _ in range(5)]
    await queue.submit("acme", make_spec(), cost=7, not_before=time.time() + 3600)
    first, second = await leases.claim("w", limit=2, lease_s=60)
    await leases.complete(first, {})
    await leases.fail(second, {"code": "x", "message": "y"}, retryable=False)
    await leases.claim("w", limit=1, lease_s=60)
    await queue.pause("acme", jobs[3].job_id)
    await redis.zadd(keys.QUEUE_WAITING, {jobs[4].job_id: int(time.time() * 1000) - 90_000})
    stats = await queue.stats()
    assert stats.jobs == {
        JobStatus.QUEUED: 2,
        JobStatus.RUNNING: 1,
        JobStatus.PAUSED: 1,
        JobStatus.SUCCEEDED: 1,
        JobStatus.FAILED: 1,
        JobStatus.CANCELLED: 0,
    }
    assert (stats.delayed, stats.backlog_cost) == (1, 17)
    assert 90 <= stats.oldest_queued_s < 90 + 60


async def test_every_key_carries_the_queues_hash_tag(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    await queue.submit("acme", make_spec(), cost=1, not_before=time.time() + 3600)
    for _ in range(3):
        await queue.submit("acme", make_spec(), cost=1)
    _, second = await leases.claim("w", limit=2, lease_s=60)
    await leases.complete(second, {})
    found = [key async for key in redis.scan_iter(count=1000)]
    assert len(found) > 10
    assert all(key.startswith(keys.QUEUE.encode() + b":") for key in found)


async def test_resp2_replies_are_understood(redis: Redis, redis_url: str) -> None:
    client = connect(f"{redis_url}?protocol=2")
    queue, leases = JobQueue(client), JobLeases(client)
    job = await queue.submit("acme", make_spec(), cost=1)
    assert await queue.get("acme", job.job_id) == job
    assert await leases.wait_for_work(0)
    [lease] = await leases.claim("w", limit=1, lease_s=60)
    await leases.complete(lease, {"version": 1})
    assert len((await queue.events("acme", job.job_id))[0]) == 3
    assert (await queue.stats()).jobs[JobStatus.SUCCEEDED] == 1
    await client.aclose()


async def test_a_store_that_does_not_answer_is_unavailable() -> None:
    client = connect("unix:///nonexistent/socket", timeout_s=0.2)
    with pytest.raises(StoreUnavailable):
        await JobQueue(client).submit("acme", make_spec(), cost=1)
    for call in (JobLeases(client).wait_for_work(1), JobLeases(client).load_checkpoint("x")):
        with pytest.raises(StoreUnavailable):
            await call
    await client.aclose()
