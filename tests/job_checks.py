"""What the tests of the training queue share: a specification, faster time, and the queue's invariants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis

from tessera.queue.client import JobQueue, JobSpec
from tessera.queue.leases import JobLeases, Lease
from tessera.redis import keys

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
    if await redis.exists(keys.job_record(job_id)):
        await redis.hset(keys.job_record(job_id), "due_ms", 1)


async def check_queue(redis: Redis) -> None:
    """Every job stands in exactly the places that its status names, and all sums agree with the records."""
    zsets = [keys.QUEUE_WAITING, keys.QUEUE_DELAYED, keys.QUEUE_LEASES, keys.QUEUE_FINISHED, keys.QUEUE_RING]
    async with redis.pipeline() as pipeline:
        for key in zsets:
            pipeline.zrange(key, 0, -1)
        pipeline.smembers(keys.QUEUE_PAUSED).get(keys.QUEUE_COST)
        waiting, delayed, leased, finished, ring, paused, summed_cost = await pipeline.execute()
    ended = {member.split()[1] for member in finished}
    backlog = await _read_all(redis, keys.job_backlog(""), lambda pipeline, key: pipeline.zrange(key, 0, -1))
    running = await _read_all(redis, keys.job_running(""), lambda pipeline, key: pipeline.smembers(key))
    records = await _read_all(redis, keys.job_record(""), lambda pipeline, key: pipeline.hgetall(key))
    lifetimes = await _read_all(redis, keys.job_record(""), lambda pipeline, key: pipeline.ttl(key))

    for job_id, record in records.items():
        tenant, status = record[b"tenant"], record[b"status"]
        places = {
            "waiting": waiting,
            "delayed": delayed,
            "leases": leased,
            "paused": paused,
            "ended": ended,
        }
        held = [place for place, members in places.items() if job_id in members]
        assert len(held) == 1, (job_id, status, held)
        assert held[0] in PLACES.get(status, ["ended"]), (job_id, record)
        assert (job_id in backlog.get(tenant, ())) == (job_id in waiting)
        assert (job_id in running.get(tenant, ())) == (job_id in leased)
        assert (lifetimes[job_id] > 0) == (status in FINAL)
        assert (b"worker" in record) == (status == b"running")
    queued = [record for record in records.values() if record[b"status"] == b"queued"]
    assert sum(int(record[b"cost"]) for record in queued) == int(summed_cost or 0)
    assert set(ring) <= set(backlog), "a tenant without claimable jobs stands in the ring"
    for tenant in set(backlog) - set(ring):
        assert running.get(tenant), f"nothing will ever put {tenant} back into the ring"


async def _read_all(redis: Redis, prefix: str, read: Callable[[Any, bytes], Any]) -> dict[bytes, Any]:
    """What `read` finds under every key that begins with the prefix, by the rest of the key."""
    found = await redis.keys(f"{prefix}*")
    async with redis.pipeline() as pipeline:
        for key in found:
            read(pipeline, key)
        replies = await pipeline.execute()
    return {key.removeprefix(prefix.encode()): reply for key, reply in zip(found, replies, strict=True)}
