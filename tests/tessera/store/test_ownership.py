"""Private bases: the quota, two owners of the same bytes, deletion with the last adapter."""

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
    """A basis of 2 · 3 · (11 + 9) numbers, 480 bytes."""
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


async def store_private(
    client: Client, private_bases: PrivateBases, basis: Basis, tenant: str = "t1"
) -> None:
    ownership = await private_bases.reserve(tenant, basis.manifest)
    assert ownership is not None
    await BasisStore(client).put_private(basis, ownership)


async def publish(
    redis: Redis, private_bases: PrivateBases, basis: Basis, name: str, tenant: str = "t1"
) -> None:
    adapters = AdapterStore(redis)
    deletion_count = await adapters.deletion_count(tenant, name)
    await private_bases.use(tenant, basis.basis_id, name, deletion_count=deletion_count)
    adapter = Adapter(basis.basis_id, torch.zeros(2, 3, 3))
    await adapters.publish(tenant, name, adapter, dtype=torch.float32, deletion_count=deletion_count)


async def delete_adapter(
    redis: Redis, private_bases: PrivateBases, name: str, tenant: str = "t1"
) -> list[str]:
    adapters = AdapterStore(redis)
    assert await adapters.delete(tenant, name)
    return await private_bases.release(
        tenant, name, deletion_count=await adapters.deletion_count(tenant, name)
    )


async def keys_of(redis: Redis, basis: Basis) -> list[bytes]:
    return [key async for key in redis.scan_iter(match=f"*{basis.basis_id}*")]


@pytest.fixture
def private_bases(redis: Redis) -> PrivateBases:
    return PrivateBases(redis, max_bytes=2 * SIZE)


async def test_a_basis_goes_with_the_last_adapter_in_it(redis: Redis, private_bases: PrivateBases) -> None:
    basis = small_basis()
    await store_private(redis, private_bases, basis)
    for name in ("a", "b"):
        await publish(redis, private_bases, basis, name)
    assert await private_bases.users("t1", basis.basis_id) == {"a", "b"}
    with pytest.raises(Conflict, match="2 adapter") as caught:
        await private_bases.delete("t1", basis.basis_id)
    assert caught.value.code == "basis_in_use"

    assert await delete_adapter(redis, private_bases, "a") == []
    assert (await BasisStore(redis).get(basis.basis_id)).manifest.is_own
    assert await delete_adapter(redis, private_bases, "b") == [basis.basis_id]
    assert await keys_of(redis, basis) == []
    assert await private_bases.of_tenant("t1") == {}
    with pytest.raises(Conflict, match="deleted"):
        await private_bases.use("t1", basis.basis_id, "a", deletion_count=10**15)


async def test_the_quota_counts_each_basis_once_and_leaves_no_trace(
    redis: Redis, private_bases: PrivateBases
) -> None:
    bases = [small_basis(seed) for seed in range(3)]
    for basis in (bases[0], bases[1], bases[0]):
        await store_private(redis, private_bases, basis)
    with pytest.raises(QuotaExceeded) as caught:
        await private_bases.reserve("t1", bases[2].manifest)
    assert caught.value.code == "basis_quota_exceeded"
    assert await keys_of(redis, bases[2]) == []
    assert await private_bases.of_tenant("t1") == {basis.basis_id: SIZE for basis in bases[:2]}
    assert await private_bases.reserve("t2", bases[2].manifest), "each tenant has a quota of its own"
    await private_bases.delete("t1", bases[1].basis_id)
    assert await private_bases.reserve("t1", bases[2].manifest)


async def test_racers_do_not_exceed_the_quota(redis: Redis, private_bases: PrivateBases) -> None:
    manifests = [small_basis(seed).manifest for seed in range(6)]
    outcomes = await asyncio.gather(
        *(private_bases.reserve("t1", manifest) for manifest in manifests), return_exceptions=True
    )
    assert sum(isinstance(outcome, Ownership) for outcome in outcomes) == 2
    assert sum(isinstance(outcome, QuotaExceeded) for outcome in outcomes) == 4


