"""Uploaded files on a real server: complete or absent, verified, listed newest first."""

from __future__ import annotations

import asyncio
import hashlib
import os

import pytest
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from tessera.errors import CorruptRecord, NotFound, StoreFull, StoreUnavailable
from tessera.redis import keys
from tessera.store.files import CHUNK_BYTES, FileRecord, FileStore

ALICE, BOB = "alice", "bob"


@pytest.fixture
def store(redis: Redis) -> FileStore:
    return FileStore(redis)


async def put(store: FileStore, content: bytes = b"{}\n", **options: object) -> FileRecord:
    values = {"filename": "train.jsonl", "purpose": "fine-tune", **options}
    return await store.put(ALICE, content=content, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES // 2])
async def test_what_is_put_comes_back(store: FileStore, redis: Redis, size: int) -> None:
    content = os.urandom(size)
    record = await put(store, content, filename="naïve 好.jsonl", num_examples=3)
    assert record.file_id.startswith("file-")
    assert (record.tenant, record.filename, record.purpose) == (ALICE, "naïve 好.jsonl", "fine-tune")
    assert (record.bytes, record.num_examples) == (size, 3)
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert await store.get(ALICE, record.file_id) == record
    assert await store.content(ALICE, record.file_id) == content
    assert await redis.ttl(keys.file_content(ALICE, record.file_id)) == (-1 if size else -2)


async def test_the_number_of_examples_may_be_unknown(store: FileStore) -> None:
    record = await put(store)
    assert record.num_examples is None
    assert await store.get(ALICE, record.file_id) == record


@pytest.mark.parametrize("file_id", ["file-" + "0" * 24, "", "file-", "x:y", "\ud800", "file-" + "0" * 25])
async def test_what_is_not_there_is_not_found(store: FileStore, file_id: str) -> None:
    for attempt in (
        store.get(ALICE, file_id),
        store.content(ALICE, file_id),
        store.list(ALICE, after=file_id or "?"),
    ):
        with pytest.raises(NotFound) as missing:
            await attempt
        assert missing.value.code == "file_not_found"
    assert not await store.delete(ALICE, file_id)


async def test_tenants_do_not_see_each_other(store: FileStore) -> None:
    record = await put(store)
    for attempt in (store.get(BOB, record.file_id), store.content(BOB, record.file_id)):
        with pytest.raises(NotFound):
            await attempt
    assert not await store.delete(BOB, record.file_id)
    assert await store.list(BOB) == ([], False)
    assert await store.content(ALICE, record.file_id) == b"{}\n"


async def test_pages_are_newest_first_and_cover_all(store: FileStore) -> None:
    records = [await put(store, str(i).encode()) for i in range(7)]
    seen: list[FileRecord] = []
    has_more = True
    while has_more:
        page, has_more = await store.list(ALICE, after=seen[-1].file_id if seen else None, limit=3)
        seen += page
    assert seen == records[::-1]
    assert (await store.list(ALICE, limit=7))[1] is False


async def test_a_deleted_file_leaves_nothing(store: FileStore, redis: Redis) -> None:
    record = await put(store)
    assert await store.delete(ALICE, record.file_id)
    assert not await store.delete(ALICE, record.file_id)
    with pytest.raises(NotFound):
        await store.get(ALICE, record.file_id)
    assert await store.list(ALICE) == ([], False)
    assert {key async for key in redis.scan_iter()} == {keys.tenants().encode()}


async def test_a_changed_or_shortened_content_is_refused(store: FileStore, redis: Redis) -> None:
    record = await put(store, b"line one\nline two\n")
    key = keys.file_content(ALICE, record.file_id)
    await redis.setrange(key, 3, "X")
    with pytest.raises(CorruptRecord, match=record.file_id):
        await store.content(ALICE, record.file_id)
    await redis.set(key, "line one\n")
    with pytest.raises(CorruptRecord):
        await store.content(ALICE, record.file_id)
    await redis.hdel(keys.file_record(ALICE, record.file_id), "bytes")
    with pytest.raises(CorruptRecord, match="cannot be read"):
        await store.get(ALICE, record.file_id)


async def beginning_of_an_upload(redis: Redis) -> bytes:
    """Return the key of a content of many pieces, as soon as the first piece is stored."""
    while not (names := await redis.keys(f"{keys.file_content(ALICE, 'file-')}*")):
        pass  # no sleep: only a few ms are left until the last piece
    return names[0]


async def test_an_upload_that_breaks_off_is_invisible_and_expires(store: FileStore, redis: Redis) -> None:
    upload = asyncio.create_task(put(store, os.urandom(256 * CHUNK_BYTES)))
    name = await beginning_of_an_upload(redis)
    while not upload.done():
        # redis-py loses a cancellation that arrives with a reply, as `wait_for` does before Python 3.12.
        upload.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert await store.list(ALICE) == ([], False)
    assert await redis.ttl(name) > 0


async def test_an_upload_whose_beginning_expired_is_not_accepted(store: FileStore, redis: Redis) -> None:
    upload = asyncio.create_task(put(store, os.urandom(256 * CHUNK_BYTES)))
    await redis.delete(await beginning_of_an_upload(redis))
    with pytest.raises(StoreUnavailable, match="paused"):
        await upload
    assert await store.list(ALICE) == ([], False)


async def test_a_full_store_refuses(store: FileStore, redis: Redis) -> None:
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreFull):
            await put(store)
    finally:
        await redis.config_set("maxmemory", "0")
    assert await store.list(ALICE) == ([], False)


async def test_everything_works_on_a_cluster(cluster: RedisCluster) -> None:
    store = FileStore(cluster)
    records = [await put(store, os.urandom(CHUNK_BYTES + 1)) for _ in range(2)]
    assert (await store.list(ALICE, after=records[1].file_id)) == ([records[0]], False)
    assert len(await store.content(ALICE, records[0].file_id)) == CHUNK_BYTES + 1
    assert await store.delete(ALICE, records[0].file_id)
