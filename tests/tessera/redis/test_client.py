"""The client against real servers that are gone, stalled, full, loading or read-only."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, ResponseError

from tessera.errors import InvalidInput, StoreFull, StoreUnavailable
from tessera.redis.client import Script, connect, translate_errors
from tests.servers import run_server
from tests.waiting import wait_until

KEY = "tessera:{test}:key"
SET = Script("return redis.call('SET', KEYS[1], ARGV[1])")


def on_socket(folder: Path) -> list[str]:
    return ["--port", "0", "--unixsocket", str(folder / "s")]


async def answers(url: str) -> bool:
    client = connect(url)
    try:
        with translate_errors():
            return bool(await client.ping())
    except StoreUnavailable:
        return False
    finally:
        await client.aclose()


# Scripts


async def test_a_script_runs_on_a_server_that_has_never_seen_it(redis: Redis) -> None:
    await redis.script_flush()
    assert await SET(redis, keys=[KEY], args=["first"]) == b"OK"
    assert await redis.script_exists(SET.sha1) == [True]
    assert await SET(redis, keys=[KEY], args=[b"\x00\xff"]) == b"OK"
    assert await redis.get(KEY) == b"\x00\xff"


async def test_an_error_inside_a_script_is_our_bug_and_passes_unchanged(redis: Redis) -> None:
    await redis.set(KEY, "text")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await Script("return redis.call('LPUSH', KEYS[1], 1)")(redis, keys=[KEY])


# Connecting


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "redis://host?socket_timeout=soon"])
def test_a_malformed_url_names_the_setting(url: str) -> None:
    with pytest.raises(InvalidInput, match="TESSERA_STORE_URL is malformed") as refused:
        connect(url)
    assert refused.value.param == "TESSERA_STORE_URL"


async def test_a_server_that_speaks_only_resp2_is_reached_by_an_option_of_the_url(redis_url: str) -> None:
    client = connect(f"{redis_url}?protocol=2")
    assert (await client.execute_command("CLIENT", "INFO")).find(b"resp=2") > 0
    assert await SET(client, keys=[KEY], args=[1]) == b"OK"
    await client.flushall()
    await client.aclose()


# Servers in trouble


async def test_no_server(tmp_path: Path) -> None:
    client = connect(f"unix://{tmp_path}/nothing")
    with pytest.raises(StoreUnavailable, match="ConnectionError"), translate_errors():
        await client.get(KEY)
    with pytest.raises(StoreUnavailable):
        await SET(client, keys=[KEY], args=[1])
    await client.aclose()


async def test_a_stalled_server_is_given_up_after_the_time_out(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    with run_server(tmp_path, *on_socket(tmp_path)) as server:
        await wait_until(lambda: answers(url))
        client = connect(url, timeout_s=1.0)
        await client.set(KEY, 1)
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(StoreUnavailable, match="TimeoutError"), translate_errors():
            await client.get(f"{KEY}:other")
        os.kill(server.pid, signal.SIGCONT)
        await wait_until(lambda: answers(url))
        assert await client.get(KEY) == b"1"  # not the reply that arrived too late
        await client.aclose()


async def test_a_restarted_server_is_found_by_the_next_call(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    client = connect(url)
    for _ in range(2):
        with run_server(tmp_path, *on_socket(tmp_path)):
            await wait_until(lambda: answers(url))
            assert await client.ping()
            assert await SET(client, keys=[KEY], args=[1]) == b"OK"
    await client.aclose()


async def test_a_full_server_refuses_writes_and_still_reads(redis: Redis) -> None:
    await redis.set(KEY, "kept")
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreFull), translate_errors():
            await redis.set(KEY, "new")
        with pytest.raises(StoreFull):
            await SET(redis, keys=[KEY], args=["new"])
        assert await redis.get(KEY) == b"kept"
        assert await redis.delete(KEY) == 1
    finally:
        await redis.config_set("maxmemory", "0")


async def test_a_replica_is_no_place_to_write(redis: Redis) -> None:
    await redis.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(StoreUnavailable, match="read only"), translate_errors():
            await redis.set(KEY, "new")
        with pytest.raises(StoreUnavailable, match="read only"):
            await SET(redis, keys=[KEY], args=["new"])
    finally:
        await redis.replicaof("NO", "ONE")


async def test_a_server_that_loads_its_data_is_unavailable_and_not_broken(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    options = [*on_socket(tmp_path), "--appendonly", "yes", "--rdbcompression", "no"]
    client = connect(url)
    with run_server(tmp_path, *options):
        await wait_until(lambda: answers(url))
        await client.mset({f"{KEY}:{i}": "x" * 2048 for i in range(500)})
        await client.bgrewriteaof()
        await wait_until(lambda: rewritten(client))
    slowly = ["--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024"]
    with run_server(tmp_path, *options, *slowly):
        await wait_until(lambda: (tmp_path / "s").exists())
        with pytest.raises(StoreUnavailable, match="loading"), translate_errors():
            await client.get(KEY)
        with pytest.raises(StoreUnavailable):
            await SET(client, keys=[KEY], args=[1])
    await client.aclose()


async def rewritten(client: Redis) -> bool:
    info = await client.info("persistence")
    return info["aof_rewrite_in_progress"] == 0 and info["aof_rewrite_scheduled"] == 0


@pytest.mark.parametrize(
    "reply", ["MISCONF Errors writing to the AOF file: No space left", "CLUSTERDOWN", "BUSY x"]
)
def test_other_replies_that_mean_not_now(reply: str) -> None:
    with pytest.raises(StoreUnavailable, match=reply.split()[0]), translate_errors():
        raise ResponseError(reply)


def test_what_is_neither_passes_unchanged() -> None:
    with pytest.raises(StoreUnavailable), translate_errors():
        raise BusyLoadingError("LOADING")
    with pytest.raises(ResponseError, match="WRONGTYPE"), translate_errors():
        raise ResponseError("WRONGTYPE Operation against a key")
    with pytest.raises(KeyError), translate_errors():
        raise KeyError("x")
