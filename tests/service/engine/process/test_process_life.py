"""How an engine process starts and ends: with its parent, without its store, without a model."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from service.engine.client.engine_child import COMMAND, child_environment, socket_path
from service.engine.client.engine_client import EngineClient
from service.engine.settings import EngineSettings
from service.engine.wire import ipc
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tessera.redis.client import connect
from tessera.redis.embedded import EmbeddedStore
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tests.service.engine.engine_process import (
    RANK,
    complete,
    make_adapter,
    make_request,
    publish,
    running,
    store_basis,
)
from tests.waiting import HANG_S, has_ended, wait_until


@pytest.fixture
def settings(tmp_path: Path) -> CommonSettings:
    return CommonSettings(data_dir=tmp_path, rank=RANK, device="cpu", log_level="WARNING")


async def read_ready(path: Path) -> None:
    """Wait until an engine listens at `path` and reports that it is ready."""
    await wait_until(path.exists, HANG_S)
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        async with asyncio.timeout(HANG_S):
            while (message := await ipc.read_frame(reader)) is not None and message["type"] != "ready":
                pass
        assert message is not None
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "pinned_reserve_segment_size_mb:3"}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,pinned_reserve_segment_size_mb:3"},
        ),
        (
            {"PYTORCH_ALLOC_CONF": "pinned_reserve_segment_size_mb:7"},
            {"PYTORCH_ALLOC_CONF": "pinned_reserve_segment_size_mb:7"},
        ),
    ],
    ids=["unset", "other settings", "the operator's own"],
)
def test_the_engine_page_locks_its_host_cache_at_once(
    settings: CommonSettings, monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: dict[str, str]
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)

    environment = child_environment(settings, EngineSettings(host_cache_bytes=3 * 2**20 - 1), "unix:///x")

    assert {name: environment[name] for name in environment if name.endswith("ALLOC_CONF")} == after


async def test_the_engine_ends_with_its_parent(redis_url: str, settings: CommonSettings) -> None:
    path = socket_path(settings.data_dir)
    command = [
        sys.executable,
        str(Path(__file__).with_name("engine_parent.py")),
        *COMMAND,
        "--socket",
        str(path),
    ]
    environment = child_environment(settings, EngineSettings(threads=1), redis_url)
    parent = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    try:
        await read_ready(path)
        assert not has_ended(pid)
    finally:
        parent.kill()
        await parent.communicate()

    await wait_until(lambda: has_ended(pid))


async def test_the_engine_outlives_its_store(
    settings: CommonSettings,
    tiny: BaseModel,
    tiny_basis: Basis,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = EmbeddedStore(tmp_path)
    url = await asyncio.to_thread(store.start)
    redis = connect(url)
    try:
        await store_basis(BasisStore(redis), settings, tiny, tiny_basis)
        adapters = AdapterStore(redis)
        resident, other = [await publish(adapters, n, make_adapter(tiny_basis, 51)) for n in ("near", "far")]
        await asyncio.to_thread(store.stop)

        async with running(EngineClient(settings, url, engine_settings=EngineSettings(threads=1))) as client:
            await wait_until(lambda: "store" in (client.starting_error or ""), HANG_S)
            await asyncio.to_thread(store.start)
            await client.wait_ready(HANG_S)
            before = await complete(client, make_request("before", resident))
            await asyncio.to_thread(store.stop)

            waiting = asyncio.create_task(complete(client, make_request("far", other)))
            during = await complete(client, make_request("during", resident))
            assert not waiting.done()
            lost = await waiting
            await asyncio.to_thread(store.start)
            found = await complete(client, make_request("far again", other))
    finally:
        await redis.aclose()
        await asyncio.to_thread(store.stop)

    assert "killed" not in caplog.text  # it ended on request
    assert before.token_ids == during.token_ids == found.token_ids
    assert lost.error is not None
    assert lost.error[0] == "store_unavailable"


async def test_a_base_model_that_does_not_exist_is_reported(
    redis_url: str, settings: CommonSettings, tmp_path: Path
) -> None:
    wrong = settings.model_copy(update={"base_model": str(tmp_path / "nothing")})
    async with running(EngineClient(wrong, redis_url)) as client:
        await wait_until(lambda: "status 1" in (client.starting_error or ""), HANG_S)

        assert "nothing is neither a directory nor a model" in (client.starting_error or "")
