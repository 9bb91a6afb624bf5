"""Which job comes next: fairness between tenants by cost and weight, caps, and preference for a basis."""

from __future__ import annotations

import asyncio
import math

import pytest
from redis.asyncio import Redis

from tessera.errors import InvalidInput
from tessera.queue.client import JobQueue, JobStatus
from tessera.queue.lease_scripts import MAX_OVERTAKES
from tessera.queue.leases import JobLeases
from tessera.redis import keys
from tessera.redis.client import MAX_CONNECTIONS
from tests.job_checks import check_queue, make_spec


async def test_a_whale_does_not_delay_another_tenants_first_job(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    for _ in range(0, 1000, MAX_CONNECTIONS):
        await asyncio.gather(*(queue.submit("whale", make_spec(), cost=100) for _ in range(MAX_CONNECTIONS)))
    for lease in await leases.claim("w", limit=10, lease_s=60):
        await leases.complete(lease, {})
    minnows = [f"minnow{i}" for i in range(5)]
    for tenant in minnows:
        for _ in range(4):
            await queue.submit(tenant, make_spec(), cost=100)
    # The first job of each tenant comes at once; then all tenants take turns, including the whale.
    claimed = [lease.job.tenant for lease in await leases.claim("w", limit=17, lease_s=60)]
    assert sorted(claimed[:5]) == minnows
    assert sorted(claimed[5:11]) == sorted([*minnows, "whale"])
    assert sorted(claimed[11:]) == sorted([*minnows, "whale"])


async def test_shares_follow_cost_and_weight(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    for _ in range(40):
        await queue.submit("big", make_spec(), cost=300)
        await queue.submit("small", make_spec(), cost=100)
        await queue.submit("heavy", make_spec(), cost=100)
    await queue.set_share("heavy", weight=2.0)
    claimed = [lease.job.tenant for lease in await leases.claim("w", limit=50, lease_s=60)]
    served = {tenant: claimed.count(tenant) for tenant in ("big", "small", "heavy")}
    assert served["small"] == pytest.approx(15, abs=1)  # cost served: small 1 : big 1 : heavy 2
    assert served["big"] == pytest.approx(5, abs=1)
    assert served["heavy"] == pytest.approx(30, abs=1)
    for weight in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInput):
            await queue.set_share("heavy", weight=weight)
    with pytest.raises(InvalidInput):
        await queue.set_share("heavy", max_running_jobs=0)


async def test_idling_earns_nothing_and_use_of_an_idle_system_costs_nothing(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)

    async def finish_all() -> None:
        while claimed := await leases.claim("w", limit=100, lease_s=60):
            for lease in claimed:
                await leases.complete(lease, {})

    await queue.submit("early", make_spec(), cost=10**9)
    await finish_all()
    assert await leases.claim("w", limit=1, lease_s=60) == [], "idle"
    for tenant in ("early", "late"):
        for _ in range(3):
            await queue.submit(tenant, make_spec(), cost=10)
    claimed = [lease.job.tenant for lease in await leases.claim("w", limit=4, lease_s=60)]
    assert claimed == ["early", "late", "early", "late"]


async def test_tenants_that_the_clock_has_passed_are_forgotten(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    for i in range(50):
        await queue.submit(f"tenant{i}", make_spec(), cost=1)
    for _ in range(3):
        await queue.submit("zoe", make_spec(), cost=100)
    assert len(await leases.claim("w", limit=51, lease_s=60)) == 51
    assert await redis.zcard(keys.QUEUE_TAGS) == 51
    assert len(await leases.claim("w", limit=1, lease_s=60)) == 1
    assert await redis.zrange(keys.QUEUE_TAGS, 0, -1) == [b"zoe"]


async def test_a_tenant_at_its_cap_waits_until_one_of_its_jobs_ends(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis, max_running_jobs=2)
    for tenant in ("acme", "other"):
        for _ in range(4):
            await queue.submit(tenant, make_spec(), cost=1)
    claimed = await leases.claim("w", limit=10, lease_s=60)
    assert sorted(lease.job.tenant for lease in claimed) == ["acme", "acme", "other", "other"]
    assert not await leases.wait_for_work(0), "a tenant at its cap is no work"
    await check_queue(redis)
    await leases.complete(next(lease for lease in claimed if lease.job.tenant == "acme"), {})
    assert await leases.wait_for_work(0)
    assert [lease.job.tenant for lease in await leases.claim("w", limit=10, lease_s=60)] == ["acme"]
    await queue.set_share("other", max_running_jobs=3)
    assert [lease.job.tenant for lease in await leases.claim("w", limit=10, lease_s=60)] == ["other"]
    await queue.set_share("other", max_running_jobs=None)
    assert await leases.claim("w", limit=10, lease_s=60) == []
    await check_queue(redis)


async def test_a_basis_hint_prefers_jobs_but_starves_nobody(redis: Redis) -> None:
    queue, leases = JobQueue(redis), JobLeases(redis)
    odd = await queue.submit("acme", make_spec("odd", basis_id="b2"), cost=1)
    for i in range(MAX_OVERTAKES + 2):
        await queue.submit("acme", make_spec(f"a{i}", basis_id="b1"), cost=1)
    await queue.submit("other", make_spec("other", basis_id="b2"), cost=1)
    order = []
    while claimed := await leases.claim("w", limit=1, lease_s=60, basis_hint="b1"):
        order.append(claimed[0].job.spec.adapter_id)
    assert "other" in order[:2], "a hint never prefers one tenant over another"
    own = [name for name in order if name != "other"]
    assert own.index("odd") == MAX_OVERTAKES
    assert (await queue.get("acme", odd.job_id)).status is JobStatus.RUNNING
