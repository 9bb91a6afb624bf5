"""The training queue when things go wrong: failed attempts, lost workers, damaged records, lost replies."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tessera.errors import StoreFull
from tessera.queue.client import JobQueue, JobStatus
from tessera.queue.leases import JobLeases, Lease, LeaseState
from tessera.redis import keys
from tessera.redis.client import connect
from tests.job_checks import check_queue, expire_lease, make_due, make_spec, submit_and_claim
from tests.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[3]
BROKEN = {"code": "cuda_error", "message": "the device fell off the bus", "param": None}


async def test_faults_of_the_infrastructure_are_tried_again_with_growing_delays(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis, retry_base_s=1000)
    lease = await submit_and_claim(redis)
    job_id = lease.job.job_id
    for attempt, base_s in ((1, 1000), (2, 4000)):
        await leases.fail(lease, BROKEN, retryable=True)
        job = await queue.get("acme", job_id)
        assert (job.status, job.attempt, job.queue_position) == (JobStatus.QUEUED, attempt, None)
        assert 0.7 * base_s < job.not_before - time.time() < 1.3 * base_s
        await check_queue(redis)
        assert await leases.claim("w", limit=1, lease_s=60) == []
        await make_due(redis, job_id)
        [lease] = await leases.claim("w", limit=1, lease_s=60)
        assert (lease.job.attempt, lease.job.not_before) == (attempt + 1, None)
    await leases.fail(lease, BROKEN, retryable=True)
    job = await queue.get("acme", job_id)
    assert (job.status, job.error) == (JobStatus.FAILED, BROKEN)
    [(_, dead)] = await redis.xrange(keys.QUEUE_DEAD)
    assert (dead[b"job"], dead[b"tenant"], dead[b"attempt"]) == (job_id.encode(), b"acme", b"3")
    assert [event.message for event in reversed((await queue.events("acme", job_id))[0])] == [
        "Job queued",
        "Training started (attempt 1)",
        "Attempt 1 of 3 failed: the device fell off the bus",
        "Training started (attempt 2)",
        "Attempt 2 of 3 failed: the device fell off the bus",
        "Training started (attempt 3)",
        "Job failed after 3 attempts: the device fell off the bus",
    ]
    await check_queue(redis)


async def test_a_retry_comes_back_by_itself(redis: Redis) -> None:
    leases = JobLeases(redis, retry_base_s=0.05)
    lease = await submit_and_claim(redis)
    await leases.fail(lease, BROKEN, retryable=True)
    assert await leases.wait_for_work(20)
    [again] = await leases.claim("w", limit=1, lease_s=60)
    assert again.job.attempt == 2


async def test_bad_data_is_not_tried_again(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    lease = await submit_and_claim(redis)
    problem = {"code": "no_loss_tokens", "message": "nothing to learn", "param": "training_file"}
    await leases.fail(lease, problem, retryable=False)
    job = await queue.get("acme", lease.job.job_id)
    assert job.status is JobStatus.FAILED
    assert job.error == problem
    assert await redis.xlen(keys.QUEUE_DEAD) == 0
    await check_queue(redis)


@pytest.mark.parametrize(
    ("command", "status"), [("cancel", JobStatus.CANCELLED), ("pause", JobStatus.PAUSED)]
)
async def test_a_command_outlives_its_worker(redis: Redis, command: str, status: JobStatus) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    lease = await submit_and_claim(redis)
    await getattr(queue, command)("acme", lease.job.job_id)
    await expire_lease(redis, lease.job.job_id)
    assert await leases.reap() == {lease.job.job_id: status}
    assert (await queue.get("acme", lease.job.job_id)).status is status
    await check_queue(redis)


async def lose_worker(redis: Redis, lease: Lease) -> Lease:
    """Return the next lease on a job after its worker was lost."""
    leases = JobLeases(redis)
    await expire_lease(redis, lease.job.job_id)
    assert await leases.reap() == {lease.job.job_id: JobStatus.QUEUED}
    [again] = await leases.claim("w", limit=1, lease_s=60)
    return again


async def test_an_expired_lease_is_lost_only_when_a_second_look_finds_no_renewal(redis: Redis) -> None:
    """After everything was suspended, the store too, all leases have expired but every worker lives."""
    leases = JobLeases(redis)
    lease = await submit_and_claim(redis)
    job_id = lease.job.job_id
    for _ in range(3):
        await expire_lease(redis, job_id)
        assert await leases.reap(grace_s=1000) == {}
        assert await leases.renew([lease], lease_s=60) == {job_id: LeaseState.HELD}
        assert await redis.hget(keys.job_record(job_id), "overdue_ms") is None, "it begins anew"
    await expire_lease(redis, job_id)
    assert await leases.reap(grace_s=1000) == {}
    await redis.hincrby(keys.job_record(job_id), "overdue_ms", -1000_000)
    assert await leases.reap(grace_s=1000) == {job_id: JobStatus.QUEUED}
    await check_queue(redis)


@pytest.mark.parametrize("by", ["report", "checkpoint"])
async def test_a_worker_that_was_lost_on_its_way_forward_costs_no_attempt(redis: Redis, by: str) -> None:
    """A starved worker looks like a dead one. Either way, a job that gets further each time ends at last."""
    leases = JobLeases(redis)
    lease = await lose_worker(redis, await submit_and_claim(redis))
    assert lease.job.attempt == 2, "it had done nothing"
    for step in range(10):
        if by == "report":
            await leases.report(lease, progress={"step": step})
        else:
            await leases.checkpoint(lease, b"state", step=step)
        lease = await lose_worker(redis, lease)
        assert (lease.job.attempt, lease.job.epoch) == (1, step + 3)
    await check_queue(redis)


async def test_a_job_that_gets_no_further_is_given_up_on(redis: Redis) -> None:
    """It resumes from its checkpoint and dies at the same place: reaching the same step is no progress."""
    queue, leases = JobQueue(redis), JobLeases(redis)
    lease = await submit_and_claim(redis)
    for attempt in (1, 1, 2, 3):
        assert lease.job.attempt == attempt
        await leases.checkpoint(lease, b"state", step=5)
        await leases.report(lease, progress={"step": 7})
        if attempt < 3:
            lease = await lose_worker(redis, lease)
    await expire_lease(redis, lease.job.job_id)
    assert await leases.reap() == {lease.job.job_id: JobStatus.FAILED}
    assert (await queue.get("acme", lease.job.job_id)).error["code"] == "worker_died"


async def test_a_failure_after_progress_counts_as_the_first(redis: Redis) -> None:
    leases = JobLeases(redis, retry_base_s=0.0)
    lease = await submit_and_claim(redis)
    for step in range(5):
        await leases.report(lease, progress={"step": step})
        assert await leases.fail(lease, BROKEN, retryable=True) is JobStatus.QUEUED
        await leases.reap()
        [lease] = await leases.claim("w", limit=1, lease_s=60)
        assert lease.job.attempt == 2
    assert await leases.fail(lease, BROKEN, retryable=True) is JobStatus.QUEUED
    await leases.reap()
    [lease] = await leases.claim("w", limit=1, lease_s=60)
    assert await leases.fail(lease, BROKEN, retryable=True) is JobStatus.FAILED
    await check_queue(redis)


async def test_a_job_that_kills_its_workers_is_given_up_on(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    lease = await submit_and_claim(redis)
    other = await queue.submit("acme", make_spec(), cost=1)
    for _ in range(2):
        await expire_lease(redis, lease.job.job_id)
        assert await leases.reap() == {lease.job.job_id: JobStatus.QUEUED}
        [lease] = await leases.claim("w", limit=1, lease_s=60)
    await expire_lease(redis, lease.job.job_id)
    assert await leases.reap() == {lease.job.job_id: JobStatus.FAILED}
    assert await leases.reap() == {}
    job = await queue.get("acme", lease.job.job_id)
    assert (job.status, job.attempt, job.error["code"]) == (JobStatus.FAILED, 3, "worker_died")
    assert await redis.xlen(keys.QUEUE_DEAD) == 1
    [survivor] = await leases.claim("w", limit=5, lease_s=60)
    assert survivor.job.job_id == other.job_id
    await check_queue(redis)


async def test_a_cancelled_job_is_cancelled_even_if_its_last_attempt_fails(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis, max_attempts=1)
    for lose in (lambda lease: leases.fail(lease, BROKEN, retryable=True), lambda lease: leases.reap()):
        lease = await submit_and_claim(redis)
        await queue.cancel("acme", lease.job.job_id)
        await expire_lease(redis, lease.job.job_id)
        await lose(lease)
        assert (await queue.get("acme", lease.job.job_id)).status is JobStatus.CANCELLED
    assert await redis.xlen(keys.QUEUE_DEAD) == 0


async def test_a_damaged_or_missing_record_does_not_stop_the_queue(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    missing = await queue.submit("acme", make_spec(), cost=1)
    damaged = await queue.submit("acme", make_spec(), cost=1)
    gone = await queue.submit("other", make_spec(), cost=1, not_before=time.time() + 3600)
    good = await queue.submit("acme", make_spec(), cost=1)
    await redis.delete(keys.job_record(missing.job_id), keys.job_record(gone.job_id))
    await redis.hset(keys.job_record(damaged.job_id), "spec", "[]")
    await make_due(redis, gone.job_id)
    claimed = await leases.claim("w", limit=5, lease_s=60)
    assert [lease.job.job_id for lease in claimed] == [good.job_id]
    assert await redis.hget(keys.job_record(damaged.job_id), "status") == b"failed"
    await redis.delete(keys.job_record(good.job_id))
    await expire_lease(redis, good.job_id)
    assert await leases.reap() == {}
    assert await redis.zcard(keys.QUEUE_LEASES) == 0


async def test_a_full_store_leaves_nothing_half_done(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    names = [(await queue.submit("acme", make_spec(), cost=1)).job_id for _ in range(9)]
    done, failed, retried, released, cancelled, lost, held = await leases.claim("w", limit=7, lease_s=60)
    await queue.cancel("acme", cancelled.job.job_id)
    await expire_lease(redis, lost.job.job_id)
    steps = [
        lambda: queue.submit("acme", make_spec(), cost=1),
        lambda: queue.cancel("acme", names[7]),
        lambda: queue.pause("acme", names[8]),
        lambda: leases.claim("w", limit=9, lease_s=60),
        lambda: leases.report(held, message="x"),
        lambda: leases.renew([held], lease_s=60),
        lambda: leases.complete(done, {}),
        lambda: leases.fail(failed, BROKEN, retryable=False),
        lambda: leases.fail(retried, BROKEN, retryable=True),
        lambda: leases.release(released),
        lambda: leases.acknowledge_cancel(cancelled),
        lambda: leases.reap(),
    ]
    refused = 0
    await redis.config_set("maxmemory", 1)
    try:
        for step in steps:
            try:
                await step()
            except StoreFull:
                refused += 1
    finally:
        await redis.config_set("maxmemory", 0)
    assert refused
    await check_queue(redis)
    await leases.complete(done, {})
    await check_queue(redis)


WORKER = """
import asyncio, sys
from tessera.processes.child_process import end_with_parent
from tessera.queue.leases import JobLeases
from tessera.redis.client import connect