async def test_reserved_quota_goes_to_the_basis_that_it_is_reserved_for(
    redis: Redis, private_bases: PrivateBases
) -> None:
    reservations = ["a" * 64, "b" * 64]
    for reservation in (*reservations, reservations[0]):
        await private_bases.reserve_quota("t1", reservation, SIZE)
        await private_bases.use("t1", reservation, f"job:{reservation[0]}", deletion_count=0)
    bases = [small_basis(seed) for seed in range(2)]
    with pytest.raises(QuotaExceeded):
        await private_bases.reserve("t1", bases[0].manifest)
    with pytest.raises(QuotaExceeded):
        await private_bases.reserve_quota("t1", "c" * 64, SIZE)
    assert await private_bases.reserve("t1", bases[0].manifest, reservation_id=reservations[0])
    assert await private_bases.release("t1", "job:a", deletion_count=1) == [reservations[0]]
    assert set(await private_bases.of_tenant("t1")) == {bases[0].basis_id, reservations[1]}
    assert await private_bases.reserve("t1", bases[1].manifest, reservation_id=reservations[1])


async def test_equal_bytes_of_two_tenants_are_stored_once_and_stay_for_the_other(
    redis: Redis, private_bases: PrivateBases
) -> None:
    basis = small_basis()
    for tenant in ("t1", "t2"):
        await store_private(redis, private_bases, basis, tenant)
        await publish(redis, private_bases, basis, "a", tenant)
    with pytest.raises(NotFound):
        await private_bases.check_access("t3", basis.basis_id)
    assert await delete_adapter(redis, private_bases, "a", "t1") == [basis.basis_id]
    with pytest.raises(NotFound):
        await private_bases.check_access("t1", basis.basis_id)
    await private_bases.check_access("t2", basis.basis_id)
    await BasisStore(redis).get(basis.basis_id)
    await delete_adapter(redis, private_bases, "a", "t2")
    assert await keys_of(redis, basis) == []


async def test_a_shared_basis_costs_no_quota(redis: Redis, private_bases: PrivateBases) -> None:
    bases, basis = BasisStore(redis), small_basis()
    await bases.put(basis)
    assert not await private_bases.reserve("t1", basis.manifest)
    assert await private_bases.of_tenant("t1") == {}
    await private_bases.use("t1", basis.basis_id, "a", deletion_count=0)
    await private_bases.check_access("t3", basis.basis_id)

    other = small_basis(1)
    await store_private(redis, private_bases, other)
    assert await bases.list() == [basis.manifest]
    await bases.put(other)  # shared later
    await private_bases.check_access("t3", other.basis_id)
    await private_bases.delete("t1", other.basis_id)
    assert (await bases.get(other.basis_id)).basis_id == other.basis_id


async def test_an_adapter_published_again_keeps_its_basis(redis: Redis, private_bases: PrivateBases) -> None:
    """The end of the first lifetime comes late, when the second has begun, and leaves its basis alone."""
    basis, adapters = small_basis(), AdapterStore(redis)
    await store_private(redis, private_bases, basis)
    await publish(redis, private_bases, basis, "a")
    assert await adapters.delete("t1", "a")
    ended = await adapters.deletion_count("t1", "a")
    await publish(redis, private_bases, basis, "a")
    assert await private_bases.release("t1", "a", deletion_count=ended) == []
    assert await delete_adapter(redis, private_bases, "a") == [basis.basis_id]


async def test_a_deletion_that_was_cut_off_is_finished_by_the_next(
    redis: Redis, private_bases: PrivateBases
) -> None:
    basis = small_basis()
    await store_private(redis, private_bases, basis)
    value = await redis.hget(keys.tenant_bases("t1"), basis.basis_id)
    assert value is not None
    await redis.hset(keys.tenant_bases("t1"), basis.basis_id, b"0:" + value.split(b":")[1])
    assert await private_bases.of_tenant("t1") == {}
    with pytest.raises(Conflict):
        await private_bases.use("t1", basis.basis_id, "a", deletion_count=0)
    assert await private_bases.release("t1", "whoever", deletion_count=1) == [basis.basis_id]
    assert await keys_of(redis, basis) == []


async def test_a_basis_that_was_written_in_part_leaves_nothing(
    redis: Redis, private_bases: PrivateBases
) -> None:
    """The writer died before it wrote the manifest, which comes last."""
    basis = small_basis()
    assert await private_bases.reserve("t1", basis.manifest, user="job:a")
    for i, blob in enumerate(basis.module_bytes()):
        await redis.set(keys.basis_module(basis.basis_id, i), blob)
    assert await private_bases.release("t1", "job:a", deletion_count=1) == [basis.basis_id]
    assert await keys_of(redis, basis) == []


