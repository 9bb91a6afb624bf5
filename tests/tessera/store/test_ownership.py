"""Bases of tenants' own: the quota, two owners of the same bytes, deletion with the last adapter."""

from __future__ import annotations

import asyncio

import pytest
import torch
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from tessera.errors import BasisDeleted, Conflict, NotFound, QuotaExceeded
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.redis import keys
from tessera.redis.client import Client
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tessera.store.ownership import Ownership, PrivateBases


def small_basis(seed: int = 0) -> Basis:
    """Of 2 · 3 · (11 + 9) numbers, 480 bytes."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        ModuleShape(f"layer.{i}.q_proj", 11, 9): (
            torch.randn(3, 11, generator=generator),
            torch.randn(9, 3, generator=generator),
        )
        for i in range(2)
    }
    return make_basis(model_id="m", method="test", factors=factors, recipe={"seed": seed})


SIZE = small_basis().manifest.factor_bytes


async def store_own(client: Client, own: PrivateBases, basis: Basis, tenant: str = "t1") -> None:
    ownership = await own.reserve(tenant, basis.manifest)
    assert ownership is not None
    await BasisStore(client).put_private(basis, ownership)


async def publish(redis: Redis, own: PrivateBases, basis: Basis, name: str, tenant: str = "t1") -> None:
    adapters = AdapterStore(redis)
    deletion_count = await adapters.deletion_count(tenant, name)
    await own.use(tenant, basis.basis_id, name, deletion_count=deletion_count)
    adapter = Adapter(basis.basis_id, torch.zeros(2, 3, 3))
    await adapters.publish(tenant, name, adapter, dtype=torch.float32, deletion_count=deletion_count)


async def delete_adapter(redis: Redis, own: PrivateBases, name: str, tenant: str = "t1") -> list[str]:
    adapters = AdapterStore(redis)
    assert await adapters.delete(tenant, name)
    return await own.release(tenant, name, deletion_count=await adapters.deletion_count(tenant, name))


async def keys_of(redis: Redis, basis: Basis) -> list[bytes]:
    return [key async for key in redis.scan_iter(match=f"*{basis.basis_id}*")]


@pytest.fixture
def own(redis: Redis) -> PrivateBases:
    return PrivateBases(redis, max_bytes=2 * SIZE)


async def test_a_basis_goes_with_the_last_adapter_in_it(redis: Redis, own: PrivateBases) -> None:
    basis = small_basis()
    await store_own(redis, own, basis)
    for name in ("a", "b"):
        await publish(redis, own, basis, name)
    assert await own.users("t1", basis.basis_id) == {"a", "b"}
    with pytest.raises(Conflict, match="2 adapter") as caught:
        await own.delete("t1", basis.basis_id)
    assert caught.value.code == "basis_in_use"

    assert await delete_adapter(redis, own, "a") == []
    assert (await BasisStore(redis).get(basis.basis_id)).manifest.is_own
    assert await delete_adapter(redis, own, "b") == [basis.basis_id]
    assert await keys_of(redis, basis) == []
    assert await own.of_tenant("t1") == {}
    with pytest.raises(Conflict, match="deleted"):
        await own.use("t1", basis.basis_id, "a", deletion_count=10**15)


async def test_the_quota_counts_each_basis_once_and_leaves_no_trace(redis: Redis, own: PrivateBases) -> None:
    bases = [small_basis(seed) for seed in range(3)]
    for basis in (bases[0], bases[1], bases[0]):
        await store_own(redis, own, basis)
    with pytest.raises(QuotaExceeded) as caught:
        await own.reserve("t1", bases[2].manifest)
    assert caught.value.code == "basis_quota_exceeded"
    assert await keys_of(redis, bases[2]) == []
    assert await own.of_tenant("t1") == {basis.basis_id: SIZE for basis in bases[:2]}
    assert await own.reserve("t2", bases[2].manifest), "each tenant has a quota of its own"
    await own.delete("t1", bases[1].basis_id)
    assert await own.reserve("t1", bases[2].manifest)


async def test_racers_do_not_exceed_the_quota(redis: Redis, own: PrivateBases) -> None:
    manifests = [small_basis(seed).manifest for seed in range(6)]
    outcomes = await asyncio.gather(
        *(own.reserve("t1", manifest) for manifest in manifests), return_exceptions=True
    )
    assert sum(isinstance(outcome, Ownership) for outcome in outcomes) == 2
    assert sum(isinstance(outcome, QuotaExceeded) for outcome in outcomes) == 4


async def test_reserved_quota_goes_to_the_basis_that_it_is_reserved_for(
    redis: Redis, own: PrivateBases
) -> None:
    reservations = ["a" * 64, "b" * 64]
    for reservation in (*reservations, reservations[0]):
        await own.reserve_quota("t1", reservation, SIZE)
        await own.use("t1", reservation, f"job:{reservation[0]}", deletion_count=0)
    bases = [small_basis(seed) for seed in range(2)]
    with pytest.raises(QuotaExceeded):
        await own.reserve("t1", bases[0].manifest)
    with pytest.raises(QuotaExceeded):
        await own.reserve_quota("t1", "c" * 64, SIZE)
    assert await own.reserve("t1", bases[0].manifest, reservation_id=reservations[0])
    assert await own.release("t1", "job:a", deletion_count=1) == [reservations[0]]
    assert set(await own.of_tenant("t1")) == {bases[0].basis_id, reservations[1]}
    assert await own.reserve("t1", bases[1].manifest, reservation_id=reservations[1])


async def test_equal_bytes_of_two_tenants_are_stored_once_and_stay_for_the_other(
    redis: Redis, own: PrivateBases
) -> None:
    basis = small_basis()
    for tenant in ("t1", "t2"):
        await store_own(redis, own, basis, tenant)
        await publish(redis, own, basis, "a", tenant)
    with pytest.raises(NotFound):
        await own.check_access("t3", basis.basis_id)
    assert await delete_adapter(redis, own, "a", "t1") == [basis.basis_id]
    with pytest.raises(NotFound):
        await own.check_access("t1", basis.basis_id)
    await own.check_access("t2", basis.basis_id)
    await BasisStore(redis).get(basis.basis_id)
    await delete_adapter(redis, own, "a", "t2")
    assert await keys_of(redis, basis) == []


async def test_what_is_everybodys_costs_nobody_anything(redis: Redis, own: PrivateBases) -> None:
    bases, basis = BasisStore(redis), small_basis()
    await bases.put(basis)
    assert not await own.reserve("t1", basis.manifest)
    assert await own.of_tenant("t1") == {}
    await own.use("t1", basis.basis_id, "a", deletion_count=0)
    await own.check_access("t3", basis.basis_id)

    other = small_basis(1)
    await store_own(redis, own, other)
    assert await bases.list() == [basis.manifest]
    await bases.put(other)  # built for all, later
    await own.check_access("t3", other.basis_id)
    await own.delete("t1", other.basis_id)
    assert (await bases.get(other.basis_id)).basis_id == other.basis_id


async def test_an_adapter_published_again_keeps_its_basis(redis: Redis, own: PrivateBases) -> None:
    """The end of the first life, delayed until the second has begun, does not take the second's basis."""
    basis, adapters = small_basis(), AdapterStore(redis)
    await store_own(redis, own, basis)
    await publish(redis, own, basis, "a")
    assert await adapters.delete("t1", "a")
    ended = await adapters.deletion_count("t1", "a")
    await publish(redis, own, basis, "a")
    assert await own.release("t1", "a", deletion_count=ended) == []
    assert await delete_adapter(redis, own, "a") == [basis.basis_id]