async def main():
    end_with_parent()
    leases = JobLeases(connect(sys.argv[1]))
    [lease] = await leases.claim("doomed", limit=1, lease_s=0.3)
    await leases.checkpoint(lease, b"step 7")
    print(lease.job.job_id, flush=True)
    while True:
        await leases.renew([lease], lease_s=0.3)
        await asyncio.sleep(0.05)

asyncio.run(main())
"""


async def test_a_killed_workers_job_goes_on_from_its_checkpoint(redis: Redis, redis_url: str) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    job = await queue.submit("acme", make_spec(), cost=1)
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, redis_url, stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY
    )
    try:
        assert (await worker.stdout.readline()).decode().strip() == job.job_id
    finally:
        worker.kill()
        await worker.wait()
    assert await wait_until(leases.reap) == {job.job_id: JobStatus.QUEUED}
    [lease] = await leases.claim("w", limit=1, lease_s=60)
    assert (lease.epoch, lease.job.attempt) == (2, 2)
    assert await leases.load_checkpoint(job.job_id) == b"step 7"
    await leases.complete(lease, {"version": 1})
    assert (await queue.get("acme", job.job_id)).status is JobStatus.SUCCEEDED


class CuttingProxy:
    """A proxy that can lose one reply: the server has done the work, but the client's connection breaks."""

    def __init__(self, server_path: str) -> None:
        self._server_path = server_path
        self.loses_next_reply = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(self._server_path)

        async def send_on() -> None:
            while data := await reader.read(65536):
                to_server.write(data)
            to_server.close()

        sending = asyncio.create_task(send_on())
        with contextlib.suppress(ConnectionError):
            while data := await from_server.read(65536):
                if self.loses_next_reply:
                    self.loses_next_reply = False
                    break
                writer.write(data)
        sending.cancel()
        for stream in (writer, to_server):
            stream.close()


