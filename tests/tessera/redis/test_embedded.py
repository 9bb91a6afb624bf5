"""The supervised local server: it keeps its data, ends with its processes, and is restarted when it dies."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tessera.errors import StoreUnavailable
from tessera.redis.binary import find_binary, server_version
from tessera.redis.client import connect, translate_errors
from tessera.redis.embedded import MAX_SOCKET_PATH_BYTES, EmbeddedStore, socket_path, store_url
from tessera.settings import CommonSettings
from tests.waiting import has_ended, wait_until

KEY = "tessera:{test}:key"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "d"


@contextmanager
def started(data_dir: Path) -> Iterator[tuple[EmbeddedStore, str]]:
    store = EmbeddedStore(data_dir)
    try:
        yield store, store.start(timeout_s=60)
    finally:
        store.stop()


@contextmanager
def parent_process(data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start another process with a store of the same folder; yield it and its URL."""
    command = [sys.executable, str(Path(__file__).with_name("embedded_parent.py")), str(data_dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


async def read(url: str) -> bytes | None:
    """Return the value of KEY, None if the server does not answer or has no such key."""
    async with connect(url) as client:
        try:
            with translate_errors():
                return await client.get(KEY)
        except StoreUnavailable:
            return None


async def write(url: str, value: str) -> None:
    async with connect(url) as client:
        await client.set(KEY, value)


async def setting(url: str, name: str) -> str:
    async with connect(url) as client:
        return (await client.config_get(name))[name]


def server_of(process: subprocess.Popen[str]) -> psutil.Process:
    (server,) = psutil.Process(process.pid).children()
    return server


# Life and death


async def test_data_survive_a_restart(data_dir: Path) -> None:
    with started(data_dir) as (store, url):
        await write(url, "kept")
        pid = store.server_pid()
        assert pid is not None
    assert not psutil.pid_exists(pid)
    assert store.server_pid() is None
    with started(data_dir) as (_, url):
        assert await read(url) == b"kept"


async def test_the_same_object_can_start_again(data_dir: Path) -> None:
    store = EmbeddedStore(data_dir)
    await write(store.start(timeout_s=60), "kept")
    store.stop()
    store.stop()
    assert await read(store.start(timeout_s=60)) == b"kept"
    store.stop()


async def test_a_killed_server_comes_back_with_its_data(data_dir: Path) -> None:
    with started(data_dir) as (store, url):
        await write(url, "kept")
        for _ in range(4):  # more often than a server that never starts is tried
            first = store.server_pid()
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await wait_until(lambda old=first: store.server_pid() not in (None, old), 60)
            await wait_until(lambda: read(url), 60)
        assert await read(url) == b"kept"


async def test_killing_the_parent_ends_the_server(data_dir: Path) -> None:
    with parent_process(data_dir) as (parent, url):
        await write(url, "kept")
        server = server_of(parent)
        parent.kill()
        parent.wait()
        await wait_until(lambda: has_ended(server.pid))
    with started(data_dir) as (_, url):
        assert await read(url) == b"kept"


async def test_ctrl_c_reaches_the_parent_only(data_dir: Path) -> None:
    with started(data_dir) as (store, _):
        pid = store.server_pid()
        assert pid is not None
        assert os.getsid(pid) != os.getsid(0)


# Several processes


async def test_a_second_process_attaches_and_takes_over(data_dir: Path) -> None:
    with parent_process(data_dir) as (parent, url):
        await write(url, "kept")
        with started(data_dir) as (store, own_url):
            assert own_url == url
            assert store.server_pid() is None
            assert await read(own_url) == b"kept"
            parent.kill()
            parent.wait()
            await wait_until(store.server_pid, 60)
            await wait_until(lambda: read(own_url), 60)
            await write(own_url, "kept again")
        assert await read(own_url) is None
    with started(data_dir) as (_, url):
        assert await read(url) == b"kept again"


async def test_an_attached_store_that_stops_leaves_the_server_alone(data_dir: Path) -> None:
    with started(data_dir) as (holder, url):
        pid = holder.server_pid()
        with started(data_dir) as (guest, _):
            assert guest.server_pid() is None
        assert holder.server_pid() == pid
        await write(url, "x")


async def test_when_the_holder_stops_the_other_carries_on(data_dir: Path) -> None:
    holder, guest = EmbeddedStore(data_dir), EmbeddedStore(data_dir)
    url = holder.start(timeout_s=60)
    await write(url, "kept")
    assert guest.start(timeout_s=60) == url
    holder.stop()
    await wait_until(guest.server_pid, 60)
    await wait_until(lambda: read(url), 60)
    guest.stop()


async def test_many_that_start_at_once_share_one_server(data_dir: Path) -> None:
    stores = [EmbeddedStore(data_dir) for _ in range(6)]
    threads = [threading.Thread(target=store.start, kwargs={"timeout_s": 60}) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([store for store in stores if store.server_pid() is not None]) == 1
    for store in reversed(stores):
        store.stop()


async def test_a_server_that_still_ends_is_waited_for(data_dir: Path) -> None:
    """Two servers would ruin one appendonly file, so the second waits until the first has ended."""
    with parent_process(data_dir) as (parent, url):
        await write(url, "kept")
        old = server_of(parent)
        old.suspend()
        parent.kill()
        parent.wait()
        successor = EmbeddedStore(data_dir)
        thread = threading.Thread(target=successor.start, kwargs={"timeout_s": 60})
        thread.start()
        await wait_until(successor.server_pid, 60)  # the launcher, which waits for the lock
        assert await read(url) is None
        old.resume()
        thread.join()
        assert await read(url) == b"kept"
        # It closed its files, and released the lock, a moment before.
        await wait_until(lambda: has_ended(old.pid))
        successor.stop()


# The server itself


async def test_it_is_private_durable_and_never_forgets(data_dir: Path) -> None:
    with started(data_dir) as (_, url):
        assert await setting(url, "appendonly") == "yes"
        assert await setting(url, "appendfsync") == "always"
        assert await setting(url, "maxmemory-policy") == "noeviction"
        assert await setting(url, "save") == ""
        assert await setting(url, "rdbcompression") == "no"
        assert await setting(url, "port") == "0"
        socket = urlsplit(url).path
        for path in (socket, os.path.dirname(socket)):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


async def test_a_long_or_strange_path_works(tmp_path: Path) -> None:
    for data_dir in (tmp_path / ("x" * MAX_SOCKET_PATH_BYTES), tmp_path / "a b%20?#ü"):
        with started(data_dir) as (_, url):
            await write(url, "kept")
            assert await read(url) == b"kept"


def test_a_long_path_gets_a_short_private_socket(tmp_path: Path) -> None:
    short = socket_path(tmp_path / ("x" * MAX_SOCKET_PATH_BYTES))
    assert len(os.fsencode(short)) <= MAX_SOCKET_PATH_BYTES
    assert short == socket_path(tmp_path / ("x" * MAX_SOCKET_PATH_BYTES))
    assert short != socket_path(tmp_path / ("y" * MAX_SOCKET_PATH_BYTES))
    short.parent.chmod(0o777)
    with pytest.raises(StoreUnavailable, match="open to others"):
        socket_path(tmp_path / ("x" * MAX_SOCKET_PATH_BYTES))
    short.parent.rmdir()


# What cannot start


def test_data_that_the_server_cannot_read_end_the_start_with_its_words(data_dir: Path) -> None:
    (data_dir / "store").mkdir(parents=True)
    (data_dir / "store" / "appendonlydir").write_text("not a folder")
    store = EmbeddedStore(data_dir)
    with pytest.raises(StoreUnavailable, match="appendonlydir"):
        store.start(timeout_s=60)
    assert store.server_pid() is None


def test_a_missing_binary_is_named(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="no-such-server is not a server"):
        EmbeddedStore(data_dir, binary=str(tmp_path / "no-such-server")).start(timeout_s=60)


def fake_server(folder: Path, name: str, says: str) -> Path:
    """Make a program that can only print its version."""
    folder.mkdir(exist_ok=True)
    binary = folder / name
    binary.write_text(f"#!/bin/sh\necho '{says}'\n")
    binary.chmod(0o755)
    return binary


def test_an_old_server_is_refused_with_its_version(tmp_path: Path) -> None:
    old = fake_server(tmp_path / "bin", "redis-server", "Redis server v=6.2.14 sha=0:0 malloc=libc bits=64")
    with pytest.raises(StoreUnavailable, match=r"redis-server is version 6\.2\.14.*TESSERA_STORE_URL"):
        find_binary(folders=[str(old.parent)], packages=[])
    with pytest.raises(StoreUnavailable, match=r"6\.2\.14"):
        find_binary(str(old))


def test_without_any_server_both_installs_are_named() -> None:
    with pytest.raises(StoreUnavailable) as refused:
        find_binary(folders=[], packages=["no_such_package"])
    for remedy in ("apt install valkey", "tessera-adapters[embedded]", "TESSERA_STORE_URL"):
        assert remedy in refused.value.message


def test_the_order_is_valkey_redis_package_and_old_ones_are_passed_over(tmp_path: Path) -> None:
    new_redis = fake_server(tmp_path / "a", "redis-server", "Redis server v=7.0.15 sha=0")
    folders = [str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "missing")]
    assert find_binary(folders=folders) == new_redis
    new_valkey = fake_server(tmp_path / "b", "valkey-server", "Valkey server v=8.1.0 sha=0")
    assert find_binary(folders=folders) == new_valkey
    fake_server(tmp_path / "b", "valkey-server", "Valkey server v=6.0.0 sha=0")
    assert find_binary(folders=folders) == new_redis


def test_the_packaged_server_is_found_without_its_package_being_imported() -> None:
    binary = find_binary(folders=[])
    version = server_version(binary)
    assert version is not None
    assert version >= (7, 2, 0)


# The setting


def test_a_configured_url_needs_no_server() -> None:
    settings = CommonSettings(store_url="redis://example.invalid:6379/0")
    assert store_url(settings) == ("redis://example.invalid:6379/0", None)


async def test_without_a_url_the_data_folder_gets_one(data_dir: Path) -> None:
    url, store = store_url(CommonSettings(data_dir=data_dir))
    assert store is not None
    await write(url, "x")
    store.stop()


def test_importing_the_module_needs_no_torch() -> None:
    code = "import sys, tessera.redis.embedded; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