async def test_a_deletion_that_was_cut_off_is_finished_by_the_next(redis: Redis, own: PrivateBases) -> None:
    basis = small_basis()
    await store_own(redis, own, basis)
    value = await redis.hget(keys.tenant_bases("t1"), basis.basis_id)
    assert value is not None
    await redis.hset(keys.tenant_bases("t1"), basis.basis_id, b"0:" + value.split(b":")[1])
    assert await own.of_tenant("t1") == {}
    with pytest.raises(Conflict):
        await own.use("t1", basis.basis_id, "a", deletion_count=0)
    assert await own.release("t1", "whoever", deletion_count=1) == [basis.basis_id]
    assert await keys_of(redis, basis) == []


async def test_a_basis_that_was_written_in_part_leaves_nothing(redis: Redis, own: PrivateBases) -> None:
    """Its writer died before the manifest, which is written last."""
    basis = small_basis()
    assert await own.reserve("t1", basis.manifest, user="job:a")
    for i, blob in enumerate(basis.module_bytes()):
        await redis.set(keys.basis_module(basis.basis_id, i), blob)
    assert await own.release("t1", "job:a", deletion_count=1) == [basis.basis_id]
    assert await keys_of(redis, basis) == []


async def test_a_basis_of_an_earlier_release_is_deleted_whole(redis: Redis, own: PrivateBases) -> None:
    """Whose tokens did not say how many modules there are."""
    basis = small_basis()
    await store_own(redis, own, basis)
    await redis.hset(keys.tenant_bases("t1"), basis.basis_id, f"{SIZE}:0123456789abcdef")
    await redis.hset(keys.basis_owners(basis.basis_id), "t1", "0123456789abcdef")
    await own.delete("t1", basis.basis_id)
    assert await keys_of(redis, basis) == []


