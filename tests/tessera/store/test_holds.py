"""Holds on private bases by jobs and by their owners' pins, and the check of the quota."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from tessera.errors import Conflict, NotFound, QuotaExceeded
from tessera.formats.basis import Basis
from tessera.queue.client import JobQueue
from tessera.redis import keys
from tessera.store.bases import BasisStore
from tessera.store.holds import BasisHolds, source_key
from tessera.store.ownership import PrivateBases
from tests.job_checks import make_spec
from tests.tessera.store.test_bases import small_basis

TENANT = "acme"
LIMIT = 3000


class World:
    def __init__(self, redis: Redis) -> None:
        self.redis, self.store = redis, BasisStore(redis)
        self.own = PrivateBases(redis, max_bytes=LIMIT)
        self.holds = BasisHolds(redis, self.own)

    async def put(self, seed: int = 0, *recipes: str, tenant: str = TENANT) -> Basis:
        basis = small_basis(seed)
        ownership = await self.own.reserve(tenant, basis.manifest, recipe_keys=recipes)
        assert ownership is not None
        await self.store.put_private(basis, ownership, step=basis.P_in)
        return basis

    async def submit(self) -> str:
        return (await JobQueue(self.redis).submit(TENANT, make_spec(), cost=1)).job_id

    async def owned(self) -> set[str]:
        return set(await self.own.of_tenant(TENANT))


@pytest.fixture
def world(redis: Redis) -> World:
    return World(redis)


async def test_a_basis_goes_with_the_last_job_that_held_it(world: World) -> None:
    basis, jobs = await world.put(), [await world.submit(), await world.submit()]
    for job_id in [*jobs, jobs[0]]:  # the second hold changes nothing
        await world.holds.hold(TENANT, basis.basis_id, job_id)

    await world.holds.let_go(TENANT, jobs[0])
    assert await world.owned() == {basis.basis_id}
    with pytest.raises(Conflict, match=jobs[1]):
        await world.holds.delete(TENANT, basis.basis_id)
    await world.holds.let_go(TENANT, jobs[1])

    assert await world.owned() == set()
    assert not await world.redis.keys(f"{keys.PREFIX}:{{basis:*")
    with pytest.raises(Conflict):
        await world.holds.hold(TENANT, basis.basis_id, jobs[0])


async def test_a_pinned_basis_stays_until_it_is_deleted(world: World) -> None:
    basis, job_id = await world.put(), await world.submit()
    await world.holds.hold(TENANT, basis.basis_id, job_id)
    await world.holds.pin(TENANT, basis.basis_id)
    await world.holds.let_go(TENANT, job_id)
    assert await world.owned() == {basis.basis_id}

    await world.holds.delete(TENANT, basis.basis_id)

    assert await world.owned() == set()
    with pytest.raises(NotFound):
        await world.holds.delete(TENANT, basis.basis_id)


async def test_an_adapter_keeps_a_basis_that_was_pinned(world: World) -> None:
    basis = await world.put()
    await world.holds.pin(TENANT, basis.basis_id)
    await world.own.use(TENANT, basis.basis_id, "anna", deletion_count=0)

    with pytest.raises(Conflict, match="anna") as caught:
        await world.holds.delete(TENANT, basis.basis_id)
    assert caught.value.code == "basis_in_use"
    await world.own.release(TENANT, "anna", deletion_count=1)

    assert await world.owned() == {basis.basis_id}
    await world.holds.delete(TENANT, basis.basis_id)


async def test_everybodys_basis_needs_no_hold(world: World) -> None:
    basis_id = await world.store.put(small_basis())

    await world.holds.hold(TENANT, basis_id, "ftjob-1")
    await world.holds.pin(TENANT, basis_id)
    await world.holds.let_go(TENANT, "ftjob-1")

    assert await world.owned() == set()
    assert (await world.store.get(basis_id)).basis_id == basis_id


async def test_a_recipe_is_found_as_long_as_its_basis_is_there(world: World) -> None:
    first = await world.put(0, "recipe", "source:1")
    assert await world.holds.find(TENANT, "recipe") == first.basis_id
    assert await world.holds.find(TENANT, "source:1") == first.basis_id
    assert await world.holds.find("umbrella", "recipe") is None

    await world.own.discard(TENANT, first.basis_id)
    assert await world.holds.find(TENANT, "recipe") is None
    await world.put(1, "other")

    assert await world.redis.hkeys(keys.tenant_recipes(TENANT)) == [b"other"]


async def test_the_step_is_stored_beside_the_basis(world: World) -> None:
    basis = await world.put()

    step = await world.store.step(basis)

    assert step is not None
    assert step.equal(basis.P_in)
    assert await world.store.step(small_basis(9)) is None


async def test_room_is_made_by_dropping_what_ended_jobs_held(world: World) -> None:
    """The workers of those jobs died in the last attempt. The holds of living jobs stay."""
    kept, left = await world.put(0), await world.put(1)
    alive, dead = await world.submit(), await world.submit()
    await world.holds.hold(TENANT, kept.basis_id, alive)
    await world.holds.hold(TENANT, left.basis_id, dead)
    await JobQueue(world.redis).cancel(TENANT, dead)
    used = sum((await world.own.of_tenant(TENANT)).values())

    await world.holds.check_quota(TENANT, LIMIT - used)
    assert await world.owned() == {kept.basis_id, left.basis_id}  # the quota sufficed, so nothing was dropped
    await world.holds.check_quota(TENANT, LIMIT - used + 1)
    assert await world.owned() == {kept.basis_id}
    with pytest.raises(QuotaExceeded, match=f"exceed {LIMIT} bytes"):
        await world.holds.check_quota(TENANT, LIMIT)


def test_a_source_is_named_by_all_that_decides_its_basis() -> None:
    base = {"options": {}, "target_modules": None, "calibration": "own", "sha256": "ab"}
    changes = [
        {"options": {"seed": 1}},
        {"target_modules": ["q_proj"]},
        {"calibration": "file-1"},
        {"sha256": "cd"},
    ]
    names = [source_key("lora_sb", 4, **{**base, **change}) for change in [{}, *changes]]  # type: ignore[arg-type]

    assert len({*names, source_key("lora_sb", 8, **base), source_key("lora_da", 4, **base)}) == 7  # type: ignore[arg-type]
    one, other = ({**base, "target_modules": order} for order in (["a", "b"], ["b", "a", "b"]))
    assert source_key("x", 1, **one) == source_key("x", 1, **other)  # type: ignore[arg-type]
