"""/v1/fine_tuning/jobs over the real queue; the tests act as the worker through `JobLeases`."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
import torch
from redis.asyncio import Redis

from service.jobs.training_jobs import slug
from tessera.formats.basis import make_basis
from tessera.formats.manifest import ModuleShape
from tessera.queue.client import JobQueue
from tessera.queue.hyperparameters import HYPERPARAMETERS
from tessera.queue.leases import JobLeases, LeaseState
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tests.fakes import FakeEngine
from tests.service.conftest import publish, small_basis
from tests.service.sse import DONE, parse
from tests.service.training import BASIS_ID, JOBS, create, run_job


async def test_a_job_has_openais_shape(client: httpx.AsyncClient, engine: FakeEngine, file_id: str) -> None:
    engine.is_ready = False  # training does not need it

    job = await create(client, file_id, suffix="My Style!", metadata={"a": "b"}, seed=3)

    assert job["id"].startswith("ftjob-")
    assert (job["object"], job["status"], job["model"]) == ("fine_tuning.job", "queued", "tiny")
    assert (job["training_file"], job["validation_file"]) == (file_id, None)
    assert (job["seed"], job["metadata"], job["user_provided_suffix"]) == (3, {"a": "b"}, "My Style!")
    auto = dict.fromkeys(HYPERPARAMETERS, "auto")
    assert job["hyperparameters"] == auto
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": auto}}
    assert (job["fine_tuned_model"], job["error"], job["result_files"]) == (None, None, [])
    assert job["adapter"]["id"].startswith("my-style-")
    assert (job["adapter"]["rank"], job["adapter"]["method"]) == (16, "lora_xs")
    assert job["queue_position"] == 1
    assert (await client.get(f"{JOBS}/{job['id']}")).json() == job


@pytest.mark.parametrize(
    "body",
    [
        {"hyperparameters": {"n_epochs": 3}},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}},
        {
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
            "hyperparameters": {"n_epochs": 3, "batch_size": "auto"},
        },
    ],
    ids=["old place", "new place", "both"],
)
async def test_hyperparameters_have_two_places(
    client: httpx.AsyncClient, file_id: str, body: dict[str, Any]
) -> None:
    job = await create(client, file_id, **body)

    assert job["hyperparameters"]["n_epochs"] == 3
    assert job["hyperparameters"]["batch_size"] == "auto"


GIVEN = {
    "n_epochs": 2, "batch_size": 4, "learning_rate": 2e-4, "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1, "weight_decay": 0.01, "max_length": 512,
}  # fmt: skip


async def test_hyperparameters_of_both_places_are_put_together(
    client: httpx.AsyncClient, file_id: str, redis: Redis
) -> None:
    older = {name: GIVEN[name] for name in ("n_epochs", "warmup_ratio", "learning_rate")}
    newer = {name: value for name, value in GIVEN.items() if name not in older} | {"n_epochs": None}
    newer["max_seq_length"] = newer.pop("max_length")
    method = {"type": "supervised", "supervised": {"hyperparameters": newer}}

    job = await create(client, file_id, method=method, hyperparameters=older)

    assert job["hyperparameters"] == dict.fromkeys(HYPERPARAMETERS, "auto") | GIVEN
    assert (await JobQueue(redis).get("default", job["id"])).spec.hyperparameters == GIVEN


@pytest.mark.parametrize(
    ("hyperparameters", "param"),
    [
        ({"n_epochs": 3}, "hyperparameters.n_epochs"),
        ({"max_seq_length": 64}, "hyperparameters.max_length"),
        ({"learning_rate_multiplier": 2}, "hyperparameters.learning_rate_multiplier"),
    ],
)
async def test_hyperparameters_that_contradict_are_refused(
    client: httpx.AsyncClient, file_id: str, hyperparameters: dict[str, Any], param: str
) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": GIVEN}}
    body = {"model": "tiny", "training_file": file_id, "method": method}

    reply = await client.post(JOBS, json={**body, "hyperparameters": hyperparameters})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_own_options_travel_beside_openais(
    client: httpx.AsyncClient, file_id: str, redis: Redis
) -> None:
    stopping = {"patience": 3, "min_delta": 0.01}

    job = await create(client, file_id, adapter={"id": "anna", "rank": 4}, early_stopping=stopping)

    assert (job["adapter"]["id"], job["adapter"]["rank"]) == ("anna", 4)
    spec = (await JobQueue(redis).get("default", job["id"])).spec
    assert (spec.adapter_id, spec.rank, spec.early_stopping) == ("anna", 4, stopping)
    assert spec.base_model == "tiny"


async def test_two_jobs_without_a_name_make_two_adapters(client: httpx.AsyncClient, file_id: str) -> None:
    first, second = await create(client, file_id), await create(client, file_id)

    assert first["id"] != second["id"]
    assert first["adapter"]["id"] != second["adapter"]["id"]


async def test_a_named_basis_decides_rank_and_method(
    client: httpx.AsyncClient, file_id: str, redis: Redis
) -> None:
    basis_id = await BasisStore(redis).put(small_basis())

    job = await create(client, file_id, adapter={"basis": basis_id})

    expected = {"version": None, "method": "lora_xs", "rank": 4, "basis": basis_id, "calibration": None}
    assert job["adapter"].items() >= {**expected, "init": "zero"}.items()
    wrong = {"model": "tiny", "training_file": file_id, "adapter": {"basis": basis_id, "rank": 8}}
    reply = await client.post(JOBS, json=wrong)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "adapter.rank")


async def test_training_can_start_from_an_adapter(
    client: httpx.AsyncClient, file_id: str, redis: Redis, adapters: AdapterStore
) -> None:
    basis = small_basis()
    await BasisStore(redis).put(basis)
    for _ in range(2):
        await publish(adapters, "anna", basis_id=basis.basis_id)

    job = await create(client, file_id, model="anna")

    spec = (await JobQueue(redis).get("default", job["id"])).spec
    assert (spec.warm_start_from, spec.basis_id, spec.rank) == ("anna@2", basis.basis_id, 4)
    assert job["model"] == "anna@2"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"training_file": "file-" + "0" * 24}, 404, "file_not_found", "training_file"),
        ({"training_file": "../x"}, 404, "file_not_found", "training_file"),
        ({"validation_file": "file-" + "0" * 24}, 404, "file_not_found", "validation_file"),
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"adapter": {"basis": "f" * 64}}, 404, "basis_not_found", "adapter.basis"),
        ({"adapter": {"method": "magic"}}, 400, "invalid_value", "adapter.method"),
        (
            {"adapter": {"method": "lora_sb"}},
            400,
            "invalid_value",
            "adapter.method",
        ),
        ({"adapter": {"id": "A B"}}, 400, "invalid_value", "adapter.id"),
        ({"adapter": {"id": "tiny"}}, 400, "invalid_value", "adapter.id"),
    ],
)
async def test_what_does_not_exist_is_named(
    client: httpx.AsyncClient, file_id: str, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    reply = await client.post(JOBS, json={"model": "tiny", "training_file": file_id, **body})

    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param)


async def test_jobs_are_listed_newest_first_in_pages(client: httpx.AsyncClient, file_id: str) -> None:
    ids = [(await create(client, file_id))["id"] for _ in range(3)]

    first = (await client.get(JOBS, params={"limit": 2})).json()
    second = (await client.get(JOBS, params={"limit": 2, "after": first["last_id"]})).json()

    assert [job["id"] for job in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)


async def test_jobs_are_found_by_their_metadata(client: httpx.AsyncClient, file_id: str) -> None:
    given = [{"project": "a", "run": "1"}, {"project": "a", "run": "2"}, {"project": "b"}, None, {"run": ""}]
    ids = [(await create(client, file_id, metadata=metadata))["id"] for metadata in given]

    async def found(**params: Any) -> list[str]:
        query = {name.replace("__", "[").replace("_", "]"): value for name, value in params.items()}
        return [job["id"] for job in (await client.get(JOBS, params=query)).json()["data"]]

    assert await found(metadata__project_="a") == [ids[1], ids[0]]
    assert await found(metadata__project_="a", metadata__run_="1") == [ids[0]]
    assert await found(metadata__project_="c") == []
    assert await found(metadata__run_="") == [ids[4]]
    assert await found(metadata="null") == [ids[3]]
    assert await found() == ids[::-1]
    first = (await client.get(JOBS, params={"metadata[project]": "a", "limit": 1})).json()
    assert (first["has_more"], first["last_id"]) == (True, ids[1])
    more = {"metadata[project]": "a", "limit": 1, "after": ids[1]}
    assert (await client.get(JOBS, params=more)).json()["has_more"] is False
    for wrong in ({"metadata": "a"}, {"metadata": "null", "metadata[a]": "b"}):
        reply = await client.get(JOBS, params=wrong)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "metadata")


async def test_a_job_under_way_shows_what_was_chosen_and_when_it_will_end(
    client: httpx.AsyncClient, redis: Redis, file_id: str
) -> None:
    given = {"n_epochs": 2}
    path = f"{JOBS}/{(await create(client, file_id, hyperparameters=given))['id']}"
    leases = JobLeases(redis)
    [lease] = await leases.claim("worker", limit=1, lease_s=60)
    chosen = {
        "n_epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "learning_rate_multiplier": 0.3,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.0, "max_length": 512,
    }  # fmt: skip
    progress = {"step": 5, "total_steps": 10, "percent": 50.0, "hyperparameters": chosen}

    await leases.report(lease, progress={**progress, "remaining_s": None})
    job = (await client.get(path)).json()
    assert job["estimated_finish"] is None
    await leases.report(lease, progress={**progress, "remaining_s": 90.0})
    job = (await client.get(path)).json()

    expected = dict.fromkeys(HYPERPARAMETERS, "auto") | chosen
    assert job["hyperparameters"] == expected
    assert job["method"]["supervised"]["hyperparameters"] == expected
    assert job["progress"] == {"step": 5, "total_steps": 10, "percent": 50.0, "remaining_s": 90.0}
    assert 85 <= job["estimated_finish"] - time.time() <= 91
    await leases.complete(lease, {"version": 1}, progress={**progress, "percent": 100.0, "remaining_s": 0})
    job = (await client.get(path)).json()
    assert (job["progress"]["percent"], job["estimated_finish"]) == (100.0, None)
    assert job["hyperparameters"] == expected


async def test_a_job_can_be_stopped_after_its_first_step(
    client: httpx.AsyncClient, redis: Redis, file_id: str
) -> None:
    path = f"{JOBS}/{(await create(client, file_id))['id']}"
    leases = JobLeases(redis)
    [lease] = await leases.claim("worker", limit=1, lease_s=60)

    early = await client.post(f"{path}/stop")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "job_not_stoppable")
    assert "before its first step" in early.json()["error"]["message"]
    assert await leases.report(lease, progress={"step": 1, "total_steps": 9}) is LeaseState.HELD
    stopped = await client.post(f"{path}/stop")

    assert (stopped.status_code, stopped.json()["status"]) == (200, "running")
    assert (await leases.renew([lease], lease_s=60))[lease.job.job_id] is LeaseState.STOP
    refused = await client.post(f"{path}/pause")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_not_pausable")
    assert (await client.post(f"{path}/cancel")).status_code == 200  # for an owner who changes their mind
    assert await leases.report(lease, message="x") is LeaseState.CANCEL


async def test_a_job_can_be_paused_resumed_and_cancelled(client: httpx.AsyncClient, file_id: str) -> None:
    job_id = (await create(client, file_id))["id"]

    for verb, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        reply = await client.post(f"{JOBS}/{job_id}/{verb}")
        assert (reply.status_code, reply.json()["status"]) == (200, status)


async def test_a_job_that_has_ended_stays_so(client: httpx.AsyncClient, file_id: str) -> None:
    job_id = (await create(client, file_id))["id"]
    await client.post(f"{JOBS}/{job_id}/cancel")

    for verb in ("pause", "resume", "stop", "cancel"):
        reply = await client.post(f"{JOBS}/{job_id}/{verb}")
        assert reply.status_code == 409
        assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("tail", ["", "/events", "/checkpoints", "/events?stream=true"])
async def test_an_unknown_job_is_404(client: httpx.AsyncClient, tail: str) -> None:
    reply = await client.get(f"{JOBS}/ftjob-nothing{tail}")

    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "job_not_found"


async def test_a_job_that_has_succeeded_names_its_model(
    client: httpx.AsyncClient, redis: Redis, file_id: str
) -> None:
    job_id = (await create(client, file_id, adapter={"id": "anna"}))["id"]
    await run_job(redis)

    job = (await client.get(f"{JOBS}/{job_id}")).json()

    assert (job["status"], job["fine_tuned_model"], job["trained_tokens"]) == ("succeeded", "anna", 99)
    assert job["finished_at"] >= job["started_at"] >= job["created_at"]
    assert (job["adapter"]["version"], job["adapter"]["basis"]) == (1, BASIS_ID)
    (checkpoint,) = (await client.get(f"{JOBS}/{job_id}/checkpoints")).json()["data"]
    assert checkpoint["fine_tuned_model_checkpoint"] == "anna@1"
    measured = {name: value for name, value in checkpoint["metrics"].items() if value is not None}
    assert measured == {"step": 2, "valid_loss": 0.5, "full_valid_loss": 0.5}


async def test_events_are_listed_newest_first_and_streamed_oldest_first(
    client: httpx.AsyncClient, redis: Redis, file_id: str
) -> None:
    job_id = (await create(client, file_id))["id"]
    assert (await client.get(f"{JOBS}/{job_id}/checkpoints")).json()["data"] == []
    await run_job(redis)

    page = (await client.get(f"{JOBS}/{job_id}/events", params={"limit": 100})).json()
    *streamed, done = parse((await client.get(f"{JOBS}/{job_id}/events", params={"stream": "true"})).text)

    assert done == DONE
    assert streamed == page["data"][::-1]
    metrics = [event for event in streamed if event["type"] == "metrics"]
    assert [event["data"]["step"] for event in metrics] == [1, 2]
    assert {event["object"] for event in streamed} == {"fine_tuning.job.event"}


async def test_a_page_of_checkpoints_ends_after_the_only_one(
    client: httpx.AsyncClient, redis: Redis, file_id: str
) -> None:
    job_id = (await create(client, file_id))["id"]
    await run_job(redis)
    url = f"{JOBS}/{job_id}/checkpoints"
    (checkpoint,) = (await client.get(url, params={"limit": 1})).json()["data"]

    assert (await client.get(url, params={"after": checkpoint["id"]})).json()["data"] == []
    reply = await client.get(url, params={"after": "ftckpt_x"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "after")


@pytest.mark.parametrize("params", [{"limit": "1"}, {"after": "1-1"}])
async def test_a_stream_of_events_has_no_pages(
    client: httpx.AsyncClient, file_id: str, params: dict[str, str]
) -> None:
    job_id = (await create(client, file_id))["id"]

    reply = await client.get(f"{JOBS}/{job_id}/events", params={"stream": "true", **params})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, *params)


async def test_a_name_and_a_part_of_a_name_exclude_each_other(
    client: httpx.AsyncClient, file_id: str
) -> None:
    body = {"model": "tiny", "training_file": file_id, "suffix": "x", "adapter": {"id": "anna"}}

    reply = await client.post(JOBS, json=body)

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "suffix")


async def test_a_job_that_has_failed_says_why(client: httpx.AsyncClient, redis: Redis, file_id: str) -> None:
    job_id = (await create(client, file_id))["id"]
    leases = JobLeases(redis)
    (lease,) = await leases.claim("worker", limit=1, lease_s=60)
    error = {"code": "training_diverged", "message": "try a smaller rate", "param": None}
    await leases.fail(lease, error, retryable=False)

    job = (await client.get(f"{JOBS}/{job_id}")).json()

    assert (job["status"], job["error"]) == ("failed", error)
    assert job["fine_tuned_model"] is None
    assert json.dumps(job)


@pytest.mark.parametrize(
    ("text", "expected"), [("My Style!", "my-style"), ("--", ""), ("ä", ""), ("x" * 70, "x" * 55)]
)
def test_a_suffix_becomes_part_of_an_adapter_id(text: str, expected: str) -> None:
    assert slug(text) == expected


RECIPE = {
    "n_epochs": 2, "batch_size": 4, "gradient_accumulation_steps": 8, "learning_rate": 2e-4,
    "lr_scheduler_type": "constant", "warmup_steps": 5, "optimizer": "adamw", "max_grad_norm": 0,
    "max_length": 512, "validation_split": 0.1, "publish": "last", "min_lr_ratio": "auto",
}  # fmt: skip


async def test_other_tools_names_of_hyperparameters_mean_the_same(
    client: httpx.AsyncClient, file_id: str
) -> None:
    as_elsewhere = {
        "num_train_epochs": 2.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8,
        "lr": 2e-4, "lr_scheduler": "constant_with_warmup", "num_warmup_steps": 5, "optim": "adamw_torch",
        "gradient_clipping": 0.0, "sequence_len": 512, "val_set_size": 0.1, "load_best_model_at_end": False,
    }  # fmt: skip

    job = await create(client, file_id, hyperparameters=as_elsewhere)

    assert job["hyperparameters"] == dict.fromkeys(HYPERPARAMETERS, "auto") | RECIPE


@pytest.mark.parametrize(
    ("hyperparameters", "param", "words"),
    [
        ({"optimiser": "adamw"}, "optimiser", "did you mean optimizer?"),
        ({"warmup_step": 3}, "warmup_step", "did you mean warmup_steps?"),
        ({"optim": "lion"}, "optim", "'adamw' or 'sgd'"),
        ({"lr": -1}, "lr", "greater than 0"),
        ({"lr": 1e-3, "learning_rate": 1e-4}, "lr", "another name of learning_rate"),
        ({"lr": 1e-3, "learning_rate_multiplier": 2}, "learning_rate_multiplier", "exclude each other"),
        ({"optimizer": "sgd"}, "learning_rate", "the automatic learning rate is AdamW's"),
        ({"momentum": 0.9}, "momentum", "belongs to the optimizer sgd"),
        ({"val_set_size": 200}, "val_set_size", "less than or equal to 0.9"),
        ({"load_best_model_at_end": "yes"}, "load_best_model_at_end", "'best' or 'last'"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_steps", "exclude each other"),
        ({"lora_r": 8}, "lora_r", "use adapter.rank"),
    ],
)
@pytest.mark.parametrize("place", ["hyperparameters", "method.supervised.hyperparameters"])
async def test_a_wrong_hyperparameter_is_refused_by_its_dotted_path(
    client: httpx.AsyncClient,
    file_id: str,
    place: str,
    hyperparameters: dict[str, Any],
    param: str,
    words: str,
) -> None:
    body: dict[str, Any] = {"model": "tiny", "training_file": file_id}
    if place == "hyperparameters":
        body[place] = hyperparameters
    else:
        body["method"] = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}

    reply = await client.post(JOBS, json=body)

    error = reply.json()["error"]
    is_missing = param not in hyperparameters
    assert (reply.status_code, error["param"]) == (
        400,
        f"{'hyperparameters' if is_missing else place}.{param}",
    )
    assert words in error["message"]


async def test_a_split_beside_a_validation_file_is_refused(client: httpx.AsyncClient, file_id: str) -> None:
    body = {"model": "tiny", "training_file": file_id, "validation_file": file_id}

    reply = await client.post(JOBS, json={**body, "hyperparameters": {"validation_split": 0.1}})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "hyperparameters.validation_split")
    assert (
        await client.post(JOBS, json={**body, "hyperparameters": {"validation_split": 0}})
    ).status_code == 200


@pytest.mark.parametrize("form", ["core", "lora"])
@pytest.mark.parametrize(
    ("adapter", "fields"),
    [
        ({"alpha": 32}, {"alpha": 32.0}),
        ({"lora_alpha": 32, "use_rslora": True, "r": 4}, {"alpha": 32.0, "use_rslora": True, "rank": 4}),
        ({"scale": 2.0}, {"scale": 2.0}),
        ({"target_modules": ["v_proj", "q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"lora_target_modules": "v_proj, q_proj"}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"target_modules": "all-linear"}, {"target_modules": ["all-linear"]}),
        ({"rank_pattern": {"q_proj": 2, ".*mlp.*": 24}}, {"rank_pattern": {"q_proj": 2, ".*mlp.*": 24}}),
        ({"target_modules": ["*.mlp.*"], "rank": 2}, {"target_modules": ["*.mlp.*"], "rank": 2}),
    ],
)
async def test_scale_and_modules_of_a_job_reach_the_worker(
    client: httpx.AsyncClient,
    file_id: str,
    redis: Redis,
    form: str,
    adapter: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    job = await create(client, file_id, adapter={"form": form, **adapter})

    spec = (await JobQueue(redis).get("default", job["id"])).spec
    for name, value in fields.items():
        assert (getattr(spec, name), job["adapter"][name]) == (value, value), name


@pytest.mark.parametrize(
    ("adapter", "param", "words"),
    [
        ({"alpha": 8, "scale": 1.0}, "adapter.alpha", "scale is s itself"),
        ({"use_rslora": True, "scale": 1.0}, "adapter.use_rslora", "scale is s itself"),
        ({"alpha": 0}, "adapter.alpha", "greater than or equal to 0.000001"),
        ({"lora_alpha": "x"}, "adapter.lora_alpha", "valid number"),
        ({"alfa": 8}, "adapter.alfa", "did you mean alpha?"),
        ({"target_modules": ["q_prj"]}, "adapter.target_modules", "no linear layer matches ['q_prj']"),
        ({"target_modules": []}, "adapter.target_modules", "at least 1"),
        ({"target_modules": [3]}, "adapter.target_modules.0", "valid string"),
        ({"form": "lora", "target_modules": "q_prj"}, "adapter.target_modules", "no linear layer matches"),
        ({"target_modules": ["down_proj"], "rank": 300}, "adapter.rank", "the smaller side"),
        (
            {"scale": 2.0, "basis": {"method": "lora_xs", "options": {"scale": 3.0}}},
            "adapter.scale",
            "adapter.basis.options.scale is the same number",
        ),
        (
            {"form": "lora", "alpha": 2, "init": {"method": "pissa", "options": {"scale": 3.0}}},
            "adapter.alpha",
            "adapter.init.options.scale is the same number",
        ),
        ({"rank_pattern": {"q_prj": 4}}, "adapter.rank_pattern", "'q_prj' matches no module"),
        ({"rank_pattern": {"q_proj(": 4}}, "adapter.rank_pattern", "not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "adapter.rank_pattern.q_proj", "greater than or equal to 1"),
        ({"rank_pattern": {"q_proj": 300}}, "adapter.rank", "the smaller side"),
        ({"form": "lora", "rank_pattern": {"q_prj": 4}}, "adapter.rank_pattern", "matches no module"),
        ({"lora_dropout": 0.1}, "adapter.lora_dropout", "there is no dropout"),
    ],
)
async def test_a_wrong_option_of_an_adapter_is_refused_by_its_dotted_path(
    client: httpx.AsyncClient, file_id: str, adapter: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": "tiny", "training_file": file_id, "adapter": adapter}

    reply = await client.post(JOBS, json=body)

    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


async def test_modules_beside_a_stored_basis_must_be_its_own(
    client: httpx.AsyncClient, file_id: str, redis: Redis
) -> None:
    own = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    eye = torch.eye(4)
    factors = {ModuleShape(name, 4, 4): (eye, eye) for name in own}
    basis = make_basis(model_id="m", method="lora_xs", factors=factors, recipe={})
    basis_id = await BasisStore(redis).put(basis)

    for names, status in ((own, 200), (["model.layers.[01].*.q_proj"], 200), (["q_proj"], 400)):
        adapter = {"basis": basis_id, "target_modules": names, "alpha": 8}
        body = {"model": "tiny", "training_file": file_id, "adapter": adapter}
        reply = await client.post(JOBS, json=body)
        assert reply.status_code == status, reply.text
        if status == 400:
            assert reply.json()["error"]["param"] == "adapter.target_modules"
