"""The adapter store on a real server: versions, alias, deletion, races, broken connections, a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from tessera.errors import AdapterDeleted, CorruptRecord, InvalidInput, NotFound, StoreFull
from tessera.formats.adapter import Adapter, read_header
from tessera.formats.adapter_ref import AdapterRef
from tessera.redis import keys
from tessera.redis.client import connect
from tessera.store.adapters import AdapterStore, AdapterVersion
from tests.servers import CuttingProxy

BASIS = "ab" * 32
ALICE, BOB = "alice", "bob"


def make_adapter(seed: int = 0, *, basis_id: str = BASIS, num_modules: int = 3, rank: int = 4) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(basis_id, torch.randn(num_modules, rank, rank, generator=generator), {"seed": seed})


@pytest.fixture
def store(redis: Redis) -> AdapterStore:
    return AdapterStore(redis)


async def publish(store: AdapterStore, name: str = "a", seed: int = 0, **options: object) -> AdapterVersion:
    return await store.publish(ALICE, name, make_adapter(seed), dtype=torch.float32, **options)  # type: ignore[arg-type]


# Publishing


async def test_what_is_published_can_be_resolved_and_fetched(store: AdapterStore) -> None:
    adapter = make_adapter(1)
    version = await store.publish(
        ALICE, "a", adapter, dtype=torch.float32, job_id="ftjob-1", base_model_id="m"
    )
    ref = await store.resolve(ALICE, "a")
    (blob,) = await store.fetch([ref])
    assert blob is not None
    assert ref == AdapterRef(ALICE, "a", 1, BASIS, read_header(blob).checksum.hex())
    assert torch.equal(Adapter.from_bytes(blob, basis_id=BASIS).R, adapter.R)
    record = await store.get(ALICE, "a")
    assert record.versions == (version,)
    assert (version.version, version.bytes, version.rank, version.dtype) == (1, len(blob), 4, "float32")
    assert (version.job_id, version.metadata, version.basis_id) == ("ftjob-1", {"seed": 1}, BASIS)
    assert (record.active_version, record.latest_version, record.base_model_id) == (1, 1, "m")
    assert record.created_at == record.updated_at == version.created_at


async def test_versions_are_immutable_and_the_newest_is_active(store: AdapterStore) -> None:
    refs = []
    for seed in range(3):
        assert (await publish(store, seed=seed)).version == seed + 1
        refs.append(await store.resolve(ALICE, "a"))
    for seed, blob in enumerate(await store.fetch(refs)):
        assert blob is not None
        assert read_header(blob).version == seed + 1
        assert torch.equal(Adapter.from_bytes(blob).R, make_adapter(seed).R)
    record = await store.get(ALICE, "a")
    assert [version.version for version in record.versions] == [1, 2, 3]
    assert record.created_at <= record.updated_at


async def test_a_job_publishes_once(store: AdapterStore) -> None:
    first = await publish(store, job_id="ftjob-1")
    await publish(store, seed=1, job_id="ftjob-2")
    assert await publish(store, seed=9, job_id="ftjob-1") == first
    record = await store.get(ALICE, "a")
    assert (record.active_version, len(record.versions)) == (2, 2)


async def test_a_basis_may_change_between_versions(store: AdapterStore) -> None:
    await publish(store)
    await store.publish(ALICE, "a", make_adapter(basis_id="cd" * 32), dtype=torch.int8)
    assert (await store.resolve(ALICE, "a")).basis_id == "cd" * 32
    assert (await store.resolve(ALICE, "a", 1)).basis_id == BASIS
    await store.activate(ALICE, "a", 1)
    assert (await store.resolve(ALICE, "a")).basis_id == BASIS


@pytest.mark.parametrize("name", ["", "A", "a/b", "a:b", "a@1", "-a", "a" * 65, "ä", "a\n", "{a}", "\ud800"])
async def test_what_cannot_be_a_name_is_refused_and_never_found(store: AdapterStore, name: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        await publish(store, name)
    assert refused.value.param == "adapter_id"
    with pytest.raises(InvalidInput):
        await store.deletion_count(ALICE, name)
    with pytest.raises(InvalidInput):
        await store.list(ALICE, after=name)
    for attempt in (store.get(ALICE, name), store.resolve(ALICE, name), store.activate(ALICE, name, 1)):
        with pytest.raises(NotFound):
            await attempt
    assert not await store.delete(ALICE, name)


async def test_values_that_do_not_fit_leave_nothing_behind(store: AdapterStore) -> None:
    adapter = Adapter(BASIS, torch.full((1, 2, 2), 1e6))
    with pytest.raises(InvalidInput):
        await store.publish(ALICE, "a", adapter, dtype=torch.float16)
    with pytest.raises(NotFound):
        await store.get(ALICE, "a")


async def test_a_full_store_refuses_and_keeps_what_it_has(store: AdapterStore, redis: Redis) -> None:
    await publish(store)
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreFull):
            await publish(store)
        assert (await store.get(ALICE, "a")).latest_version == 1
        assert await store.delete(ALICE, "a")
    finally:
        await redis.config_set("maxmemory", "0")


# Reading


async def test_what_is_not_there_is_not_found(store: AdapterStore) -> None:
    for attempt in (store.get(ALICE, "a"), store.resolve(ALICE, "a"), store.activate(ALICE, "a", 1)):
        with pytest.raises(NotFound) as missing:
            await attempt
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    await publish(store)
    for version in (0, 2, -1, 10**9 - 1):
        with pytest.raises(NotFound, match=f"version {version} of"):
            await store.resolve(ALICE, "a", version)
        with pytest.raises(NotFound, match=f"version {version} of"):
            await store.activate(ALICE, "a", version)


async def test_tenants_do_not_see_each_other(store: AdapterStore) -> None:
    await publish(store)
    await store.publish(BOB, "a", make_adapter(7), dtype=torch.float32)
    for tenant, seed in ((ALICE, 0), (BOB, 7)):
        assert (await store.get(tenant, "a")).versions[0].metadata == {"seed": seed}
    assert await store.delete(ALICE, "a")
    assert (await store.resolve(BOB, "a")).version == 1
    with pytest.raises(NotFound):
        await store.resolve(ALICE, "a")
    assert await store.list(ALICE) == ([], False)


async def test_fetch_keeps_the_order_and_marks_what_is_gone(store: AdapterStore, redis: Redis) -> None:
    for name in ("a", "b", "c"):
        await publish(store, name, seed=ord(name))
    refs = [await store.resolve(ALICE, name) for name in ("c", "a", "b")]
    gone = replace(refs[0], version=9)
    await redis.delete(keys.adapter_blob(ALICE, "b", 1))
    blobs = await store.fetch([refs[0], gone, refs[1], refs[2], refs[0]])
    seeds = [None if blob is None else Adapter.from_bytes(blob).metadata["seed"] for blob in blobs]
    assert seeds == [ord("c"), None, ord("a"), None, ord("c")]
    assert await store.fetch([]) == []


async def test_a_big_batch_is_asked_for_in_pieces(store: AdapterStore, redis: Redis) -> None:
    big = make_adapter(num_modules=16, rank=128)  # 1 MiB: four fit one reply with their headers, not five
    for i in range(6):
        await store.publish(ALICE, f"a{i}", big, dtype=torch.float32)
    refs = [await store.resolve(ALICE, f"a{i}") for i in range(6)]
    await redis.config_resetstat()
    assert None not in await store.fetch(refs)
    assert (await redis.info("commandstats"))["cmdstat_mget"][
        "calls"
    ] == 3  # one to learn the size, then 3 and 2 adapters
    await redis.config_resetstat()
    assert None not in await store.fetch(refs)
    assert (await redis.info("commandstats"))["cmdstat_mget"]["calls"] == 2


async def commands_of(redis: Redis, *calls: Awaitable[AdapterRef]) -> tuple[list[AdapterRef], dict[str, int]]:
    """Return the results of the calls, and how often each command was run for them."""
    await redis.config_resetstat()
    refs = [await call for call in calls]
    stats = (await redis.info("commandstats")).items()
    names = {name.removeprefix("cmdstat_"): int(row["calls"]) for name, row in stats}
    return refs, {name: count for name, count in names.items() if not name.startswith("config")}


async def test_resolve_is_one_round_trip(store: AdapterStore, redis: Redis) -> None:
    await publish(store)
    _, commands = await commands_of(redis, store.resolve(ALICE, "a"))
    assert commands == {"hmget": 1}
    refs, commands = await commands_of(redis, store.resolve(ALICE, "a"), store.resolve(ALICE, "a", 1))
    assert commands == {"hmget": 1, "hget": 1, "getrange": 1}  # hget and getrange in one pipeline
    assert refs[0] == refs[1]


async def test_a_record_of_an_earlier_release_learns_its_checksum_once(
    store: AdapterStore, redis: Redis
) -> None:
    for seed in (1, 2):
        await publish(store, seed=seed)
    expected = await store.resolve(ALICE, "a")
    record = keys.adapter_record(ALICE, "a")
    await redis.hdel(record, "checksum")
    refs, commands = await commands_of(redis, *(store.resolve(ALICE, "a") for _ in range(3)))
    assert refs == [expected] * 3
    assert (commands["hmget"], commands["getrange"]) == (3 + 1, 1)  # one of them inside the script

    await redis.hset(record, "active", "1")  # as the rollback of an earlier release writes it
    assert await store.resolve(ALICE, "a") == await store.resolve(ALICE, "a", 1) != expected


async def test_a_record_of_an_earlier_release_resolves_in_a_full_store(
    store: AdapterStore, redis: Redis
) -> None:
    await publish(store)
    expected = await store.resolve(ALICE, "a")
    await redis.hdel(keys.adapter_record(ALICE, "a"), "checksum")
    await redis.config_set("maxmemory", 1)
    try:
        assert await store.resolve(ALICE, "a") == expected
    finally:
        await redis.config_set("maxmemory", 0)


async def test_the_same_version_with_other_weights_is_another_reference(store: AdapterStore) -> None:
    await publish(store, "a", seed=1)
    await publish(store, "b", seed=1)
    first, second = await store.resolve(ALICE, "a"), await store.resolve(ALICE, "b")
    assert first == replace(second, adapter_id="a")
    await publish(store, "b", seed=2)
    await publish(store, "a", seed=3)
    assert (await store.resolve(ALICE, "a")).checksum != (await store.resolve(ALICE, "b")).checksum
    await store.activate(ALICE, "a", 1)
    assert await store.resolve(ALICE, "a") == first


async def test_a_broken_record_fails_alone(store: AdapterStore, redis: Redis) -> None:
    await publish(store, "good")
    await publish(store, "bad")
    await redis.hset(keys.adapter_record(ALICE, "bad"), "v:1", "{")
    with pytest.raises(CorruptRecord):
        await store.get(ALICE, "bad")
    records, _ = await store.list(ALICE)
    assert [record.adapter_id for record in records] == ["good"]
    assert await store.delete(ALICE, "bad")


# Listing and counting


async def test_pages_cover_all_adapters_once(store: AdapterStore) -> None:
    names = {f"user-{i}" for i in range(25)}
    for name in names:
        await publish(store, name)
    await store.publish(BOB, "other", make_adapter(), dtype=torch.float32)
    seen: list[str] = []
    after, has_more = None, True
    while has_more:
        records, has_more = await store.list(ALICE, after=after, limit=7)
        assert len(records) == 7 or not has_more
        seen += [record.adapter_id for record in records]
        after = seen[-1]
    assert len(seen) == 25
    assert set(seen) == names
    assert seen == sorted(seen, key=lambda name: (keys.bucket(name), name))


async def test_a_page_goes_on_after_an_adapter_that_is_gone(store: AdapterStore) -> None:
    for name in "abcdef":
        await publish(store, name)
    first, _ = await store.list(ALICE, limit=3)
    await store.delete(ALICE, first[-1].adapter_id)
    rest, has_more = await store.list(ALICE, after=first[-1].adapter_id, limit=3)
    assert not has_more
    assert {r.adapter_id for r in first} | {r.adapter_id for r in rest} == set("abcdef")


async def test_exact_pages_say_that_nothing_follows(store: AdapterStore) -> None:
    for name in "abc":
        await publish(store, name)
    assert (await store.list(ALICE, limit=3))[1] is False
    assert (await store.list(ALICE, limit=2))[1] is True


async def test_count_is_over_all_tenants(store: AdapterStore) -> None:
    assert await store.count() == 0
    for name in "abc":
        await publish(store, name)
        await publish(store, name)
    await store.publish(BOB, "a", make_adapter(), dtype=torch.float32)
    assert await store.count() == 4
    await store.delete(ALICE, "b")
    assert await store.count() == 3


# Deleting


async def test_a_deleted_adapter_is_gone_with_all_its_versions(store: AdapterStore, redis: Redis) -> None:
    await publish(store)
    await publish(store)
    refs = [await store.resolve(ALICE, "a", version) for version in (1, 2)]
    assert await store.delete(ALICE, "a")
    assert not await store.delete(ALICE, "a")
    assert await store.fetch(refs) == [None, None]
    left = {key async for key in redis.scan_iter()}
    tombstone = keys.adapter_tombstone(ALICE, "a")
    assert left == {name.encode() for name in (tombstone, keys.tenants(), keys.tenant_buckets(ALICE))}
    assert 0 < await redis.ttl(tombstone) <= keys.TOMBSTONE_TTL_S


async def test_work_begun_before_a_deletion_cannot_undo_it(store: AdapterStore) -> None:
    before = await store.deletion_count(ALICE, "a")
    assert before == 0
    await publish(store)
    await store.delete(ALICE, "a")
    with pytest.raises(AdapterDeleted):
        await publish(store, deletion_count=before, job_id="ftjob-late")
    with pytest.raises(NotFound):
        await store.get(ALICE, "a")


async def test_a_job_that_published_before_the_deletion_cannot_do_so_again(store: AdapterStore) -> None:
    await publish(store, job_id="ftjob-1", deletion_count=0)
    await store.delete(ALICE, "a")
    with pytest.raises(AdapterDeleted):
        await publish(store, job_id="ftjob-1", deletion_count=0)


async def test_a_new_adapter_of_the_name_goes_on_counting(store: AdapterStore) -> None:
    await publish(store)
    await publish(store)
    await store.delete(ALICE, "a")
    deletion_count = await store.deletion_count(ALICE, "a")
    assert deletion_count > 0
    version = await publish(store, deletion_count=deletion_count, job_id="ftjob-new")
    assert version.version == 3  # caches may hold versions 1 and 2 of this name
    await store.delete(ALICE, "a")
    assert await store.deletion_count(ALICE, "a") > deletion_count
    assert (await publish(store)).version == 4


async def test_generations_grow_even_after_a_tombstone_has_expired(store: AdapterStore, redis: Redis) -> None:
    await publish(store)
    await store.delete(ALICE, "a")
    old = await store.deletion_count(ALICE, "a")
    await redis.delete(keys.adapter_tombstone(ALICE, "a"))  # as if it had expired
    assert (await publish(store, deletion_count=old)).version == 1
    await asyncio.sleep(0.002)  # the deletion count is a time in ms
    await store.delete(ALICE, "a")
    with pytest.raises(AdapterDeleted):
        await publish(store, deletion_count=old)


# Races and broken connections


async def test_writers_of_one_adapter_do_not_lose_versions(store: AdapterStore, redis_url: str) -> None:
    async def writer(number: int) -> list[int]:
        async with connect(redis_url) as client:
            own = AdapterStore(client)
            return [(await publish(own, seed=number)).version for _ in range(8)]

    published = await asyncio.gather(*(writer(number) for number in range(6)))
    versions = sorted(version for row in published for version in row)
    assert versions == list(range(1, 49))
    record = await store.get(ALICE, "a")
    assert record.active_version == record.latest_version == 48
    refs = [AdapterRef(ALICE, "a", version, BASIS) for version in versions]
    for version, blob in zip(record.versions, await store.fetch(refs), strict=True):
        assert blob is not None
        assert read_header(blob).version == version.version
        assert Adapter.from_bytes(blob).metadata == version.metadata


async def test_deleting_and_publishing_at_once_leave_all_or_nothing(
    store: AdapterStore, redis: Redis
) -> None:
    await publish(store)
    for _ in range(10):
        results = await asyncio.gather(
            *(publish(store, seed=i) for i in range(4)), store.delete(ALICE, "a"), return_exceptions=True
        )
        assert all(isinstance(result, AdapterVersion | bool | AdapterDeleted) for result in results)
        blobs = {key async for key in redis.scan_iter(match=f"{keys.adapter_record(ALICE, 'a')}:*")}
        try:
            record = await store.get(ALICE, "a")
            expected = {keys.adapter_blob(ALICE, "a", v.version).encode() for v in record.versions}
        except NotFound:
            expected = set()
        assert blobs == expected
        await publish(store)


@pytest.fixture
async def proxy(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[CuttingProxy]:
    async with CuttingProxy(tmp_path / "proxy", redis_url).running() as running:
        yield running


@pytest.mark.parametrize("job_id", [None, "ftjob-1"])
async def test_a_publish_whose_reply_is_lost_happens_once(
    store: AdapterStore, proxy: CuttingProxy, job_id: str | None
) -> None:
    await publish(store)  # loads the script, so that the first EVALSHA succeeds
    async with connect(proxy.url) as client:
        proxy.cut_after(b"EVALSHA")
        version = await publish(AdapterStore(client), job_id=job_id)
    assert proxy.cuts == 1
    assert version.version == 2
    assert len((await store.get(ALICE, "a")).versions) == 2


async def test_a_deletion_whose_reply_is_lost_is_done(store: AdapterStore, proxy: CuttingProxy) -> None:
    await publish(store, "other")
    await store.delete(ALICE, "other")
    await publish(store)
    async with connect(proxy.url) as client:
        proxy.cut_after(b"EVALSHA")
        await AdapterStore(client).delete(ALICE, "a")
    assert proxy.cuts == 1
    with pytest.raises(NotFound):
        await store.get(ALICE, "a")


# Against a model of the expected state


Operation = tuple[str, str, object]
operations = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from("ab"), st.sampled_from([None, "j1", "j2"])),
        st.tuples(st.just("publish_old"), st.sampled_from("ab"), st.just(None)),
        st.tuples(st.just("activate"), st.sampled_from("ab"), st.integers(1, 4)),
        st.tuples(st.just("delete"), st.sampled_from("ab"), st.just(None)),
    ),
    max_size=25,
)


class Expected:
    """The expected state of one adapter."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.active = 0
        self.last = 0  # highest version number ever used
        self.jobs: dict[str, int] = {}
        self.deletion_counts = [0]

    def publish(self, job_id: str | None) -> int:
        if job_id in self.jobs:
            return self.jobs[job_id]
        self.last += 1
        self.versions.append(self.last)
        self.active = self.last
        if job_id is not None:
            self.jobs[job_id] = self.last
        return self.last


