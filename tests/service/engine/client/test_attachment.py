"""Several API processes share one engine: each gets its own outputs, and a failure of one affects no
other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from service.engine.client.attachment import AttachedEngine
from service.engine.engine import Engine
from service.engine.process.engine_thread import EngineThread
from service.engine.process.server import EngineServer
from service.engine.settings import EngineConfig
from service.engine.wire.messages import GenerationRequest, SamplingParams, TokenOutput
from tessera.errors import EngineUnavailable, RequestFailed, TenantOverloaded
from tessera.formats.adapter_ref import AdapterRef
from tests.service.engine.models import family
from tests.waiting import HANG_S, wait_until

LONG = 200
MAX_WAITING = 4


class Fetcher:
    """Stands in for the fetcher of adapters: records the requests, and fetches nothing."""

    def __init__(self) -> None:
        self.fetched_ahead: list[AdapterRef] = []

    def fetch_ahead(self, ref: AdapterRef) -> None:
        self.fetched_ahead.append(ref)

    def fetch(self, refs: list[AdapterRef]) -> None:
        pass


class Served:
    """A real engine with a small model, behind a real socket."""

    def __init__(self, path: Path, *, restarts: int = 0) -> None:
        self.path = path
        self.model = family("micro")
        self.engine = Engine(self.model.base, EngineConfig(max_waiting_per_tenant=MAX_WAITING))
        self.engine.add_basis(self.model.basis)
        self.fetcher = Fetcher()
        self.server = EngineServer()
        self.thread = EngineThread(self.engine, on_delivery=self.server.deliver, on_failure=self.fail)
        self._info = replace(self.engine.info(), restarts=restarts)

    def fail(self, error: BaseException) -> None:
        raise AssertionError("the engine thread failed") from error

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Served]:
        await self.server.listen(self.path)
        beating = asyncio.create_task(self.server.keep_beating())
        self.thread.start()
        self.server.announce_ready(self._info, self.thread, self.fetcher)  # type: ignore[arg-type]
        try:
            yield self
        finally:
            beating.cancel()
            await self.server.close()
            assert await asyncio.to_thread(self.thread.stop, timeout_s=HANG_S)
            self.engine.close()


@asynccontextmanager
async def attached(path: Path, *, heartbeat_timeout_s: float = HANG_S) -> AsyncIterator[AttachedEngine]:
    engine = AttachedEngine(path, heartbeat_timeout_s=heartbeat_timeout_s)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def request(request_id: str, *, max_tokens: int = 8, adapter: AdapterRef | None = None) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return GenerationRequest(request_id, "default", [1, 2, 3], params, adapter)


async def tokens_of(engine: AttachedEngine, request: GenerationRequest) -> list[int]:
    return [token async for output in engine.generate(request) for token in output.token_ids]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock"


async def test_two_processes_use_the_same_ids_and_each_gets_its_own(path: Path) -> None:
    async with Served(path).running() as served, attached(path) as one, attached(path) as two:
        await asyncio.gather(one.wait_ready(HANG_S), two.wait_ready(HANG_S))
        short, long = await asyncio.gather(
            tokens_of(one, request("same", max_tokens=3)), tokens_of(two, request("same", max_tokens=9))
        )
        expected = served.model.oracle(None, [1, 2, 3], 9)[0]

    assert (short, long) == (expected[:3], expected)


async def test_a_process_that_goes_takes_its_requests_along_and_no_others(path: Path) -> None:
    async with Served(path).running() as served, attached(path) as stays:
        await stays.wait_ready(HANG_S)
        async with attached(path) as goes:
            await goes.wait_ready(HANG_S)
            streams = [engine.generate(request("r", max_tokens=LONG)) for engine in (goes, stays)]
            for stream in streams:
                await anext(stream)
        with pytest.raises(EngineUnavailable):
            async for _ in streams[0]:
                pass
        rest = [output async for output in streams[1]]
        await stays.check_integrity()
        await wait_until(lambda: stays.stats is not None and stays.stats.num_running == 0)

    assert rest[-1].finish_reason == "length"
    assert served.engine.stats().kv_blocks_used == 0


async def test_an_engine_that_ends_is_found_again_when_another_listens(path: Path) -> None:
    async with attached(path) as engine:
        with pytest.raises(EngineUnavailable, match="not ready within"):
            await engine.wait_ready(0.2)
        async with Served(path).running():
            await engine.wait_ready(HANG_S)
            stream = engine.generate(request("r", max_tokens=LONG))
            await anext(stream)
        with pytest.raises(EngineUnavailable):
            async for _ in stream:
                pass
        await wait_until(lambda: not engine.is_ready)
        await engine.unload("default", "tone")  # an engine that has ended holds no copies
        async with Served(path, restarts=1).running():
            await engine.wait_ready(HANG_S)
            tokens = await tokens_of(engine, request("again"))

    assert len(tokens) == 8
    assert engine.restarts_total == 1


async def test_the_books_can_be_checked_while_requests_run(path: Path) -> None:
    async with Served(path).running() as served, attached(path) as engine:
        await engine.wait_ready(HANG_S)
        running = asyncio.create_task(tokens_of(engine, request("r", max_tokens=LONG)))
        for _ in range(5):
            await engine.check_integrity()
        assert len(await running) == LONG

        served.thread.post(lambda core: core.pool._free.append(1))  # a block that appears twice
        with pytest.raises(RequestFailed, match="check_integrity") as caught:
            await engine.check_integrity()
        assert caught.value.code == "integrity_violated"
        served.thread.post(lambda core: _drop_last(core))
        await engine.check_integrity()
        assert len(await tokens_of(engine, request("after"))) == 8


def _drop_last(core: Engine) -> None:
    core.pool._free.pop()


async def test_what_a_request_needs_is_told_at_once(path: Path) -> None:
    async with Served(path).running() as served, attached(path) as engine:
        await engine.wait_ready(HANG_S)
        ref = served.model.refs[0]
        stream = engine.generate(request("r", adapter=ref))
        first: asyncio.Task[TokenOutput] = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
        await wait_until(lambda: served.fetcher.fetched_ahead == [ref])
        assert not served.engine.holds(ref)
        adapter = served.model.adapters[ref]
        served.thread.post(lambda core: core.provide_adapter(ref, adapter))
        assert (await first).token_ids
        assert served.engine.holds(ref)
        await stream.aclose()


async def test_a_tenant_over_its_limit_is_told_so(path: Path) -> None:
    async with Served(path).running() as served, attached(path) as engine:
        await engine.wait_ready(HANG_S)
        ref = served.model.refs[0]  # never provided, so they wait
        streams = [engine.generate(request(f"r{i}", adapter=ref)) for i in range(MAX_WAITING + 1)]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]  # type: ignore[arg-type]
        await wait_until(lambda: any(task.done() for task in waiting))
        done = [task for task in waiting if task.done()]
        errors = [task.exception() for task in done]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(error) for error in errors] == [TenantOverloaded]
