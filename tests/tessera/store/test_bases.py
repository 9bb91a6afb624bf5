"""The basis store on a real server: order of writes, verification, disk cache, races."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from tessera.errors import CorruptRecord, InvalidInput, NotFound, StoreFull, StoreUnavailable
from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.model.base_model import BaseModel
from tessera.redis import keys
from tessera.redis.client import Client, connect
from tessera.store.bases import BasisStore, ensure_basis, recipe_key

OPTIONS = {"method": "lora_xs", "rank": 4, "target_modules": ["q_proj", "v_proj"]}


def small_basis(seed: int = 0, *, rank: int = 3, model_id: str = "m", width: int = 11) -> Basis:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        ModuleShape(f"layer.{i}.q_proj", width, 9): (
            torch.randn(rank, width, generator=generator),
            torch.randn(9, rank, generator=generator),
        )
        for i in range(3)
    }
    return make_basis(model_id=model_id, method="test", factors=factors, recipe={"seed": seed})


def assert_same(actual: Basis, expected: Basis) -> None:
    assert actual.manifest == expected.manifest
    for a, b in zip((*actual.A, *actual.B), (*expected.A, *expected.B), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(actual.P_in, expected.P_in)
    assert torch.equal(actual.P_out, expected.P_out)


@pytest.fixture
def store(redis: Redis) -> BasisStore:
    return BasisStore(redis)


async def test_what_is_put_comes_back(store: BasisStore) -> None:
    basis = small_basis()
    assert await store.put(basis, recipe_key="recipe") == basis.basis_id
    assert await store.find("recipe") == basis.basis_id
    assert await store.manifest(basis.basis_id) == basis.manifest
    assert_same(await store.get(basis.basis_id), basis)


async def test_the_first_basis_of_a_recipe_wins(store: BasisStore) -> None:
    first, second = small_basis(0), small_basis(1)
    assert await store.put(first, recipe_key="recipe") == first.basis_id
    assert await store.put(second, recipe_key="recipe") == first.basis_id
    assert await store.find("recipe") == first.basis_id
    assert_same(await store.get(second.basis_id), second)  # it can still be read by its id


async def test_a_basis_needs_no_recipe(store: BasisStore) -> None:
    basis = small_basis()
    assert await store.put(basis) == basis.basis_id
    assert await store.list() == [basis.manifest]


async def test_the_list_names_each_basis_once(store: BasisStore) -> None:
    bases = [small_basis(rank=rank) for rank in (3, 2)]
    for basis in bases:
        await store.put(basis, recipe_key=f"a{basis.rank}")
        await store.put(basis, recipe_key=f"b{basis.rank}")
        await store.put(basis)
    assert await store.list() == [bases[1].manifest, bases[0].manifest]


@pytest.mark.parametrize("basis_id", ["00" * 32, "", "../../etc/passwd", "AB" * 32, "\ud800"])
async def test_what_is_not_there_is_not_found(redis: Redis, tmp_path: Path, basis_id: str) -> None:
    store = BasisStore(redis, cache_dir=tmp_path)
    for attempt in (store.get(basis_id), store.manifest(basis_id)):
        with pytest.raises(NotFound) as missing:
            await attempt
        assert missing.value.code == "basis_not_found"
    assert await store.find("recipe") is None


async def test_big_factors_travel_in_pieces(store: BasisStore, redis: Redis) -> None:
    basis = small_basis(width=200_000, rank=2)  # 1.6 MB per module: two fit into one reply
    await store.put(basis)
    await redis.config_resetstat()
    assert_same(await store.get(basis.basis_id), basis)
    assert (await redis.info("commandstats"))["cmdstat_mget"]["calls"] == 2


async def test_a_changed_byte_is_refused(store: BasisStore, redis: Redis) -> None:
    basis = small_basis()
    await store.put(basis)
    for key in (keys.basis_module(basis.basis_id, 1), keys.basis_preconditioner(basis.basis_id)):
        good = await redis.getrange(key, 5, 5)
        await redis.setrange(key, 5, bytes([good[0] ^ 1]))  # type: ignore[arg-type]
        with pytest.raises(CorruptRecord, match=basis.basis_id):
            await store.get(basis.basis_id)
        await redis.setrange(key, 5, good)  # type: ignore[arg-type]
    assert_same(await store.get(basis.basis_id), basis)


async def test_lost_factors_are_named(store: BasisStore, redis: Redis) -> None:
    basis = small_basis()
    await store.put(basis)
    await redis.delete(keys.basis_module(basis.basis_id, 1))
    with pytest.raises(CorruptRecord, match=r"lacks layer\.1\.q_proj"):
        await store.get(basis.basis_id)
    await redis.delete(keys.basis_preconditioner(basis.basis_id))
    with pytest.raises(CorruptRecord, match="preconditioner"):
        await store.get(basis.basis_id)


async def test_a_manifest_of_another_basis_is_refused(store: BasisStore, redis: Redis) -> None:
    first, second = small_basis(0), small_basis(1)
    await store.put(first)
    for manifest in (second.manifest.to_json(), first.manifest.to_json().replace("float32", "float99"), "{"):
        await redis.set(keys.basis_manifest(first.basis_id), manifest)
        with pytest.raises(CorruptRecord):
            await store.get(first.basis_id)


async def test_a_store_that_fills_up_leaves_no_name_without_a_basis(store: BasisStore, redis: Redis) -> None:
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreFull):
            await store.put(small_basis(), recipe_key="recipe")
    finally:
        await redis.config_set("maxmemory", "0")
    assert await store.find("recipe") is None
    assert await store.list() == []


async def test_everything_works_on_a_cluster(cluster: RedisCluster) -> None:
    store, basis = BasisStore(cluster), small_basis()
    assert await store.put(basis, recipe_key="recipe") == basis.basis_id
    assert_same(await store.get(basis.basis_id), basis)
    assert await store.list() == [basis.manifest]


# The disk cache


async def test_a_cached_basis_needs_no_server(redis: Redis, tmp_path: Path) -> None:
    basis = small_basis()
    store = BasisStore(redis, cache_dir=tmp_path / "cache")
    await store.put(basis)
    await store.get(basis.basis_id)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{basis.basis_id}.basis"]
    async with connect(f"unix://{tmp_path}/no-server") as nowhere:
        assert_same(await BasisStore(nowhere, cache_dir=tmp_path / "cache").get(basis.basis_id), basis)
        with pytest.raises(StoreUnavailable):
            await BasisStore(nowhere, cache_dir=tmp_path / "empty").get(basis.basis_id)


async def test_spoiled_cache_files_are_replaced(redis: Redis, tmp_path: Path) -> None:
    basis, other = small_basis(0), small_basis(1)
    store = BasisStore(redis, cache_dir=tmp_path)
    for each in (basis, other):
        await store.put(each)
        await store.get(each.basis_id)
    path = tmp_path / f"{basis.basis_id}.basis"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    foreign = (tmp_path / f"{other.basis_id}.basis").read_bytes()
    huge = (1 << 62).to_bytes(8, "little") + good[8:]
    for spoiled in (b"", good[:7], good[:100], good[:-1], good + b"\0", bytes(flipped), foreign, huge):
        path.write_bytes(spoiled)
        assert_same(await store.get(basis.basis_id), basis)
        assert path.read_bytes() == good


async def test_a_cache_that_cannot_be_written_does_no_harm(redis: Redis, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    store, basis = BasisStore(redis, cache_dir=tmp_path / "cache"), small_basis()
    await store.put(basis)
    assert_same(await store.get(basis.basis_id), basis)


# Recipes


def test_a_recipe_is_named_by_what_matters() -> None:
    def name(**changes: object) -> str:
        options = {
            "method": "lora_xs",
            "rank": 8,
            "target_modules": ["a", "b"],
            "seed": 1,
            "dtype": "x",
        }
        return recipe_key("m", **(options | changes))  # type: ignore[arg-type]

    assert name() == name(target_modules=["b", "a", "b"])
    assert name() == recipe_key("m", dtype="x", seed=1, rank=8, method="lora_xs", target_modules=("a", "b"))
    others = [name(rank=4), name(method="x"), name(target_modules=["a"]), name(seed=2), name(alpha=1)]
    assert len({name(), *others, recipe_key("n", method="lora_xs", rank=8, target_modules=["a", "b"])}) == 7


async def test_ensure_builds_once_and_then_finds(store: BasisStore, redis: Redis, tiny: BaseModel) -> None:
    built = await ensure_basis(store, tiny, **OPTIONS)
    assert (built.rank, built.manifest.model_id, built.manifest.dtype) == (4, tiny.model_id, "float16")
    await redis.config_resetstat()
    assert_same(await ensure_basis(store, tiny, **OPTIONS), built)
    assert "cmdstat_set" not in await redis.info("commandstats")
    assert (await ensure_basis(store, tiny, **{**OPTIONS, "rank": 2})).basis_id != built.basis_id
    assert len(await store.list()) == 2


async def test_racers_end_with_the_same_basis(redis_url: str, redis: Redis, tiny: BaseModel) -> None:
    async def race(with_sigma: bool, client: Client) -> Basis:
        store = BasisStore(client)
        # Two machines may get different bytes for one recipe: here the options differ, but not the name.
        other = await ensure_basis(BasisStore(redis), tiny, **OPTIONS, with_sigma=with_sigma)
        winner = await store.put(other, recipe_key="shared")
        return await store.get(winner)

    async with connect(redis_url) as one, connect(redis_url) as two:
        first, second = await asyncio.gather(race(True, one), race(False, two))
        third, fourth = await asyncio.gather(
            ensure_basis(BasisStore(one), tiny, **OPTIONS), ensure_basis(BasisStore(two), tiny, **OPTIONS)
        )
    assert_same(first, second)
    assert_same(third, fourth)


async def test_a_basis_that_was_damaged_is_mended(store: BasisStore, redis: Redis, tiny: BaseModel) -> None:
    built = await ensure_basis(store, tiny, **OPTIONS)
    await redis.delete(keys.basis_module(built.basis_id, 0), keys.basis_manifest(built.basis_id))
    assert_same(await ensure_basis(store, tiny, **OPTIONS), built)
    assert_same(await store.get(built.basis_id), built)


async def test_a_recipe_that_cannot_be_built_leaves_nothing(store: BasisStore, tiny: BaseModel) -> None:
    with pytest.raises(InvalidInput):
        await ensure_basis(store, tiny, **{**OPTIONS, "rank": 10_000})
    assert await store.list() == []