@settings(max_examples=25)
@given(operations)
def test_any_sequence_does_what_a_dictionary_would(redis_url: str, sequence: list[Operation]) -> None:
    asyncio.run(run_sequence(redis_url, sequence))


async def run_sequence(redis_url: str, sequence: list[Operation]) -> None:
    async with connect(redis_url) as client:
        await client.flushall()
        store, expected = AdapterStore(client), {"a": Expected(), "b": Expected()}
        for action, name, argument in sequence:
            await apply(store, expected[name], action, name, argument)
            await check(store, expected)
        await client.flushall()


async def apply(store: AdapterStore, model: Expected, action: str, name: str, argument: object) -> None:
    if action == "publish":
        job_id = argument if isinstance(argument, str) else None
        version = await publish(store, name, job_id=job_id, deletion_count=model.deletion_counts[-1])
        assert version.version == model.publish(job_id)
    elif action == "publish_old" and len(model.deletion_counts) > 1:
        with pytest.raises(AdapterDeleted):
            await publish(store, name, deletion_count=model.deletion_counts[-2])
    elif action == "activate" and isinstance(argument, int):
        if argument in model.versions:
            model.active = argument
            assert (await store.activate(ALICE, name, argument)).active_version == argument
        else:
            with pytest.raises(NotFound):
                await store.activate(ALICE, name, argument)
    elif action == "delete":
        assert await store.delete(ALICE, name) == bool(model.versions)
        if model.versions:
            model.versions, model.jobs = [], {}
            model.deletion_counts.append(await store.deletion_count(ALICE, name))
            assert model.deletion_counts == sorted(set(model.deletion_counts))