@pytest.fixture
async def proxied(redis: Redis, tmp_path: Path) -> AsyncIterator[tuple[Redis, CuttingProxy]]:
    proxy = CuttingProxy(redis.get_connection_kwargs()["path"])
    server = await asyncio.start_unix_server(proxy.serve, tmp_path / "proxy")
    client = connect(f"unix://{tmp_path / 'proxy'}")
    yield client, proxy
    await client.aclose()
    server.close()
    await server.wait_closed()


async def test_a_step_whose_reply_is_lost_is_done_once(
    proxied: tuple[Redis, CuttingProxy], redis: Redis
) -> None:
    client, proxy = proxied
    queue, leases = JobQueue(client), JobLeases(client)

    async def with_lost_reply(call: Any) -> Any:
        proxy.loses_next_reply = True
        result = await call
        assert not proxy.loses_next_reply, "the reply was not lost"
        return result

    # The first call of each script loads it, so that the server knows all before replies are lost.
    for lose in (lambda call: call, with_lost_reply):
        await redis.flushall()
        job = await lose(queue.submit("acme", make_spec(), cost=10))
        assert len((await queue.list("acme"))[0]) == 1
        await lose(queue.pause("acme", job.job_id))
        await lose(queue.resume("acme", job.job_id))
        [lease] = await lose(leases.claim("w", limit=5, lease_s=60))
        assert (lease.epoch, lease.job.attempt) == (1, 1)
        await lose(leases.report(lease, message="once", progress={}))
        await lose(leases.checkpoint(lease, b"x"))
        await lose(leases.release(lease))
        [lease] = await leases.claim("w", limit=5, lease_s=60)
        await lose(leases.fail(lease, BROKEN, retryable=True))
        await make_due(redis, job.job_id)
        [lease] = await leases.claim("w", limit=5, lease_s=60)
        await lose(queue.cancel("acme", job.job_id))
        await lose(leases.acknowledge_cancel(lease))

        second = await queue.submit("acme", make_spec(), cost=10)
        [lease] = await leases.claim("w", limit=5, lease_s=60)
        await lose(leases.complete(lease, {}))
        third = await queue.submit("acme", make_spec(), cost=10)
        await lose(queue.cancel("acme", third.job_id))

        events = [event.message for event in (await queue.events("acme", job.job_id, limit=100))[0]]
        assert len(events) == len(set(events)) + 1, "only 'Training started (attempt 1)' is there twice"
        stats = await queue.stats()
        assert (stats.jobs[JobStatus.SUCCEEDED], stats.jobs[JobStatus.CANCELLED]) == (1, 2)
        assert (await queue.get("acme", second.job_id)).status is JobStatus.SUCCEEDED
        await check_queue(redis)
