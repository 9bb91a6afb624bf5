"""Intermediate states beside the versions of an adapter, on a real server."""

from __future__ import annotations

import pytest
import torch
from redis.asyncio import Redis

from tessera.errors import AdapterDeleted, NotFound
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import checkpoint_step, checkpoint_version, parse_version_name, version_name
from tessera.redis import keys
from tessera.store.adapters import AdapterStore
from tessera.store.checkpoints import CheckpointStore

BASIS_ID = "b" * 64


def adapter(value: float) -> Adapter:
    return Adapter(BASIS_ID, torch.full((2, 4, 4), float(value)), {"step": int(value)})


async def put(redis: Redis, step: int, *, job: str = "ftjob-1", count: int = 0, keep: int = 3) -> bool:
    return await CheckpointStore(redis).put(
        "acme", "anna", adapter(step), step=step, job_id=job, created_at=1.0, dtype=torch.float32,
        deletion_count=count, keep=keep,
    )  # fmt: skip


async def publish(redis: Redis) -> int:
    version = await AdapterStore(redis).publish("acme", "anna", adapter(0.5), dtype=torch.float32)
    return version.version


async def steps(redis: Redis) -> list[int | None]:
    found = await CheckpointStore(redis).of_adapter("acme", "anna")
    return [checkpoint_step(state.version) for state in found]


async def blobs(redis: Redis) -> int:
    return len(await redis.keys(f"{keys.adapter_record('acme', 'anna')}:1*"))


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("anna", ("anna", None)),
        ("anna@3", ("anna", 3)),
        ("anna:ckpt-step-20", ("anna", checkpoint_version(20))),
        ("anna@1000000020", None),
        ("anna@0", None),
        ("anna:ckpt-step-0", None),
        ("anna:ckpt-step-", None),
        ("anna:ckpt-step-2@3", None),
        ("anna@3:ckpt-step-2", None),
        ("anna:other", None),
    ],
)
def test_names_are_read_as_they_are_written(name: str, parsed: tuple[str, int | None] | None) -> None:
    assert parse_version_name(name) == parsed
    if parsed is not None and parsed[1] is not None:
        assert version_name(*parsed) == name


async def test_a_state_resolves_like_a_version_and_disturbs_none(redis: Redis) -> None:
    store = AdapterStore(redis)
    assert await put(redis, 20)
    with pytest.raises(NotFound):
        await store.resolve("acme", "anna")
    assert await store.list("acme") == ([], False)
    assert await publish(redis) == 1
    assert await put(redis, 30)

    ref = await store.resolve("acme", "anna", checkpoint_version(20))
    [blob] = await store.fetch([ref])

    assert ref.name == "anna:ckpt-step-20"
    assert torch.equal(Adapter.of_version(ref, blob).R, torch.full((2, 4, 4), 20.0))
    assert (await store.resolve("acme", "anna")).version == 1
    record = await store.get("acme", "anna")
    assert (record.active_version, record.latest_version, len(record.versions)) == (1, 1, 1)
    assert await publish(redis) == 2
    with pytest.raises(NotFound, match="step 21 of adapter 'anna'"):
        await store.resolve("acme", "anna", checkpoint_version(21))
    with pytest.raises(NotFound):
        await store.activate("acme", "anna", checkpoint_version(20))
    with pytest.raises(NotFound):
        await store.resolve("other", "anna", checkpoint_version(20))


async def test_the_latest_states_of_the_newest_job_are_kept(redis: Redis) -> None:
    for step in (100, 5, 20, 30, 9):
        await put(redis, step)
    assert (await steps(redis), await blobs(redis)) == ([100, 30, 20], 3)
    assert await put(redis, 30)
    assert await steps(redis) == [100, 30, 20]
    assert await put(redis, 2, job="ftjob-2")
    assert not await put(redis, 40, job="ftjob-1")
    assert (await steps(redis), await blobs(redis)) == ([2], 1)


async def test_states_expire_together(redis: Redis) -> None:
    await put(redis, 1)
    first = keys.adapter_blob("acme", "anna", checkpoint_version(1))
    await redis.expire(first, 5)
    await put(redis, 2)
    for key in (first, keys.adapter_checkpoints("acme", "anna")):
        assert await redis.ttl(key) > keys.JOB_TTL_S - 600


async def test_a_deleted_adapter_takes_its_states_along_and_late_ones_are_refused(redis: Redis) -> None:
    store = AdapterStore(redis)
    await publish(redis)
    await put(redis, 20)
    assert await store.delete("acme", "anna")
    assert (await steps(redis), await blobs(redis)) == ([], 0)
    with pytest.raises(AdapterDeleted):
        await put(redis, 30)
    assert await put(redis, 30, count=await store.deletion_count("acme", "anna"))


async def test_states_are_dropped_by_job_and_by_step(redis: Redis) -> None:
    store = CheckpointStore(redis)
    for step in (1, 2, 3):
        await put(redis, step)
    assert await store.drop("acme", "anna", job_id="ftjob-9") == 0
    assert await store.drop("acme", "anna", step=2) == 1
    assert (await steps(redis), await blobs(redis)) == ([3, 1], 2)
    assert await store.drop("acme", "anna", job_id="ftjob-1") == 2
    assert (await steps(redis), await blobs(redis)) == ([], 0)