async def test_a_late_writer_writes_nothing(redis: Redis, own: PrivateBases) -> None:
    """What it wrote would belong to nobody, and so to everybody. Nor does it write into the next life."""
    bases, basis = BasisStore(redis), small_basis()
    late = await own.reserve("t1", basis.manifest)
    assert late is not None
    await own.discard("t1", basis.basis_id)
    with pytest.raises(BasisDeleted):
        await bases.put_private(basis, late, step=basis.P_in)
    assert await keys_of(redis, basis) == []
    assert await own.reserve("t1", basis.manifest)
    with pytest.raises(BasisDeleted):
        await bases.put_private(basis, late, step=basis.P_in)
    with pytest.raises(NotFound):
        await bases.manifest(basis.basis_id)


class JustTooEarly(PrivateBases):
    """Looks whether a basis is everybody's just before it becomes so."""

    async def _is_shared(self, basis_id: str) -> bool:
        is_so = await super()._is_shared(basis_id)
        await BasisStore(self._redis).put(small_basis())
        return is_so


@pytest.mark.parametrize("user", ["", "job:a"])
async def test_what_becomes_everybodys_while_it_is_reserved_costs_nothing(redis: Redis, user: str) -> None:
    own, basis = JustTooEarly(redis, max_bytes=SIZE), small_basis()
    assert await own.reserve("t1", basis.manifest, user=user) is None
    assert await redis.hgetall(keys.tenant_bases("t1")) == {}
    assert await own.users("t1", basis.basis_id) == set()


class Overtaken(BasisStore):
    """A tenant becomes the first owner of a basis that is just being written for everybody."""

    async def _write(self, basis: Basis, ownership: Ownership | None = None) -> None:
        if ownership is None:
            await store_own(self._redis, PrivateBases(self._redis, max_bytes=SIZE), basis)
        await super()._write(basis, ownership)


async def test_everybodys_basis_outlives_a_tenant_that_stored_it_at_the_same_time(
    redis: Redis, own: PrivateBases
) -> None:
    basis = small_basis()
    await Overtaken(redis).put(basis)
    await own.delete("t1", basis.basis_id)
    assert (await BasisStore(redis).get(basis.basis_id)).basis_id == basis.basis_id
    await own.check_access("t3", basis.basis_id)


async def test_a_basis_in_the_making_outlives_the_deletion_of_other_adapters(
    redis: Redis, own: PrivateBases
) -> None:
    basis = small_basis()
    await store_own(redis, own, basis)
    assert await own.release("t1", "other", deletion_count=10**15) == []
    await publish(redis, own, basis, "a")
    with pytest.raises(NotFound):
        await own.delete("t2", basis.basis_id)


@pytest.mark.parametrize("basis_id", ["", "00", "../x", "\ud800"])
async def test_what_is_no_id_is_not_found(own: PrivateBases, basis_id: str) -> None:
    with pytest.raises(NotFound):
        await own.check_access("t1", basis_id)
    with pytest.raises(NotFound):
        await own.delete("t1", basis_id)


async def test_everything_works_on_a_cluster(cluster: RedisCluster) -> None:
    own, basis = PrivateBases(cluster, max_bytes=SIZE), small_basis()
    await store_own(cluster, own, basis)
    await own.use("t1", basis.basis_id, "a", deletion_count=0)
    assert await own.release("t1", "a", deletion_count=1) == [basis.basis_id]
    with pytest.raises(NotFound):
        await BasisStore(cluster).manifest(basis.basis_id)
