"""Preference pairs over HTTP: what an upload checks, and jobs with the method dpo."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from tessera.queue.client import JobQueue
from tests.preferences import preference_lines
from tests.service.training import JOBS, create, upload

PAIRS = "\n".join(preference_lines()[:3]).encode()


@pytest.fixture
async def pairs_id(client: httpx.AsyncClient) -> str:
    return str((await upload(client, PAIRS)).json()["id"])


async def test_a_job_has_openais_shape_with_the_defaults_filled_in(
    client: httpx.AsyncClient, redis: Redis, pairs_id: str
) -> None:
    given = {"beta": 0.2, "n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}

    job = await create(client, pairs_id, method={"type": "dpo", "dpo": {"hyperparameters": given}})

    assert job["method"].keys() == {"type", "dpo"}
    assert job["method"]["type"] == "dpo"
    shown = job["method"]["dpo"]["hyperparameters"]
    assert shown.items() >= given.items()
    assert shown.items() >= {"loss_type": "sigmoid", "label_smoothing": 0.0, "reference_free": False}.items()
    assert job["hyperparameters"]["n_epochs"] == 2
    spec = (await JobQueue(redis).get("default", job["id"])).spec
    assert (spec.objective, spec.objective_options) == ("dpo", {"beta": 0.2})
    assert spec.hyperparameters == {"n_epochs": 2, "learning_rate_multiplier": 0.5}
    assert (await client.get(f"{JOBS}/{job['id']}")).json() == job


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"beta": "auto", "loss_type": "auto", "reference_free": None}, {}),
        ({"loss_type": "ipo"}, {"loss_type": "ipo"}),
        (
            {"loss_type": "sigmoid_norm", "beta": 2, "label_smoothing": 0.1},
            {"loss_type": "sigmoid_norm", "beta": 2.0, "label_smoothing": 0.1},
        ),
        ({"reference_free": True}, {"reference_free": True}),
    ],
)
async def test_the_options_reach_the_worker(
    client: httpx.AsyncClient, redis: Redis, pairs_id: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    job = await create(client, pairs_id, method={"type": "dpo", "dpo": {"hyperparameters": given}})

    spec = (await JobQueue(redis).get("default", job["id"])).spec
    assert spec.objective_options == expected
    assert job["method"]["dpo"]["hyperparameters"]["beta"] == expected.get("beta", 0.1)


@pytest.mark.parametrize("method", [{"type": "dpo"}, {"type": "dpo", "dpo": {}}])
async def test_the_method_alone_takes_the_defaults(
    client: httpx.AsyncClient, pairs_id: str, method: dict[str, Any]
) -> None:
    job = await create(client, pairs_id, method=method, hyperparameters={"n_epochs": 3})

    assert job["method"]["dpo"]["hyperparameters"]["n_epochs"] == 3


async def test_a_file_must_hold_what_the_method_trains_on(
    client: httpx.AsyncClient, file_id: str, pairs_id: str
) -> None:
    dpo = {"method": {"type": "dpo"}}
    recipe = {"adapter": {"basis": {"method": "lora_sb", "calibration": pairs_id}}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"training_file": pairs_id}, "training_file"),
        ({"training_file": file_id, "validation_file": pairs_id}, "validation_file"),
        ({"training_file": file_id, **dpo}, "training_file"),
        ({"training_file": pairs_id, "validation_file": file_id, **dpo}, "validation_file"),
        ({"training_file": file_id, **recipe}, "adapter.basis.calibration"),
    ]
    for body, param in cases:
        reply = await client.post(JOBS, json={"model": "tiny", **body})

        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
        assert "on which only the method" in reply.json()["error"]["message"]


async def test_an_upload_reports_every_problem_with_its_line(client: httpx.AsyncClient) -> None:
    good, other, more = (json.loads(line) for line in preference_lines()[:3])
    same = {**other, "non_preferred_output": other["preferred_output"]}
    turned = {
        **good,
        "preferred_output": good["non_preferred_output"],
        "non_preferred_output": good["preferred_output"],
    }
    missing = {"preferred_output": more["preferred_output"]}
    lines = [*map(json.dumps, (good, same, turned, missing)), "{", json.dumps({"text": "a"})]

    reply = await upload(client, "\n".join(lines).encode())

    problems = reply.json()["error"]["errors"]
    assert reply.status_code == 400
    assert [(problem["line"], problem["code"]) for problem in problems] == [
        (2, "identical_answers"),
        (3, "contradicting_pairs"),
        (4, "missing_key"),
        (4, "missing_key"),
        (5, "invalid_json"),
        (6, "not_a_pair"),
    ]


async def test_a_prompt_that_the_template_refuses_is_found_at_the_upload(client: httpx.AsyncClient) -> None:
    """Nothing comes before the answers, so no prompt of the chat endpoint leads to them."""
    value = {
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }

    reply = await upload(client, f"{preference_lines()[0]}\n{json.dumps(value)}".encode())

    assert reply.status_code == 400
    assert [problem["line"] for problem in reply.json()["error"]["errors"]] == [2]


async def test_a_calibration_file_holds_no_pairs(client: httpx.AsyncClient) -> None:
    reply = await upload(client, PAIRS, purpose="calibration")

    assert reply.status_code == 400
    assert {problem["code"] for problem in reply.json()["error"]["errors"]} == {"other_format"}