async def check(store: AdapterStore, expected: dict[str, Expected]) -> None:
    there = {name: model for name, model in expected.items() if model.versions}
    records, has_more = await store.list(ALICE)
    assert not has_more
    assert {r.adapter_id: [v.version for v in r.versions] for r in records} == {
        name: model.versions for name, model in there.items()
    }
    assert {r.adapter_id: r.active_version for r in records} == {n: m.active for n, m in there.items()}
    assert await store.count() == len(there)
    refs = [AdapterRef(ALICE, name, v, BASIS) for name, model in there.items() for v in model.versions]
    blobs = await store.fetch(refs)
    assert [None if b is None else read_header(b).version for b in blobs] == [ref.version for ref in refs]


async def test_everything_works_on_a_cluster(cluster: RedisCluster) -> None:
    store = AdapterStore(cluster)
    for i in range(12):
        await publish(store, f"a{i}", seed=i, job_id=f"ftjob-{i}")
    await publish(store, "a0", seed=99)
    refs = [await store.resolve(ALICE, f"a{i}") for i in range(12)]
    blobs = await store.fetch([replace(refs[3], version=7), *refs])
    assert blobs[0] is None
    seeds = [Adapter.from_bytes(blob).metadata["seed"] for blob in blobs[1:] if blob is not None]
    assert seeds == [99, *range(1, 12)]
    records, has_more = await store.list(ALICE, limit=10)
    assert (len(records), has_more) == (10, True)
    assert (await store.activate(ALICE, "a0", 1)).active_version == 1
    assert await store.delete(ALICE, "a0")
    assert await store.count() == 11
    with pytest.raises(AdapterDeleted):
        await publish(store, "a0", deletion_count=0)
