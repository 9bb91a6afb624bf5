"""What the tests of the training queue share: a specification, faster time, and the queue's invariants."""

from __future__ import annotations

from typing import Any

from redis.asyncio import Redis

from adapter_core import keys
from adapter_core.job_leases import JobLeases, Lease
from adapter_core.job_queue import JobQueue, JobSpec

FINAL = {b"succeeded", b"failed", b"cancelled"}
PLACES = {b"queued": ["waiting", "delayed"], b"running": ["leases"], b"paused": ["paused"]}


def make_spec(adapter_id: str = "ada", **changes: Any) -> JobSpec:
    return JobSpec(adapter_id=adapter_id, training_file="file-1", base_model="tiny", **changes)


async def submit_and_claim(redis: Redis, **changes: Any) -> Lease:
    await JobQueue(redis).submit("acme", make_spec(), cost=10, **changes)
    [lease] = await JobLeases(redis).claim("w1", limit=1, lease_s=60)
    return lease


async def expire_lease(redis: Redis, job_id: str) -> None:
    """Let a lease's deadline pass without waiting for it."""
    assert await redis.zadd(keys.QUEUE_LEASES, {job_id: 1}, xx=True, ch=True)


async def make_due(redis: Redis, job_id: str) -> None:
    """Let a delayed job's time come without waiting for it."""
    assert await redis.zadd(keys.QUEUE_DELAYED, {job_id: 1}, xx=True, ch=True)


async def check_queue(redis: Redis) -> None:
    """Every job stands in exactly the places that its status names, and all sums agree with the records."""
    waiting, delayed, leased = [
        set(await redis.zrange(key, 0, -1))
        for key in (keys.QUEUE_WAITING, keys.QUEUE_DELAYED, keys.QUEUE_LEASES)
    ]
    paused = await redis.smembers(keys.QUEUE_PAUSED)
    finished = {member.split()[1] for member in await redis.zrange(keys.QUEUE_FINISHED, 0, -1)}
    backlog = await _members_by_tenant(redis, keys.job_backlog(""))
    running = await _members_by_tenant(redis, keys.job_running(""))
    ring = {tenant.decode() for tenant in await redis.zrange(keys.QUEUE_RING, 0, -1)}

    cost = 0
    prefix = keys.job_record("")
    found = [key async for key in redis.scan_iter(match=f"{prefix}*", count=1000)]
    job_ids = [key.decode().removeprefix(prefix) for key in found]
    for job_id, record, ttl in await _records(redis, job_ids):
        tenant, status = record[b"tenant"].decode(), record[b"status"]
        places = {
            "waiting": job_id in waiting,
            "delayed": job_id in delayed,
            "leases": job_id in leased,
            "paused": job_id in paused,
            "finished": job_id in finished,
        }
        held = [place for place, inside in places.items() if inside]
        assert len(held) == 1, (job_id, status, held)
        assert held[0] in PLACES.get(status, ["finished"]), (job_id, record)
        assert (job_id in backlog.get(tenant, set())) == (job_id in waiting)
        assert (job_id in running.get(tenant, set())) == (job_id in leased)
        assert (ttl > 0) == (status in FINAL)
        assert (b"worker" in record) == (status == b"running")
        cost += int(record[b"cost"]) if status == b"queued" else 0
    assert cost == int(await redis.get(keys.QUEUE_COST) or 0)
    assert ring <= set(backlog), "a tenant without claimable jobs stands in the ring"
    for tenant in set(backlog) - ring:
        assert running.get(tenant), f"nothing will ever put {tenant} back into the ring"


async def _records(redis: Redis, job_ids: list[str]) -> list[tuple[bytes, dict[bytes, bytes], int]]:
    async with redis.pipeline() as pipeline:
        for job_id in job_ids:
            pipeline.hgetall(keys.job_record(job_id)).ttl(keys.job_record(job_id))
        replies = await pipeline.execute()
    return [(job_id.encode(), *replies[2 * i : 2 * i + 2]) for i, job_id in enumerate(job_ids)]


async def _members_by_tenant(redis: Redis, prefix: str) -> dict[str, set[bytes]]:
    members = {}
    async for key in redis.scan_iter(match=f"{prefix}*", count=1000):
        is_zset = await redis.type(key) == b"zset"
        found = await redis.zrange(key, 0, -1) if is_zset else await redis.smembers(key)
        members[key.decode().removeprefix(prefix)] = set(found)
    return members
