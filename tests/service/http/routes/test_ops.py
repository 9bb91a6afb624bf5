"""Health, metrics, version, documentation, and the start of the process."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from service.__main__ import main
from service.app import create_app, stores_over
from service.engine.wire.messages import EngineStats
from service.generation.text import TextCodec
from service.http.auth import DEFAULT_TENANT
from service.settings import ServiceSettings
from tessera.processes.log_setup import JsonFormatter
from tessera.redis.client import connect
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine
from tests.service.conftest import MakeApp, client_of, publish
from tests.waiting import wait_until

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application whose lifespan has begun."""
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield client


async def figures(client: httpx.AsyncClient) -> Figures:
    text = (await client.get("/metrics")).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_ready_says_which_part_is_down(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.get("/health/ready")).json() == {"status": "ok", "down": {}}

    engine.is_ready = False

    reply = await client.get("/health/ready")
    assert reply.status_code == 503
    assert set(reply.json()["down"]) == {"engine"}
    assert (await client.get("/health/live")).status_code == 200


async def test_a_store_that_is_gone_is_reported_everywhere(
    engine: FakeEngine, codec: TextCodec, tmp_path: Path
) -> None:
    redis = connect(f"unix://{tmp_path}/nobody", timeout_s=0.2)
    common = CommonSettings(data_dir=tmp_path)
    app = create_app(
        engine=engine,
        stores=stores_over(redis, common),
        codec=codec,
        settings=ServiceSettings(),
        common=common,
    )
    async with running(app) as client:
        ready = await client.get("/health/ready")
        listed = await client.get("/v1/files")
        answered = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        measured = await figures(client)
    await redis.aclose()

    assert (ready.status_code, set(ready.json()["down"])) == (503, {"store"})
    assert (listed.status_code, listed.json()["error"]["code"]) == (503, "store_unavailable")
    assert str(tmp_path) not in listed.text
    assert listed.headers["retry-after"]
    assert answered.status_code == 200  # the base model needs no store
    assert measured["tessera_store_up", ()] == 0


async def test_the_service_counts_what_it_answers(app: FastAPI, engine: FakeEngine) -> None:
    async with running(app) as client:
        for body in ({"model": "tiny", "prompt": "a b c"}, {"model": "nobody", "prompt": "a"}):
            await client.post("/v1/completions", json=body)
        await client.get("/v1/models/nobody")
        await client.get("/what/ever")
        await client.request("BREW", "/v1/models")
        measured = await figures(client)

    def answered(route: str, method: str, status: int) -> float:
        labels = (("method", method), ("route", route), ("status", str(status)))
        return measured["tessera_http_requests_total", labels]

    assert answered("/v1/completions", "POST", 200) == 1
    assert answered("/v1/completions", "POST", 404) == 1
    assert answered("/v1/models/{model:path}", "GET", 404) == 1
    assert answered("unmatched", "GET", 404) == 1
    assert any(("method", "other") in labels for _, labels in measured)
    assert measured["tessera_time_to_first_token_seconds_count", ()] == 1
    assert measured["tessera_inter_token_latency_seconds_count", ()] == 15
    assert measured["tessera_generation_duration_seconds_count", ()] == 1
    assert measured["tessera_batch_distinct_adapters_count", ()] == 1
    assert measured["tessera_generations_total", (("outcome", "finished"),)] == 1
    assert measured["tessera_http_requests_in_flight", ()] == 1  # this one


async def test_the_figures_of_engine_store_and_queue_are_reported(
    app: FastAPI, engine: FakeEngine, adapters: AdapterStore
) -> None:
    for name in ("anna", "bert"):
        await publish(adapters, name)
    engine.stats = EngineStats(
        num_running=3,
        slots_resident=4,
        host_cache_entries=5,
        memory_bytes={"weights": 10, "kv": 20},
        prompt_tokens_total=7,
        adapter_loads_total={"cached": 2, "resident": 1},
    )
    async with running(app) as client:
        await wait_until(lambda: app.state.services.queue)

        async def has_sampled() -> bool:
            return (await figures(client))["tessera_store_up", ()] == 1

        await wait_until(has_sampled)
        measured = await figures(client)

    tiers = {dict(labels)["tier"]: v for (n, labels), v in measured.items() if n == "tessera_adapters"}
    assert tiers == {"stored": 2, "cached": 5, "resident": 4}
    assert measured["tessera_memory_bytes", (("kind", "weights"),)] == 10
    assert measured["tessera_sequences", (("state", "running"),)] == 3
    assert measured["tessera_prompt_tokens_total", ()] == 7
    assert measured["tessera_adapter_loads_total", (("tier", "cached"),)] == 2
    assert measured["tessera_store_memory_bytes", (("kind", "used"),)] > 0
    assert measured["tessera_training_jobs", (("status", "queued"),)] == 0
    assert measured["tessera_engine_up", ()] == 1


