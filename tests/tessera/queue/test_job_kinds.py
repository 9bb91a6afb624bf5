"""Jobs of two kinds in one queue, distinguished by their ids; and how lost workers are counted."""

from __future__ import annotations

import json

import pytest
from redis.asyncio import Redis

from tessera.errors import NotFound
from tessera.queue.client import Job, JobQueue, JobSpec, JobStatus
from tessera.queue.leases import JobLeases
from tests.job_checks import check_queue, expire_lease, make_spec

TENANT = "acme"


async def submit_basis(redis: Redis, cost: int = 10) -> Job:
    spec = JobSpec(kind="basis", base_model="tiny", method="lora_da", calibration="file-1", rank=4)
    return await JobQueue(redis, kind="basis").submit(TENANT, spec, cost=cost)


async def test_each_kind_sees_its_own_jobs_only(redis: Redis) -> None:
    adapters, bases = JobQueue(redis), JobQueue(redis, kind="basis")
    trained = [(await adapters.submit(TENANT, make_spec(), cost=1)).job_id for _ in range(3)]
    built = [(await submit_basis(redis)).job_id for _ in range(3)]

    for queue, ids in ((adapters, trained), (bases, built)):
        page, has_more = await queue.list(TENANT, limit=2)
        rest, is_cut = await queue.list(TENANT, after=page[-1].job_id, limit=2)
        assert [job.job_id for job in page + rest] == ids[::-1]
        assert (has_more, is_cut) == (True, False)
    for queue, other in ((adapters, built[0]), (bases, trained[0])):
        assert await queue.list(TENANT, after=other) == ([], False)
        for look in (queue.get, queue.events, queue.cancel, queue.pause, queue.resume):
            with pytest.raises(NotFound):
                await look(TENANT, other)
    assert (await bases.get(TENANT, built[0])).spec.kind == "basis"
    assert {(await bases.get(TENANT, job_id)).status for job_id in built} == {JobStatus.QUEUED}
    await check_queue(redis)


async def test_both_kinds_wait_in_one_line(redis: Redis) -> None:
    built = (await submit_basis(redis)).job_id
    trained = (await JobQueue(redis).submit(TENANT, make_spec(), cost=1)).job_id
    assert (await JobQueue(redis).get(TENANT, trained)).queue_position == 2

    leases = await JobLeases(redis).claim("w", limit=2, lease_s=60)

    assert [lease.job.job_id for lease in leases] == [built, trained]
    for kind, job_id, word in (("basis", built, "Building"), ("adapter", trained, "Training")):
        events, _ = await JobQueue(redis, kind=kind).events(TENANT, job_id)
        assert events[0].message == f"{word} started (attempt 1)"
    await check_queue(redis)


async def test_a_specification_of_an_older_release_is_read(redis: Redis) -> None:
    new = {"kind", "basis_options", "target_modules", "calibration", "start", "form"}
    stored = json.loads(make_spec(rank=8).to_json())
    old = {name: value for name, value in stored.items() if name not in new}

    spec = JobSpec.from_json(json.dumps(old))

    assert spec == make_spec(rank=8)
    assert (spec.kind, spec.start, spec.calibration, spec.basis_options) == ("adapter", None, None, {})


async def test_the_stored_specification_keeps_the_names_of_earlier_releases() -> None:
    spec = make_spec(deletion_count=7)

    stored = json.loads(spec.to_json())

    assert stored["generation"] == 7
    assert "deletion_count" not in stored
    assert JobSpec.from_json(spec.to_json()) == spec


async def test_a_lost_worker_is_counted_and_a_release_is_not(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis, retry_base_s=0.001)
    job_id = (await queue.submit(TENANT, make_spec(), cost=1)).job_id
    [lease] = await leases.claim("w1", limit=1, lease_s=60)
    await leases.release(lease)
    [lease] = await leases.claim("w1", limit=1, lease_s=60)
    assert lease.job.num_lost_workers == 0
    await expire_lease(redis, job_id)
    await leases.reap()

    [lease] = await leases.claim("w2", limit=1, lease_s=60)
    assert (lease.job.num_lost_workers, lease.job.attempt) == (1, 2)
    await leases.fail(lease, {"code": "internal_error"}, retryable=True, ends_worker=True)

    assert (await queue.get(TENANT, job_id)).num_lost_workers == 2


async def test_a_fault_that_leaves_the_worker_alone_loses_none(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    job_id = (await queue.submit(TENANT, make_spec(), cost=1)).job_id
    [lease] = await leases.claim("w1", limit=1, lease_s=60)

    await leases.fail(lease, {"code": "store_unavailable"}, retryable=True)

    assert (await queue.get(TENANT, job_id)).num_lost_workers == 0
