"""`extra_body={"adapter": {"form": "lora", …}}`: which jobs are queued, and which are refused before that."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from redis.asyncio import Redis

from tessera.queue.client import JobQueue, JobStatus
from tessera.store.adapters import AdapterStore
from tests.service.answers import JOBS, check_error
from tests.service.conftest import MakeApp, client_of, publish
from tests.service.training import GOOD, create, upload


async def test_the_official_client_orders_a_lora_form(
    official: openai.AsyncOpenAI, file_id: str, redis: Redis
) -> None:
    job = await official.fine_tuning.jobs.create(
        model="tiny",
        training_file=file_id,
        extra_body={"adapter": {"form": "lora", "rank": 8, "init": "pissa", "id": "anna"}},
    )
    trained = job.to_dict()["adapter"]
    assert (trained["form"], trained["method"], trained["rank"], trained["init"]) == (
        "lora",
        "pissa",
        8,
        "pissa",
    )
    spec = (await JobQueue(redis).get("default", job.id)).spec
    assert (spec.form, spec.method, spec.rank, spec.start, spec.basis_id) == ("lora", "pissa", 8, None, None)
    assert (spec.calibration, spec.basis_options) == (None, {})


async def test_defaults_options_and_data_of_a_form(client: httpx.AsyncClient, file_id: str) -> None:
    plain = await create(client, file_id, adapter={"form": "lora"})
    assert (plain["adapter"]["method"], plain["adapter"]["rank"]) == ("lora", 16)
    init = {"method": "lora_one", "options": {"num_examples": 8}}
    fed = await create(client, file_id, adapter={"form": "lora", "init": init, "rank": 4})
    assert (fed["adapter"]["method"], fed["adapter"]["calibration"]) == ("lora_one", "own")
    core = await create(client, file_id)
    assert core["adapter"]["form"] == "core"


@pytest.mark.parametrize(
    ("init", "calibration"),
    [
        ({"method": "lolora", "options": {"a_learning_rate": 1e-4}}, None),
        ({"method": "lolora_eva", "options": {"a_learning_rate": 1e-4, "num_examples": 9}}, "own"),
        ({"method": "loram_rslora"}, None),
        ({"method": "loram_corda", "options": {"tracking": "factor"}}, "own"),
        ({"method": "loram_lora_ga"}, None),
        ({"method": "loram", "options": {"magnitude": "tracking", "reference": "corda"}}, "own"),
        ({"method": "lora_da", "options": {"output_factor": "full"}}, "own"),
    ],
)
async def test_the_papers_variants_of_forms(
    client: httpx.AsyncClient, file_id: str, redis: Redis, init: dict[str, Any], calibration: str | None
) -> None:
    job = await create(client, file_id, adapter={"form": "lora", "init": init, "rank": 4})
    spec = (await JobQueue(redis).get("default", job["id"])).spec
    assert (spec.method, spec.basis_options) == (init["method"], init.get("options", {}))
    assert spec.calibration == calibration


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown form": ({"form": "dora"}, "adapter.form"),
    "unknown init": ({"init": "dora"}, "adapter.init"),
    "a start": ({"init": "sb_step"}, "adapter.init"),
    "unknown option": (
        {"init": {"method": "pissa", "options": {"colour": 1}}},
        "adapter.init.options.colour",
    ),
    "option of none": ({"init": {"method": "lora", "options": {"seed": 1}}}, "adapter.init.options.seed"),
    "rate of a rule it has not": (
        {"init": {"method": "lora_fa", "options": {"a_learning_rate": 1e-4}}},
        "adapter.init.options.a_learning_rate",
    ),
    "no rate": (
        {"init": {"method": "lolora", "options": {"a_learning_rate": 0}}},
        "adapter.init.options.a_learning_rate",
    ),
    "factors of nothing": (
        {"init": {"method": "loram", "options": {"tracking": "factor"}}},
        "adapter.init.options.tracking",
    ),
    "rank of no magnitude": ({"init": "loram", "rank": 1}, "adapter.rank"),
    "basis": ({"basis": "lora_xs"}, "adapter.basis"),
    "method": ({"method": "lora_xs"}, "adapter.method"),
    "rank": ({"rank": 129}, "adapter.rank"),
    "largest rank": ({"rank": 300, "init": "pissa"}, "adapter.rank"),
    "stored rank": ({"rank": 65, "init": "pissa"}, "adapter.rank"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_form_that_cannot_be_trained_is_refused(
    client: httpx.AsyncClient, file_id: str, redis: Redis, case: str
) -> None:
    options, param = BAD[case]
    body = {"model": "tiny", "training_file": file_id, "adapter": {"form": "lora", **options}}
    assert check_error(await client.post(JOBS, json=body), 400)["param"] == param
    assert (await JobQueue(redis).stats()).jobs[JobStatus.QUEUED] == 0


async def test_a_form_begins_at_the_base_model(
    client: httpx.AsyncClient, file_id: str, adapters: AdapterStore
) -> None:
    await publish(adapters, "anna")
    body = {"model": "anna", "training_file": file_id, "adapter": {"form": "lora"}}
    assert check_error(await client.post(JOBS, json=body), 400)["param"] == "model"


async def test_what_the_quota_has_no_room_for_is_refused(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_MAX_OWN_BASIS_BYTES", "1000000")
    async with client_of(make_app()) as client:
        file_id = (await upload(client, GOOD)).json()["id"]
        body = {"model": "tiny", "training_file": file_id, "adapter": {"form": "lora", "rank": 64}}
        error = check_error(await client.post(JOBS, json=body), 409)
        assert (error["code"], error["param"]) == ("basis_quota_exceeded", "adapter.form")
        await create(client, file_id, adapter={"form": "lora", "rank": 1})
