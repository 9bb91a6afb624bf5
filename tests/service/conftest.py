"""The application over a real Valkey, the real tokenizer and a fake engine; with or without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
import torch
import uvicorn
from fastapi import FastAPI
from redis.asyncio import Redis

from service.app import create_app, stores_over
from service.generation.text import TextCodec, load_text_codec
from service.settings import ServiceSettings
from tessera.defaults import BUNDLED_MODEL
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine
from tests.service.training import BASIS_ID, upload
from tests.waiting import wait_until

MakeApp = Callable[..., FastAPI]


@pytest.fixture(scope="session")
def codec() -> TextCodec:
    return load_text_codec(BUNDLED_MODEL)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_app(redis: Redis, engine: FakeEngine, codec: TextCodec, tmp_path: Path) -> MakeApp:
    """Makes the application with given settings."""

    def make(*, codec: TextCodec = codec, **settings: object) -> FastAPI:
        common = CommonSettings(data_dir=tmp_path)
        return create_app(
            engine=engine,
            stores=stores_over(redis, common),
            codec=codec,
            settings=ServiceSettings(**settings),
            common=common,
        )

    return make


@pytest.fixture
def app(make_app: MakeApp) -> FastAPI:
    return make_app()


@asynccontextmanager
async def client_of(app: FastAPI, **options: object) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", **options) as client:
        yield client


@pytest_asyncio.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a socket: fast, but a response arrives whole and nobody can disconnect."""
    async with client_of(app) as client:
        yield client


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[str]:
    """Serve on a free loopback port in this event loop; yields the URL."""
    async with running_server(app) as server:
        yield url_of(server)


@asynccontextmanager
async def running_server(app: FastAPI, **options: Any) -> AsyncIterator[uvicorn.Server]:
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http="httptools", ws="none", log_config=None, access_log=False, **options)
    )
    task = asyncio.create_task(server.serve())
    try:
        await wait_until(lambda: server.started or task.done())
        yield server
    finally:
        server.should_exit = True
        await task
        for _ in range(5):
            await asyncio.sleep(0)  # let the connections close, or they warn later


def url_of(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@pytest_asyncio.fixture
async def server(app: FastAPI) -> AsyncIterator[str]:
    async with served(app) as url:
        yield url


@pytest_asyncio.fixture
async def remote(server: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client over a socket: streams arrive while they are sent."""
    async with httpx.AsyncClient(base_url=server) as client:
        yield client


@pytest_asyncio.fixture
async def official(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, over a socket."""
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest_asyncio.fixture
async def file_id(client: httpx.AsyncClient) -> str:
    return str((await upload(client)).json()["id"])


@pytest.fixture
def adapters(redis: Redis) -> AdapterStore:
    return AdapterStore(redis)


async def publish(
    adapters: AdapterStore, adapter_id: str, *, tenant: str = "default", basis_id: str = BASIS_ID
) -> int:
    """Store a version of a small adapter; return its number."""
    adapter = Adapter(basis_id, torch.zeros(2, 4, 4))
    version = await adapters.publish(tenant, adapter_id, adapter, dtype=torch.float16, base_model_id="tiny")
    return version.version


def small_basis() -> Basis:
    """A basis of rank 4 for two modules that no model has."""
    generator = torch.Generator().manual_seed(0)
    shapes = [ModuleShape("a", 8, 6), ModuleShape("b", 6, 8)]
    factors = {
        shape: (
            torch.randn(4, shape.d_in, generator=generator),
            torch.randn(shape.d_out, 4, generator=generator),
        )
        for shape in shapes
    }
    return make_basis(model_id="0" * 64, method="lora_xs", factors=factors, recipe={"seed": 0})