async def test_a_basis_of_an_earlier_release_is_deleted_whole(
    redis: Redis, private_bases: PrivateBases
) -> None:
    """Tokens of earlier releases did not carry the number of modules."""
    basis = small_basis()
    await store_private(redis, private_bases, basis)
    await redis.hset(keys.tenant_bases("t1"), basis.basis_id, f"{SIZE}:0123456789abcdef")
    await redis.hset(keys.basis_owners(basis.basis_id), "t1", "0123456789abcdef")
    await private_bases.delete("t1", basis.basis_id)
    assert await keys_of(redis, basis) == []


async def test_a_late_writer_writes_nothing(redis: Redis, private_bases: PrivateBases) -> None:
    """Factors without an owner would be shared. Nor may it write into the next lifetime."""
    bases, basis = BasisStore(redis), small_basis()
    late = await private_bases.reserve("t1", basis.manifest)
    assert late is not None
    await private_bases.discard("t1", basis.basis_id)
    with pytest.raises(BasisDeleted):
        await bases.put_private(basis, late, step=basis.P_in)
    assert await keys_of(redis, basis) == []
    assert await private_bases.reserve("t1", basis.manifest)
    with pytest.raises(BasisDeleted):
        await bases.put_private(basis, late, step=basis.P_in)
    with pytest.raises(NotFound):
        await bases.manifest(basis.basis_id)


class JustTooEarly(PrivateBases):
    """Checks whether a basis is shared just before it becomes shared."""

    async def _is_shared(self, basis_id: str) -> bool:
        is_shared = await super()._is_shared(basis_id)
        await BasisStore(self._redis).put(small_basis())
        return is_shared


@pytest.mark.parametrize("user", ["", "job:a"])
async def test_what_becomes_everybodys_while_it_is_reserved_costs_nothing(redis: Redis, user: str) -> None:
    private_bases, basis = JustTooEarly(redis, max_bytes=SIZE), small_basis()
    assert await private_bases.reserve("t1", basis.manifest, user=user) is None
    assert await redis.hgetall(keys.tenant_bases("t1")) == {}
    assert await private_bases.users("t1", basis.basis_id) == set()


class Overtaken(BasisStore):
    """A tenant becomes the first owner of a basis while it is being written as a shared one."""

    async def _write(self, basis: Basis, ownership: Ownership | None = None) -> None:
        if ownership is None:
            await store_private(self._redis, PrivateBases(self._redis, max_bytes=SIZE), basis)
        await super()._write(basis, ownership)


async def test_everybodys_basis_outlives_a_tenant_that_stored_it_at_the_same_time(
    redis: Redis, private_bases: PrivateBases
) -> None:
    basis = small_basis()
    await Overtaken(redis).put(basis)
    await private_bases.delete("t1", basis.basis_id)
    assert (await BasisStore(redis).get(basis.basis_id)).basis_id == basis.basis_id
    await private_bases.check_access("t3", basis.basis_id)


async def test_a_basis_in_the_making_outlives_the_deletion_of_other_adapters(
    redis: Redis, private_bases: PrivateBases
) -> None:
    basis = small_basis()
    await store_private(redis, private_bases, basis)
    assert await private_bases.release("t1", "other", deletion_count=10**15) == []
    await publish(redis, private_bases, basis, "a")
    with pytest.raises(NotFound):
        await private_bases.delete("t2", basis.basis_id)


@pytest.mark.parametrize("basis_id", ["", "00", "../x", "\ud800"])
async def test_what_is_no_id_is_not_found(private_bases: PrivateBases, basis_id: str) -> None:
    with pytest.raises(NotFound):
        await private_bases.check_access("t1", basis_id)
    with pytest.raises(NotFound):
        await private_bases.delete("t1", basis_id)


async def test_everything_works_on_a_cluster(cluster: RedisCluster) -> None:
    private_bases, basis = PrivateBases(cluster, max_bytes=SIZE), small_basis()
    await store_private(cluster, private_bases, basis)
    await private_bases.use("t1", basis.basis_id, "a", deletion_count=0)
    assert await private_bases.release("t1", "a", deletion_count=1) == [basis.basis_id]
    with pytest.raises(NotFound):
        await BasisStore(cluster).manifest(basis.basis_id)