async def test_an_engine_without_figures_does_not_break_the_page(app: FastAPI, engine: FakeEngine) -> None:
    engine.is_ready, engine.stats, engine.restarts_total = False, None, 2
    async with running(app) as client:
        measured = await figures(client)

    assert measured["tessera_engine_up", ()] == 0
    assert measured["tessera_engine_restarts_total", ()] == 2


async def test_series_do_not_grow_with_adapters_and_users(app: FastAPI, adapters: AdapterStore) -> None:
    async with running(app) as client:
        counts = []
        for batch in range(2):
            for number in range(20):
                name = f"user-{batch}-{number}"
                await publish(adapters, name)
                await client.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1})
                await client.get(f"/v1/adapters/{name}")
                await client.get(f"/nowhere/{name}")
            counts.append(len(await figures(client)))

    assert counts[1] <= counts[0] + 20  # the page's own route, and what the sampler brings
    assert counts[1] < 500


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_finds_nothing_to_complain_about(app: FastAPI, engine: FakeEngine) -> None:
    engine.stats = EngineStats(
        memory_bytes={"kv": 1}, adapter_loads_total={"cached": 1}, adapter_evictions_total={"cached": 1}
    )
    async with running(app) as client:
        await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        text = (await client.get("/metrics")).text

    checked = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "metrics"], input=text, text=True, capture_output=True
    )

    assert checked.returncode == 0, checked.stderr


async def test_the_documentation_is_served(client: httpx.AsyncClient) -> None:
    assert "swagger" in (await client.get("/docs")).text
    schema = (await client.get("/openapi.json")).json()
    assert schema["info"]["title"] == "Tessera"
    version = (await client.get("/version")).json()
    assert version["base_model"] == "tiny"
    assert version["version"] == schema["info"]["version"]


async def test_the_log_line_of_a_request_names_it_and_its_tenant_in_json(client: httpx.AsyncClient) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("service"))
    logger = logging.getLogger("service.http.middleware")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        await client.get("/v1/models", headers={"x-request-id": "req_mine"})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)

    [line] = map(json.loads, stream.getvalue().splitlines())
    assert (line["request_id"], line["tenant"]) == ("req_mine", DEFAULT_TENANT)
    assert line["message"].startswith("req_mine GET /v1/models 200")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TESSERA_LOG_FORMAT", "xml", "log_format"),
        ("TESSERA_SERVICE_PROT", "9000", "TESSERA_SERVICE_PORT"),
        ("TESSERA_SERVICE_PORT", "many", "port"),
        ("TESSERA_SERVICE_HOST", "0.0.0.0", "API keys"),
        ("TESSERA_LOG_LEVEL", "LOUD", "LOUD"),
        ("TESSERA_SERVICE_WORKERS", "0", "workers"),
        ("TESSERA_ENGINE_TENANT_WEIGHTS", '{"acme": 0}', "tenant_weights.acme"),
    ],
)
def test_settings_that_cannot_be_used_end_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)

    assert main() == 2
    assert message in caplog.text


async def test_requests_beyond_the_limit_are_turned_away(make_app: MakeApp, engine: FakeEngine) -> None:
    body = {"model": "tiny", "prompt": "a"}
    engine.gate.clear()
    async with client_of(make_app(max_concurrent_requests=2)) as client, asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(client.post("/v1/completions", json=body)) for _ in range(2)]
        await wait_until(lambda: len(engine.running) == 2)

        refused = await client.post("/v1/completions", json=body)

        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_overloaded")
        assert refused.headers["retry-after"]
        assert (await client.get("/health/ready")).status_code == 200
        engine.gate.set()
    assert [answer.result().status_code for answer in answers] == [200, 200]
