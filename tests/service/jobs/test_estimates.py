"""Dry runs over HTTP: the real process of the trainer's code, a real queue, and reports of workers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import openai
import pytest
from redis.asyncio import Redis

from service.jobs.estimates import read_error
from tessera.errors import InvalidInput, InvalidTrainingData, LineError
from tessera.queue.client import JobQueue
from tessera.queue.leases import JobLeases
from tessera.queue.worker_reports import WorkerReport, WorkerReports
from tests.service.training import GOOD, JOBS, create, upload
from trainer_worker.estimate import error_as_json

ESTIMATE = f"{JOBS}/estimate"
DATA = Path(__file__).parents[3] / "examples" / "data" / "devil.train.jsonl"
MEASURED = WorkerReport(free_slots=1, step_s=0.5, token_s=1e-3, padding=0.1, fixed_s=4.0, load=1.5)


async def test_a_dry_run_says_what_a_job_would_do_and_queues_nothing(
    official: openai.AsyncOpenAI, redis: Redis
) -> None:
    lines = DATA.read_bytes().splitlines()[:30]
    file = await official.files.create(file=b"\n".join([*lines, lines[0]]), purpose="fine-tune")
    await WorkerReports(redis).post("w", MEASURED)
    body = {
        "model": "tiny", "training_file": file.id, "hyperparameters": {"n_epochs": 2},
        "adapter": {"form": "lora", "rank": 4},
    }  # fmt: skip

    told = await official.post("/fine_tuning/jobs/estimate", body=body, cast_to=object)

    assert isinstance(told, dict)
    assert told["object"] == "fine_tuning.job.estimate"
    data, counts, chosen = told["data"], told["tokens"], told["hyperparameters"]
    assert (data["num_examples"], data["num_duplicates"], data["num_distinct_answers"]) == (31, 1, 30)
    assert data["num_train"] + data["num_validation"] == 31
    assert (chosen["n_epochs"], chosen["batch_size"]) == (2, data["num_train"] // 8)
    assert chosen["learning_rate"] > 0
    assert told["steps"] == 2 * -(-data["num_train"] // chosen["batch_size"])
    assert counts["trained"] == 2 * counts["per_epoch"]
    assert told["cost_tokens"] > 0
    assert told["quota_bytes"] > 0
    useful = counts["trained"] + counts["evaluated"] / 3
    assert told["run_s"] == pytest.approx(1.5 * (told["steps"] * 0.5 + useful * 1.1e-3) + 4, abs=0.2)
    assert told["wait_s"] == 0
    assert abs(told["estimated_finish"] - time.time() - told["run_s"]) < 60
    assert (await JobQueue(redis).list("default")) == ([], False)


async def test_what_a_submission_refuses_is_refused_by_the_same_field(
    client: httpx.AsyncClient, redis: Redis
) -> None:
    file_id = (await upload(client)).json()["id"]
    labelled = json.dumps({"text": "good", "label": "x"}).encode()
    other = (await upload(client, b"\n".join([labelled] * 12))).json()["id"]
    for body, param in (
        ({"training_file": other}, "training_file"),
        ({"training_file": "file-" + "0" * 24}, "training_file"),
        ({"training_file": file_id, "adapter": {"rank": 500}}, "adapter.rank"),
        ({"training_file": file_id, "hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"training_file": file_id, "unknown": 1}, "unknown"),
    ):
        reply = await client.post(ESTIMATE, json={"model": "tiny", **body})
        assert reply.status_code in (400, 404), reply.text
        assert reply.json()["error"]["param"] == param
    assert (await JobQueue(redis).list("default")) == ([], False)


def test_what_the_trainers_code_refuses_is_raised_here_with_its_lines() -> None:
    told = InvalidTrainingData([LineError(3, "nothing_trained", "no token")], param="validation_file")
    raised = read_error(json.loads(json.dumps(error_as_json(told))))
    assert isinstance(raised, InvalidTrainingData)
    assert (raised.errors, raised.param, raised.num_problems) == (told.errors, "validation_file", 1)
    other = read_error(json.loads(json.dumps(error_as_json(InvalidInput("no", param="a.b", code="c")))))
    assert isinstance(other, InvalidInput)
    assert (other.message, other.param, other.code) == ("no", "a.b", "c")


async def test_a_queued_job_says_when_it_will_end_if_that_is_known(
    client: httpx.AsyncClient, redis: Redis
) -> None:
    file_id = (await upload(client, GOOD * 2000)).json()["id"]
    path = f"{JOBS}/{(await create(client, file_id))['id']}"
    reports = WorkerReports(redis)
    assert (await client.get(path)).json()["estimated_finish"] is None  # no worker is there

    await reports.post("w", MEASURED)
    told = (await client.get(path)).json()["estimated_finish"]
    cost = (await JobQueue(redis).list("default"))[0][0].cost
    waits_s, runs_s = cost * 1e-3, 1.5 * cost * 1.1e-3 + 4  # the one place goes to this job, or another
    assert told - time.time() == pytest.approx(waits_s + runs_s, rel=0.1, abs=3)
    await reports.post("w2", WorkerReport(free_slots=8))
    told = (await client.get(path)).json()["estimated_finish"]
    assert told - time.time() == pytest.approx(runs_s, rel=0.1, abs=3)
    [_] = await JobLeases(redis).claim("w", limit=1, lease_s=60)
    assert (await client.get(path)).json()["estimated_finish"] is None  # it has not told yet
