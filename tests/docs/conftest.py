"""The application, of which tests of the documentation ask the schema."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from fastapi import FastAPI

from service.app import create_app, stores_over
from service.generation.text import load_text_codec
from service.settings import ServiceSettings
from tessera.defaults import BUNDLED_MODEL
from tessera.redis.client import connect
from tessera.settings import CommonSettings
from tests.fakes import FakeEngine


@pytest_asyncio.fixture
async def app(tmp_path: Path) -> AsyncIterator[FastAPI]:
    """The application, of which only the schema is asked: its store is never called."""
    async with connect("redis://127.0.0.1:1") as redis:
        common = CommonSettings(data_dir=tmp_path)
        yield create_app(
            engine=FakeEngine(),
            stores=stores_over(redis, common),
            codec=load_text_codec(BUNDLED_MODEL),
            settings=ServiceSettings(),
            common=common,
        )
