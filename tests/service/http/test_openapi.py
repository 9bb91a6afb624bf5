"""The OpenAPI schema matches the service: generated requests, valid and invalid, over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.app import create_app, stores_over
from service.generation.text import TextCodec
from service.settings import ServiceSettings
from tessera.redis.client import connect
from tessera.settings import CommonSettings
from tests.fakes import FakeEngine
from tests.service.conftest import served
from tests.waiting import HANG_S

#: Requests per operation and mode, about 300 in all.
EXAMPLES = 6

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def api_url(redis_url: str, codec: TextCodec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service in a thread of its own, because the generated requests are sent synchronously."""
    started, urls, stopping = threading.Event(), [], []

    async def serve() -> None:
        redis, stop = connect(redis_url), asyncio.Event()
        common = CommonSettings(data_dir=tmp_path_factory.mktemp("api"))
        app = create_app(
            engine=FakeEngine(),
            stores=stores_over(redis, common),
            codec=codec,
            settings=ServiceSettings(),
            common=common,
        )
        async with served(app) as url:
            urls.append(url)
            stopping.append((asyncio.get_running_loop(), stop))
            started.set()
            await stop.wait()
        await redis.aclose()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait(HANG_S)
    yield urls[0]
    loop, stop = stopping[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(HANG_S)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda m: m.value)
def test_the_schema_is_kept(api_url: str, subtests: pytest.Subtests, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{api_url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    with requests.Session() as session:
        for operation in operations:
            with subtests.test(operation.label):
                exercise(operation, mode, session)

    assert len(operations) > 25


def exercise(operation: schemathesis.APIOperation, mode: GenerationMode, session: requests.Session) -> None:
    @settings(max_examples=EXAMPLES, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"  # by chance it would never be one that exists
        case.call_and_validate(checks=CHECKS, session=session, timeout=HANG_S)

    with contextlib.suppress(Unsatisfiable):  # a route without parameters cannot be called wrongly
        check()
